"""Moving bytes between file descriptors by the kernel, without them passing through Python."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from typing import Optional

from kvm_clone.agent.protocol.errors import INTERRUPTED, AgentError
from kvm_clone.agent.protocol.wire import CHUNK, read_exact

# The os module has it since Python 3.10; older ones take the buffered way.
_splice = getattr(os, "splice", None)

_F_SETPIPE_SZ = 1031
"""fcntl(2) on Linux; the fcntl module names it since Python 3.10."""


class Incoming:
    """What arrives on a pipe or a socket, to be read or moved on.

    sshd gives a command a socket pair on some systems. A socket cannot be spliced to another socket or a file, so its
    bytes take a way through a pipe of our own.
    """

    def __init__(self, fd: int, patience: Optional[float] = None) -> None:
        """`patience`: after so many seconds of silence, reading raises AgentError (interrupted)."""
        self.fd = fd
        self._patience = patience
        self._through: Optional[tuple[int, int]] = None
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            enlarge_pipe(fd)
        elif _splice is not None:
            self._through = os.pipe()
            enlarge_pipe(self._through[1])

    @property
    def can_move(self) -> bool:
        """Whether `move` works with this Python; else `read` has to do."""
        return _splice is not None

    def read(self, count: int) -> bytes:
        """The next `count` bytes, or none at the end of the stream. Raises EOFError when it ends within."""
        return read_exact(self.fd, count, self._wait)

    def _wait(self) -> None:
        if self._patience is not None and not select.select([self.fd], [], [], self._patience)[0]:
            raise AgentError(INTERRUPTED, f"nothing came from the source for {self._patience:.0f} seconds")

    def move(self, target: int, count: int, offset: Optional[int] = None) -> None:
        """Move the next `count` bytes to `target`, at `offset` of it when it is a file. Raises EOFError, OSError."""
        assert _splice is not None
        done = 0
        while done < count:
            self._wait()
            at = None if offset is None else offset + done
            if self._through is None:
                moved = _splice(self.fd, target, count - done, offset_dst=at)
            else:
                part = _splice(self.fd, self._through[1], count - done)
                moved = _move_exact(self._through[0], target, part, at)
            if not moved:
                raise EOFError("the stream ended before a record's content")
            done += moved

    def close(self) -> None:
        """Close the pipe in between; the descriptor given stays open."""
        if self._through is not None:
            os.close(self._through[0])
            os.close(self._through[1])
            self._through = None


def _move_exact(pipe: int, target: int, count: int, offset: Optional[int]) -> int:
    """Splice up to `count` bytes until they are through or the pipe ends; how many were."""
    assert _splice is not None
    done = 0
    while done < count:
        moved: int = _splice(pipe, target, count - done, offset_dst=None if offset is None else offset + done)
        if not moved:
            break
        done += moved
    return done


def enlarge_pipe(fd: int) -> None:
    """Let a pipe hold a whole chunk, so that both ends switch less; anything else than a pipe stays as it is."""
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            fcntl.fcntl(fd, _F_SETPIPE_SZ, CHUNK)
        except PermissionError:  # over /proc/sys/fs/pipe-user-pages-soft: the pipe works at its old size
            return
