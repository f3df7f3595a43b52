"""Every exception kvm-clone raises on purpose, and the exit code each one ends a command with.

    KvmCloneError                1  a bug, when nothing below fits
    ├── UsageError               2  the command line or the configuration cannot be understood
    ├── RefusedError             3  a blocking finding of the plan; nothing was written, or it was undone
    ├── DomainExistsError        4  the destination has a VM of that name, or an attempt at one
    ├── ConnectError             5  a host cannot be reached or libvirt there cannot be opened
    │   ├── AuthenticationError  5  the host refused our key
    │   └── HostKeyError         5  the host's key is unknown or has changed
    ├── TransferError            6  the copy failed; it was rolled back
    │   └── InterruptedTransferError  6  it was interrupted; it was kept for the next try, if that was not declined
    ├── VerificationError        7  source and destination differ after the copy, or in a finished clone
    ├── LockedError              8  another operation works on the same destination VM, or reads the same running one
    └── OutputError              9  what was asked for was done, but its result could not be written to stdout

Ctrl-C ends with 130 and is not an exception of ours: it is the cancellation of the task.
"""

from __future__ import annotations

from enum import IntEnum

from kvm_clone.findings import Finding


class ExitCode(IntEnum):
    """Exit codes, the same for every command. docs/usage.md publishes this table."""

    DONE = 0
    BUG = 1
    USAGE = 2
    REFUSED = 3
    EXISTS = 4
    CONNECT = 5
    TRANSFER = 6
    MISMATCH = 7
    LOCKED = 8
    OUTPUT = 9
    CANCELLED = 130


class KvmCloneError(Exception):
    """What happened (`str(error)`), to what (`subject`), and what to do about it (`remedy`).

    `findings` are the plan's blocking ones, when a plan was refused.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(
        self, message: str, *, subject: str = "", remedy: str = "", findings: tuple[Finding, ...] = ()
    ) -> None:
        super().__init__(message)
        self.subject = subject
        self.remedy = remedy
        self.findings = findings


class UsageError(KvmCloneError):
    """The command line, the configuration or a host's address cannot be understood."""

    exit_code = ExitCode.USAGE


class RefusedError(KvmCloneError):
    """The VM or its hosts do not allow the operation. Nothing was written anywhere."""

    exit_code = ExitCode.REFUSED


class DomainExistsError(KvmCloneError):
    """The destination already has a domain of the wanted name."""

    exit_code = ExitCode.EXISTS


class ConnectError(KvmCloneError):
    """A host cannot be reached, or its libvirt cannot be opened."""

    exit_code = ExitCode.CONNECT


class AuthenticationError(ConnectError):
    """The host refused every key that was offered. Never retried."""


class HostKeyError(ConnectError):
    """The host's key is unknown or differs from the known one. Never retried."""


class TransferError(KvmCloneError):
    """The copy failed. `interrupted`: another try may mend it, and what is staged is kept for it."""

    exit_code = ExitCode.TRANSFER
    interrupted = False


class InterruptedTransferError(TransferError):
    """The network, a host or a process went away in the midst of the copy."""

    interrupted = True


class VerificationError(KvmCloneError):
    """The destination's disks differ from the source's although the copy said it was done."""

    exit_code = ExitCode.MISMATCH


class LockedError(KvmCloneError):
    """Another operation on the same destination VM is under way."""

    exit_code = ExitCode.LOCKED


class OutputError(KvmCloneError):
    """What was asked for was done, but its result could not be written to stdout. Only the command line has it."""

    exit_code = ExitCode.OUTPUT
