"""What child processes print: read in time and within bounds, and never left unread, or they would not end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvm_clone.agent import wire

_MOST_LINE = 4096
"""Bytes. A longer line of a login's is taken in parts."""

_STEADY_SECONDS = 60.0
"""How long a frame that has begun to come may stop."""

_REAP_SECONDS = 5.0
"""How long the outputs of a killed child may stay open in the hands of a child of its own."""


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a child's output to its end, however many and however long; without line ends."""
    rest = b""
    while part := await stream.read(_MOST_LINE):
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) >= _MOST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield line.decode(errors="replace").rstrip()
    if rest:
        yield rest.decode(errors="replace").rstrip()


async def read_past_noise(stream: asyncio.StreamReader, start: bytes, seconds: float | None) -> bytes:
    """The first line that starts so; what a login prints before is skipped.

    Raises EOFError, TimeoutError, and ProtocolError after wire.NOISE_LIMIT bytes of noise.
    """
    skipped = 0
    async with asyncio.timeout(seconds):
        while skipped <= wire.NOISE_LIMIT:
            try:
                line = await stream.readline()
            except ValueError:  # a line longer than the stream's buffer, which readline has dropped
                skipped += 64 * 1024
                continue
            if line.startswith(start) and line.endswith(b"\n"):
                return line
            if not line:
                raise EOFError("the connection ended before the agent was ready")
            skipped += len(line)
    raise wire.ProtocolError("the login prints without end instead of running the agent")


async def read_steadily(stream: asyncio.StreamReader, count: int) -> bytes:
    """The next `count` bytes of something that has begun. Raises EOFError; TimeoutError when it stops in the middle."""
    parts: list[bytes] = []
    while count:
        async with asyncio.timeout(_STEADY_SECONDS):
            part = await stream.read(min(count, 1 << 16))
        if not part:
            raise EOFError("the stream ended within a frame")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


async def ended(process: asyncio.subprocess.Process) -> None:
    """Wait for a child's end. asyncio waits for that of its output too: what is left of it is read and dropped."""
    dropping = asyncio.ensure_future(_drop(process.stdout)) if process.stdout is not None else None
    try:
        await process.wait()
    finally:
        if dropping is not None:
            dropping.cancel()
            await asyncio.gather(dropping, return_exceptions=True)


async def _drop(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


async def reaped(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a child that was killed; its outputs are closed should a child of its own hold them."""
    try:
        async with asyncio.timeout(_REAP_SECONDS):
            await ended(process)
    except TimeoutError:
        _close_outputs(process)
        await process.wait()


async def heard_out(process: asyncio.subprocess.Process, reader: asyncio.Task[None]) -> None:
    """Wait until the task has read an ended child's output, or until nothing more comes although it is kept open."""
    _, late = await asyncio.wait([reader], timeout=_REAP_SECONDS)
    if late:
        _close_outputs(process)
    await reader


def _close_outputs(process: asyncio.subprocess.Process) -> None:
    process._transport.close()  # type: ignore[attr-defined] # asyncio names no other way
