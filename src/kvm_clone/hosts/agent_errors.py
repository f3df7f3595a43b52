"""The exceptions for what an agent answers."""

from __future__ import annotations

from typing import Any

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.errors import KvmCloneError, LockedError, TransferError


class AgentCallError(TransferError):
    """The agent answered a call with an error of `kind`, one of agent.errors."""

    def __init__(self, kind: str, message: str, host: str) -> None:
        super().__init__(f"{host}: {message}", subject=host, remedy=REMEDIES.get(kind, ""))
        self.kind = kind
        self.interrupted = kind == kinds.INTERRUPTED


REMEDIES = {
    kinds.NO_SPACE: "make room on that filesystem, or name another pool with --pool; then run the command again",
    kinds.IO: "check that host's storage (its kernel log, dmesg, says more), or name another pool with --pool; "
    "then run the command again",
    kinds.PERMISSION: "connect as a user who may do this (root, usually)",
    kinds.IN_USE: "shut down whatever uses the image, then run the command again",
    kinds.INTERRUPTED: "run the command again",
    kinds.READ_ONLY: "name another pool with --pool",
    kinds.EXISTS: "remove or rename that file, or choose another --new-name or --pool",
    kinds.LIMIT: "raise what limits that user there (ulimit -a shows it), then run the command again",
}


def call_error(answer: dict[str, Any], host: str) -> KvmCloneError:
    """The exception for an agent's error answer."""
    kind, message = str(answer.get("kind", kinds.BUG)), answer.get("message", "no reason given")
    if kind == kinds.LOCKED:
        remedy = "wait until that operation has ended"
        return LockedError(f"{host}: {message}", subject=host, remedy=remedy)
    if kind == kinds.BUG:
        return KvmCloneError(f"{host}: {message}", subject=host, remedy="please report this")
    return AgentCallError(kind, message, host)
