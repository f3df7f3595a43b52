"""Reads of a file, pipe or device that a user names, limited in size and time."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

SILENCE_SECONDS = 60.0
"""How long a pipe or a terminal may send nothing: its writer may be waiting for a password."""

_NOBODY_SECONDS = 0.5
"""How long to wait for a FIFO to have a writer."""


def read(path: Path, limit: int, *, seconds: float = SILENCE_SECONDS) -> bytes:
    """The content, of `limit` bytes at most. Raises OSError, also if there is more or it does not end in time."""
    # O_NONBLOCK: open(2) of a FIFO would wait for a writer. It has no effect on a file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        content = _content(descriptor, limit, time.monotonic() + seconds)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return content


def _content(descriptor: int, limit: int, deadline: float) -> bytes:
    """The content up to its end, or up to one byte more than the limit."""
    content = b""
    unwritten = _is_fifo(descriptor)
    while len(content) <= limit:
        try:
            part = os.read(descriptor, limit + 1 - len(content))
        except BlockingIOError:
            _wait(descriptor, deadline - time.monotonic(), "nothing comes from it")
            unwritten = False
            continue
        if not part and not unwritten:
            break
        if not part:  # not the end: a writer may still open it
            _wait(descriptor, _NOBODY_SECONDS, "it is a FIFO that nobody writes")
        unwritten = False
        content += part
    return content


def _is_fifo(descriptor: int) -> bool:
    """Whether it is a FIFO with a name. A pipe, such as a shell's <(...), has its writer from the beginning."""
    is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    return is_pipe and not Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("pipe:")


def _wait(descriptor: int, seconds: float, otherwise: str) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(max(0.0, seconds) * 1000):
        raise OSError(errno.ETIMEDOUT, otherwise)
