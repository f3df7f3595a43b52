"""Our locks: on an operation, and on a staged file that is being written."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from typing import Any, Dict, Optional

from kvm_clone.agent.disks.disk import open_flags
from kvm_clone.agent.protocol.errors import LOCKED, UNSUPPORTED, AgentError

_LOOKS, _LOOK_SECONDS = 4, 0.02
"""How often and how long apart a lock is tried: `holder_of` holds it for an instant."""


class OperationLock:
    """An flock on a file that names its holder. The kernel releases it when the holder dies, however it dies."""

    def __init__(self, path: str, holder: Dict[str, Any]) -> None:
        """Raises AgentError: locked, with the holder's name, when another process holds it, unsupported for no file."""
        self.path = path
        self._fd = self._acquire(holder)

    def _acquire(self, holder: Dict[str, Any]) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise AgentError(UNSUPPORTED, f"{self.path} is no regular file, and no lock of ours: remove it")
            if not _locked_soon(fd):
                text = _describe(os.pread(fd, 4096, 0))
                os.close(fd)
                raise AgentError(LOCKED, f"another operation is under way: {text}")
            if _same_file(fd, self.path):
                os.truncate(fd, 0)
                os.pwrite(fd, json.dumps(holder).encode(), 0)
                return fd
            os.close(fd)  # its last holder removed the file between our open and our lock

    @property
    def is_held(self) -> bool:
        """Whether we have the lock still: it is gone with its file, in whose place another one may be locked."""
        return self._fd >= 0 and _same_file(self._fd, self.path)

    def release(self) -> None:
        """Remove the file and release it. The order matters: whoever locks a removed file notices and tries again."""
        if self._fd >= 0:
            if self.is_held:  # else the file there is another one's
                os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1


def _locked_soon(fd: int) -> bool:
    """Take the flock, or find that it is held: for longer than whoever only looks at it holds it."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        else:
            return True
    return False


class WriterLock:
    """Says that a receiver writes a staged file.

    It may outlive its operation's agent, and nobody may go on before it
    has ended. An flock, of which QEMU's own locks know nothing; several receivers may hold it.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, open_flags(writable=False))
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Nothing more will be written."""
        os.close(self._fd)


def is_written(path: str) -> bool:
    """Whether a living process has a WriterLock on the file."""
    return _blocks(path, fcntl.LOCK_EX) is not None


def holder_of(path: str) -> str:
    """What the lock at this path says of the living process that holds it, nothing when there is none."""
    return _blocks(path, fcntl.LOCK_SH) or ""


def _blocks(path: str, kind: int) -> Optional[str]:
    """What is known of whoever keeps us from an flock of that kind; it is released at once if nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(os.pread(fd, 4096, 0))
    finally:
        os.close(fd)
    return None


def _same_file(fd: int, path: str) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _describe(content: bytes) -> str:
    holder: Optional[Dict[str, Any]] = None
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return "its holder has just begun"
    if not isinstance(holder, dict):
        return "its holder is unknown"
    return ", ".join(f"{key} {value}" for key, value in holder.items())
