"""What a running source must not be left with when its controller dies: frozen filesystems, and a backup job of ours.

The controller asks libvirt itself for everything; this steps in only when it cannot any more, by `virsh`, where the
host has it. What it cannot do, the next run does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from typing import Optional

from kvm_clone.agent.names import source_lock_path
from kvm_clone.agent.process import run
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging.lock import OperationLock, holder_of

_VIRSH = ("timeout", "20", "virsh", "-q", "-c", "qemu:///system")
"""A guest agent that hangs must not keep this process."""

_THAWS = 5


def reader(domain: str) -> str:
    """Which operation of ours copies the domain (by its UUID) by a backup job, nothing when none does."""
    return holder_of(source_lock_path(domain))


class Watchdog:
    """Watches over one backup job of one running domain while this process lives."""

    def __init__(self) -> None:
        self._lock: Optional[OperationLock] = None
        self._domain = ""
        self._socket = ""
        self._frozen = False

    def watch(self, domain: str, socket: str, operation: str) -> bool:
        """Take the lock on backups of the domain (by its UUID), before its job begins on the socket.

        The answer: whether a guest could be thawed from here, which needs virsh. Raises AgentError (locked) while
        another operation of ours has a job.
        """
        self._lock = OperationLock(source_lock_path(domain), {"operation": operation, "pid": os.getpid()})
        self._domain, self._socket = domain, socket
        return shutil.which("virsh") is not None

    def freezing(self, frozen: bool) -> None:
        """The guest's filesystems are about to be frozen, or have been thawed."""
        self._frozen = frozen

    def done(self) -> None:
        """The job is over, or was never begun."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def step_in(self) -> None:
        """The controller is gone: thaw the guest and end the job, if it is still ours."""
        if self._lock is None:
            return
        if self._frozen:
            self._thaw()
        with contextlib.suppress(AgentError):  # no job of ours, or no virsh: the next run looks again
            if self._socket in run([*_VIRSH, "backup-dumpxml", "--domain", self._domain]):
                run([*_VIRSH, "domjobabort", "--domain", self._domain])
        self.done()

    def _thaw(self) -> None:
        """Thaw the guest; a freeze that it is still busy with comes first."""
        with contextlib.suppress(AgentError):  # no virsh, or the domain is off
            run([*_VIRSH, "guest-agent-timeout", "--domain", self._domain, "--timeout", "-2"])
        for _ in range(_THAWS):
            try:
                run([*_VIRSH, "domfsthaw", "--domain", self._domain])
            except AgentError:  # likewise, or the guest does not answer
                time.sleep(1.0)
            else:
                return
