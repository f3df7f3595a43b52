"""What carries calls to the control agent and its answers back, and the channels of tunnels between them.

The messages are described in agent/server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.protocol import wire
from kvm_clone.errors import InterruptedTransferError, KvmCloneError
from kvm_clone.hosts.agent_errors import AgentCallError, call_error
from kvm_clone.hosts.frames import read_any
from kvm_clone.hosts.ssh_connection import SshConnection
from kvm_clone.hosts.tunnel import Tunnel

log = logging.getLogger(__name__)

_PING_SECONDS = 5.0
"""Well below the agent's patience, agent.server.SILENCE_SECONDS."""

Progress = Callable[[dict[str, Any]], None]


class AgentLink:
    """The controller's end of an agent's input and output."""

    def __init__(self, connection: SshConnection) -> None:
        self.name = connection.name
        self._connection = connection
        self._input: asyncio.StreamWriter | None = None
        self._calls: dict[int, tuple[asyncio.Future[Any], Progress | None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._lost: KvmCloneError | None = None
        self._tunnels: dict[int, Tunnel] = {}
        self._ended: set[asyncio.Task[None]] = set()

    def begin(self, process: asyncio.subprocess.Process) -> None:
        """Talk to this agent from here on."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._lost = None
        self._input = process.stdin
        self._tasks = [
            asyncio.create_task(self._read_answers(process.stdout)),
            asyncio.create_task(self._ping(process.stdin)),
        ]

    async def close(self) -> None:
        """Say nothing more, and close the tunnels; the agent is still there."""
        self._lost = self._lost or self._loss(": it was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._ended, *(tunnel.close() for tunnel in self._tunnels.values()))

    @property
    def lost(self) -> bool:
        """Whether the agent is gone, or was never there."""
        return self._input is None or self._lost is not None

    @property
    def tunnels(self) -> int:
        """How many tunnels are open."""
        return len(self._tunnels)

    async def wait_lost(self) -> None:
        """Return never; raise TransferError when the agent is gone."""
        if self._lost is not None:
            raise self._lost
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        number = -1 - random.getrandbits(48)  # no answer has a negative one
        self._calls[number] = (future, None)
        try:
            await future
        finally:
            self._calls.pop(number, None)

    async def call(self, name: str, progress: Progress | None = None, /, **arguments: Any) -> Any:
        """Call the control agent. AgentClient alone uses it.

        Raises AgentCallError, LockedError; TransferError when the connection is lost.
        """
        if self._lost is not None:
            raise self._lost
        assert self._input is not None
        number = random.getrandbits(48) + 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            frame = wire.pack_frame({"id": number, "call": name, "args": arguments})
        except wire.ProtocolError as error:
            raise AgentCallError(kinds.PROTOCOL, f"{name} cannot be asked for: {error}", self.name) from error
        self._calls[number] = (future, progress)
        self._input.write(frame)
        return await future

    async def open_tunnel(self, channel: int) -> Tunnel:
        """A socket on this machine for what the agent has opened as this channel. Raises OSError."""
        path = self._connection.socket_path(channel)
        tunnel = Tunnel(path, lambda data: self._put_channel(channel, data))
        self._tunnels[channel] = tunnel
        await tunnel.open()
        return tunnel

    def _put_channel(self, channel: int, data: bytes) -> None:
        if self._input is not None and self._lost is None:
            with contextlib.suppress(OSError):  # the agent is gone, which its answers' end shows
                self._input.write(wire.pack_channel(channel, data))

    async def _ping(self, stdin: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            with contextlib.suppress(OSError):
                stdin.write(wire.pack_frame({"id": 0, "call": "ping"}))

    async def _read_answers(self, stdout: asyncio.StreamReader) -> None:
        try:
            while (frame := await read_any(stdout)) is not None:
                if isinstance(frame, wire.ChannelData):
                    self._receive(frame)
                else:
                    self._take(frame)
        except wire.ProtocolError as error:
            self._connection.note(f"the agent there does not keep to the protocol: {error}")
        except (EOFError, OSError) as error:
            log.debug("%s: %s", self.name, error)
        await asyncio.sleep(0.1)  # ssh's last words come over another pipe
        said = self._connection.said().strip().splitlines()
        self._lose(f": {said[-1]}" if said else "")

    def _lose(self, why: str) -> None:
        """Fail every call that waits for an answer, and end the tunnels."""
        self._lost = self._loss(why)
        for future, _ in self._calls.values():
            if not future.done():
                future.set_exception(self._lost)
        self._calls.clear()
        for tunnel in self._tunnels.values():
            tunnel.receive(b"")

    def _loss(self, why: str) -> KvmCloneError:
        text = f"the connection to {self.name} was lost{why}"
        return InterruptedTransferError(text, subject=self.name, remedy="run the command again")

    def _receive(self, frame: wire.ChannelData) -> None:
        """Pass on what a channel's daemon says; nothing is its end, and the tunnel's."""
        tunnel = self._tunnels.get(frame.channel)
        if tunnel is not None:
            tunnel.receive(frame.data)
            if not frame.data:
                del self._tunnels[frame.channel]
                ending = asyncio.create_task(tunnel.close())
                self._ended.add(ending)
                ending.add_done_callback(self._ended.discard)

    def _take(self, frame: dict[str, Any]) -> None:
        """Give an answer, or a report of progress, to the call that waits for it. Raises ProtocolError."""
        number, error = frame.get("id"), frame.get("error", {})
        if type(number) is not int or not isinstance(error, dict) or not isinstance(frame.get("progress", {}), dict):
            raise wire.ProtocolError(f"an answer that is none: {str(frame)[:200]}")
        future, progress = self._calls.get(number, (None, None))
        if future is None or future.done():
            return
        if "progress" in frame:
            try:
                if progress is not None:
                    progress(frame["progress"])
            except Exception as failure:  # noqa: BLE001 - the caller's own, which ends its call and no other's
                del self._calls[number]
                future.set_exception(failure)
            return
        del self._calls[number]
        if "error" in frame:
            future.set_exception(call_error(error, self.name))
        else:
            future.set_result(frame.get("ok"))
