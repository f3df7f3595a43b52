"""Reading what a user names: a file, a pipe or a device, never more of it than fits, and never without end."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

SILENCE_SECONDS = 60.0
"""How long a pipe or a terminal may take: somebody may type a password meanwhile."""

_NOBODY_SECONDS = 0.5
"""How long a FIFO may be without anybody who writes it."""


def read(path: Path, limit: int, *, seconds: float = SILENCE_SECONDS) -> bytes:
    """The content, of `limit` bytes at most. Raises OSError, also for what is larger, or does not end in time."""
    # O_NONBLOCK: opening a FIFO would wait for somebody to write it. A file ignores that.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        content = _content(descriptor, limit, time.monotonic() + seconds)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return content


def _content(descriptor: int, limit: int, deadline: float) -> bytes:
    """What comes until its end, or a byte more than the limit."""
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
        if not part:  # no end yet, as somebody who writes it may still come
            _wait(descriptor, _NOBODY_SECONDS, "it is a FIFO that nobody writes")
        unwritten = False
        content += part
    return content


def _is_fifo(descriptor: int) -> bool:
    """Whether it is a FIFO with a name. A pipe, such as a shell's <(...), has been written from its beginning."""
    is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    return is_pipe and not Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("pipe:")


def _wait(descriptor: int, seconds: float, otherwise: str) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(max(0.0, seconds) * 1000):
        raise OSError(errno.ETIMEDOUT, otherwise)
