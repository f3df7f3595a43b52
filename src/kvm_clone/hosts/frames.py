"""Frames and markers of agents, read from a stream: see agent/protocol/wire.py for the layout."""

from __future__ import annotations

import asyncio
from typing import Any

from kvm_clone.agent.protocol import wire
from kvm_clone.hosts import payload
from kvm_clone.hosts.outputs import read_past_noise, read_steadily

START_SECONDS = 60.0
"""How long a login and Python's start may take after the connection stands."""


async def read_marker(stream: asyncio.StreamReader, seconds: float | None) -> str:
    """Skip noise up to the agent's marker; what the agent says of itself behind it.

    Raises EOFError, TimeoutError; ProtocolError for endless noise, or the marker of another agent.
    """
    line = await read_past_noise(stream, wire.MARKER, seconds)
    identity = line[len(wire.MARKER) :].decode(errors="replace").strip()
    if identity != payload.identity():
        raise wire.ProtocolError(f"the agent that runs there is another one: {identity}")
    return identity


async def read_frame(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, None at the end. Raises what read_any does, and ProtocolError for another kind of frame."""
    found = await read_any(stream)
    if isinstance(found, wire.ChannelData):
        raise wire.ProtocolError("bytes of a channel where a message was expected")
    return found


async def read_any(stream: asyncio.StreamReader) -> dict[str, Any] | wire.ChannelData | None:
    """The next frame, None at the end.

    Raises ProtocolError, EOFError when the stream ends within a frame, TimeoutError when it stops there.
    """
    begun = await stream.read(1)
    if not begun:
        return None
    header = begun + await read_steadily(stream, wire.FRAME_HEADER.size - 1)
    return wire.unpack_frame(header, await read_steadily(stream, wire.body_length(header)))
