"""What child processes print: read in time and within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvm_clone.agent.protocol import wire

_MOST_LINE = 4096
"""Bytes. A longer line of a login's is taken in parts."""

_STEADY_SECONDS = 60.0
"""How long a frame that has begun to come may stop."""


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
