"""A host's libvirt on a socket of this machine: what a client says there goes through the host's agent and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

_PART = 1 << 16
"""Bytes that are taken from the client at a time."""


class Tunnel:
    """A socket for one client, and the channel of an agent that carries what is said there (agent/relay.py)."""

    def __init__(self, path: Path, send: Callable[[bytes], None]) -> None:
        """`send` gives bytes to the channel, and none at the stream's end."""
        self.path = path
        self._send = send
        self._server: asyncio.Server | None = None
        self._client: asyncio.StreamWriter | None = None
        self._ended = False

    async def open(self) -> None:
        """Listen, in a directory that nobody else can enter. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._client is not None or self._ended:
            writer.close()
            return
        self._client = writer
        with contextlib.suppress(OSError):
            while data := await reader.read(_PART):
                self._send(data)
        self._send(b"")
        await _closed(writer)

    def receive(self, data: bytes) -> None:
        """What the daemon says; nothing is its end."""
        if not data:
            self._ended = True
        if self._client is not None:
            if data:
                self._client.write(data)
            else:
                self._client.close()

    async def close(self) -> None:
        """End the client's connection, and listen no more."""
        self._ended = True
        if self._server is not None:
            self._server.close()
        if self._client is not None:
            await _closed(self._client)
        self.path.unlink(missing_ok=True)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
