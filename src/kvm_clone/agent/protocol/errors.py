"""What goes wrong on a host, in a form that crosses the wire."""

from __future__ import annotations

import errno
from typing import Any, Dict

from kvm_clone.agent.protocol.wire import ProtocolError

# Kinds are a contract with the controller, which turns each into an exception with an exit code.
BUG = "bug"
EXISTS = "exists"  # a file that must not be there is there
IN_USE = "in-use"  # another process writes the image
INTERRUPTED = "interrupted"  # the peer went away
IO = "io"
LIMIT = "limit"  # the host has no more of what limits ration: memory, open files, processes, a file's size
LOCKED = "locked"  # another operation holds the lock
MISSING = "missing"  # a file or program is not there
NO_SPACE = "no-space"
PERMISSION = "permission"
PROTOCOL = "protocol"
READ_ONLY = "read-only"
UNSUPPORTED = "unsupported"

_KIND_OF_ERRNO = {
    errno.EACCES: PERMISSION,
    errno.EAGAIN: LIMIT,
    errno.EDQUOT: NO_SPACE,
    errno.EEXIST: EXISTS,
    errno.EFBIG: LIMIT,
    errno.EMFILE: LIMIT,
    errno.ENFILE: LIMIT,
    errno.ENOENT: MISSING,
    errno.ENOMEM: LIMIT,
    errno.ENOSPC: NO_SPACE,
    errno.EPERM: PERMISSION,
    errno.EPIPE: INTERRUPTED,
    errno.ECONNRESET: INTERRUPTED,
    errno.EROFS: READ_ONLY,
}


class AgentError(Exception):
    """A failure with a `kind` from the list above and a text for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def as_dict(self) -> Dict[str, Any]:
        """The form that crosses the wire."""
        return {"kind": self.kind, "message": str(self)}


def from_exception(error: BaseException, doing: str = "") -> AgentError:
    """Any exception as an AgentError; `doing` says what was being done, with its object."""
    if isinstance(error, AgentError):
        return error
    prefix = f"{doing}: " if doing else ""
    if isinstance(error, OSError):
        kind = _KIND_OF_ERRNO.get(error.errno or 0, IO)
        name = f" ({error.filename})" if error.filename and str(error.filename) not in doing else ""
        return AgentError(kind, f"{prefix}{error.strerror or error}{name}")
    if isinstance(error, EOFError):
        return AgentError(INTERRUPTED, f"{prefix}{error or 'the peer went away'}")
    if isinstance(error, ProtocolError):
        return AgentError(PROTOCOL, f"{prefix}{error}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "new thread" in str(error)):
        return AgentError(LIMIT, f"{prefix}the host's limits forbid it: {str(error) or 'no more memory'}")
    return AgentError(BUG, f"{prefix}{type(error).__name__}: {error}")
