"""Replacements for the process's stdin, stdout and stderr, whose writes never raise.

A failed write to stdout is remembered, and main() looks at it last: it must not stop a command halfway. A failed write
to stderr is dropped. Neither stream fails on a character that the locale lacks.
"""

from __future__ import annotations

import contextlib
import errno
import io
import locale
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STALL_SECONDS = 1.0
"""How long a write to stderr may wait for its reader while hosts are connected: agents give up a silent controller."""

# How a closed descriptor is opened again. 1 is not writable, so that lost output is an error and does not seem read.
_REOPENED = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


class _Written(io.RawIOBase):
    """A raw stream on a descriptor. A write that fails is dropped and does not raise.

    `error`: why something was dropped, None if nothing was. `once`: after an error everything is dropped, so that the
    output never has a gap. `hurried`: drop what the reader does not take soon.
    """

    def __init__(self, descriptor: int, *, once: bool) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._once = once
        self._stalled = False
        self.error: OSError | None = None
        self.hurried = False

    def writable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def fileno(self) -> int:
        """See io.RawIOBase."""
        return self._descriptor

    def isatty(self) -> bool:
        """See io.RawIOBase."""
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write a part of the data, or drop all of it; the number of bytes written or dropped."""
        view = memoryview(data)
        if (self._once and self.error is not None) or not self._may_write():
            return len(view)
        try:
            # A pipe that polls as writable takes this many bytes without waiting.
            return os.write(self._descriptor, view[: select.PIPE_BUF] if self.hurried else view)
        except BlockingIOError:  # a process that shares the descriptor has made it non-blocking
            self._is_ready(None)
            return 0
        except OSError as error:
            self.error = error
            return len(view)

    def _may_write(self) -> bool:
        if not self.hurried:
            return True
        self._stalled = not self._is_ready(0.0 if self._stalled else STALL_SECONDS)
        return not self._stalled

    def _is_ready(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def look_for_reader(self) -> None:
        """Set `error` if the descriptor is a pipe whose other end is closed."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            self.error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def speak_utf8() -> None:
    """Restart the program in Python's UTF-8 mode if the locale has another encoding.

    Names of VMs and pools are UTF-8 on every host. Python 3.15 has this mode by default.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or sys.stdout is not sys.__stdout__:
        return
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - no shell


def own() -> None:
    """Replace the standard streams, except those that were replaced already, by a test for example."""
    for descriptor, flags in _REOPENED.items():
        _open_if_closed(descriptor, flags)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - to the end
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _made(1, sys.stdout, lines=os.isatty(1))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _made(2, sys.stderr, lines=True)


def _open_if_closed(descriptor: int, flags: int) -> None:
    """Open /dev/null on a descriptor that the parent process closed. No other file may get its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, flags)
        os.dup2(opened, descriptor)
        if opened != descriptor:
            os.close(opened)


def _made(descriptor: int, before: TextIO | None, *, lines: bool) -> TextIO:
    encoding = locale.getencoding() if before is None else before.encoding
    buffer = io.BufferedWriter(_Written(descriptor, once=descriptor == 1))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", newline="\n", line_buffering=lines)


def failure() -> OSError | None:
    """Why a write to stdout failed, None if none did."""
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    return raw.error if raw is not None else None


def has_reader() -> bool:
    """Whether stdout still takes what is printed. Where it does not, `failure` says why."""
    raw = _raw(sys.stdout)
    if raw is not None and failure() is None:
        raw.look_for_reader()
    return failure() is None


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Within the block, a write to stderr waits STALL_SECONDS at most for its reader, and is then dropped."""
    raw = _raw(sys.stderr)
    if raw is None:
        yield
        return
    raw.hurried = True
    try:
        yield
    finally:
        raw.hurried = False


def _raw(stream: TextIO) -> _Written | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Written) else None
