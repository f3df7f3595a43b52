"""One host: its connection, the control agent that runs there, and the way to its libvirt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.protocol import wire
from kvm_clone.errors import (
    ConnectError,
    InterruptedTransferError,
    KvmCloneError,
    LockedError,
    RefusedError,
)
from kvm_clone.gather import undisturbed
from kvm_clone.hosts import payload, ssh
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.agent_errors import REMEDIES, AgentCallError, call_error
from kvm_clone.hosts.children import deaf, end_process, kill_process, spawn, stop_process
from kvm_clone.hosts.outputs import lines_of, read_past_noise, read_steadily
from kvm_clone.hosts.tunnel import Tunnel

log = logging.getLogger(__name__)

_PING_SECONDS = 5.0
"""Well below the agent's patience, agent.server.SILENCE_SECONDS."""

_READY_SECONDS = 60.0
"""How long a login and Python's start may take after the connection stands."""

_OURS = "kvm-clone: "
"""Starts what the agent and its loader say on stderr before they give up."""

LOCK_PATIENCE_SECONDS = 75.0
"""How long we wait for agents of ours that were cut off to release their locks: longer than a receiver's patience."""

Progress = Callable[[dict[str, Any]], None]

_Answer = TypeVar("_Answer")


class Host:
    """A connected host. One SSH connection carries the control agent, the data streams and libvirt."""

    def __init__(self, address: ssh.Address, options: ssh.SshOptions, directory: Path, *, interactive: bool) -> None:
        self.address = address
        self.name = address.text
        self.known = ssh.Effective({})
        self._ciphers = ""
        self._options = options
        self._interactive = interactive
        self._control = directory / f"{random.randbytes(4).hex()}.ssh"
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: deque[str] = deque(maxlen=40)
        self._calls: dict[int, tuple[asyncio.Future[Any], Progress | None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._lost: KvmCloneError | None = None
        self._tunnels: dict[int, Tunnel] = {}
        self._ended: set[asyncio.Task[None]] = set()
        self.agent = AgentClient(self)

    async def connect(self) -> None:
        """Connect and start the control agent; network faults are retried with exponential back-off.

        Raises ConnectError and its kinds; RefusedError when the host cannot run the agent.
        """
        if not self.address.local:
            self.known = await ssh.effective(self.address, self._options)
            self._ciphers = await ssh.default_ciphers()
            self._options = ssh.with_plain_config(self._options, self._control.with_suffix(".config"))
        delay = 1.0
        for tries_left in range(self._options.retries, -1, -1):
            try:
                await self._start_agent()
            except ConnectError as error:
                if not tries_left or not ssh.worth_retrying(error, self._said()):
                    raise
                log.warning("%s; trying again in %.0f s", error, delay)
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                delay *= 2
            else:
                return

    async def close(self) -> None:
        """End the agent, and with it the connection."""
        await undisturbed(self._close())

    async def _close(self) -> None:
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        await asyncio.gather(*self._ended, *(tunnel.close() for tunnel in self._tunnels.values()))
        if self._process is not None:
            await end_process(self._process)
            await self._tasks[0]  # unread, its stderr would keep it from its end
            await kill_process(self._process)
            self._process = None

    def _master_argv(self) -> list[str]:
        if self.address.local:
            return ["sh", "-c", payload.remote_command(sys.executable)]
        return [
            *ssh.base_argv(self._options),
            *ssh.policy(self.known, self._options, interactive=self._interactive, ciphers=self._ciphers),
            *(
                "-o",
                "ControlMaster=yes",
                "-o",
                f"ControlPath={ssh.quoted(self._control)}",
                "-o",
                "ControlPersist=no",
                "-T",
            ),
            *self.address.argv(),
            payload.remote_command(),
        ]

    def session_argv(self, command: str) -> list[str]:
        """What runs a shell command on the host over the connection that stands, and never over another one."""
        if self.address.local:
            return ["sh", "-c", command]
        return [*self._mux_argv(), "-T", "--", "host", command]

    def _mux_argv(self) -> list[str]:
        # The connection knows its options; the user's configuration would only add forwardings of its own.
        return [
            "ssh",
            "-F",
            "/dev/null",
            "-o",
            "ProxyCommand=exit 255",
            "-o",
            f"ControlPath={ssh.quoted(self._control)}",
        ]

    def agent_command(self) -> str:
        """The shell command that loads an agent on this host."""
        return payload.remote_command(sys.executable if self.address.local else "python3")

    async def _start_agent(self) -> None:
        self._stderr.clear()
        self._lost = None
        process = await spawn(
            *deaf(self._master_argv()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        errors = asyncio.create_task(self._collect_stderr(process))
        try:
            process.stdin.write(payload.preamble().encode() + payload.package())
            process.stdin.write(wire.pack_frame({"mode": "control"}))
            await read_marker(process.stdout, None if self._interactive else _READY_SECONDS)
        except (EOFError, OSError, TimeoutError, wire.ProtocolError) as error:
            await end_process(process)
            await errors
            await kill_process(process)
            raise self._start_failure(process.returncode, error) from error
        except BaseException:
            await stop_process(process)
            await errors
            raise
        self._process = process
        self._tasks = [
            errors,
            asyncio.create_task(self._read_answers(process)),
            asyncio.create_task(self._ping(process.stdin)),
        ]

    def _start_failure(self, status: int | None, error: Exception) -> KvmCloneError:
        if isinstance(error, TimeoutError):
            self._stderr.append(f"no agent was ready within {_READY_SECONDS:.0f} s of the login's start")
        elif isinstance(error, wire.ProtocolError):  # says more than what the login prints
            self._stderr.append(str(error))
        said = self._said()
        if status in (126, 127) or "python3: not found" in said or "python3: command not found" in said:
            return RefusedError(
                f"{self.name} has no python3",
                subject=self.name,
                remedy="install python3 (3.9 or newer) there",
            )
        ours = [line.partition(_OURS)[2] for line in self._stderr if _OURS in line]
        if ours:
            remedy = REMEDIES[kinds.LIMIT] if "cannot run here" in ours[0] or "limits" in ours[0] else ""
            return RefusedError(f"{self.name}: {ours[0]}", subject=self.name, remedy=remedy)
        return ssh.failure(self.name, said or str(error), status)

    def _said(self) -> str:
        return "\n".join(self._stderr)

    async def _collect_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in lines_of(process.stderr):
            self._stderr.append(line)
            log.debug("%s: %s", self.name, line)

    async def _read_answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while (frame := await read_any(process.stdout)) is not None:
                if isinstance(frame, wire.ChannelData):
                    self._receive(frame)
                else:
                    self._take(frame)
        except wire.ProtocolError as error:
            self._stderr.append(f"the agent there does not keep to the protocol: {error}")
        except (EOFError, OSError) as error:
            log.debug("%s: %s", self.name, error)
        await asyncio.sleep(0.1)  # ssh's last words come over another pipe
        said = self._said().strip().splitlines()
        self._lost = InterruptedTransferError(
            f"the connection to {self.name} was lost" + (f": {said[-1]}" if said else ""),
            subject=self.name,
            remedy="run the command again",
        )
        for future, _ in self._calls.values():
            if not future.done():
                future.set_exception(self._lost)
        self._calls.clear()
        for tunnel in self._tunnels.values():
            tunnel.receive(b"")

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

    async def _ping(self, stdin: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            with contextlib.suppress(OSError):
                stdin.write(wire.pack_frame({"id": 0, "call": "ping"}))

    @property
    def lost(self) -> bool:
        """Whether the agent is gone."""
        return self._process is None or self._lost is not None

    async def wait_lost(self) -> None:
        """Return never; raise TransferError when the agent is gone."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            raise self._lost
        number = -1 - len(self._calls) - random.getrandbits(30)
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
        assert self._process is not None
        assert self._process.stdin is not None
        number = random.getrandbits(48) + 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            frame = wire.pack_frame({"id": number, "call": name, "args": arguments})
        except wire.ProtocolError as error:
            raise AgentCallError(kinds.PROTOCOL, f"{name} cannot be asked for: {error}", self.name) from error
        self._calls[number] = (future, progress)
        self._process.stdin.write(frame)
        return await future

    async def libvirt_uri(self, *, fenced: bool = False) -> str:
        """A URI by which libvirt on this machine reaches the host's, through the agent.

        `fenced`: it carries requests only while the agent holds an operation's lock, and ends with that. Raises
        ConnectError when the host's libvirt does not listen, TransferError.
        """
        try:
            channel = await self.agent.relay(fenced=fenced)
        except AgentCallError as error:
            if error.kind != kinds.MISSING:
                raise
            remedy = "start libvirtd (or virtqemud) there: systemctl start libvirtd"
            raise ConnectError(str(error), subject=self.name, remedy=remedy) from error
        tunnel = Tunnel(self._control.with_suffix(f".{channel}"), lambda data: self._put_channel(channel, data))
        self._tunnels[channel] = tunnel
        await tunnel.open()
        return f"qemu+unix:///system?socket={quote(str(tunnel.path))}"

    def _put_channel(self, channel: int, data: bytes) -> None:
        if self._process is not None and self._process.stdin is not None and self._lost is None:
            with contextlib.suppress(OSError):  # the agent is gone, which its answers' end shows
                self._process.stdin.write(wire.pack_channel(channel, data))


async def once_free(call: Callable[[], Awaitable[_Answer]], *, patience: float) -> _Answer:
    """Make a call, again and again for `patience` seconds while another process holds the operation's lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await call()
        except LockedError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(1.0)


async def read_marker(stream: asyncio.StreamReader, seconds: float | None) -> str:
    """Skip noise up to the agent's marker; what it says of itself. Raises EOFError, TimeoutError, ProtocolError."""
    line = await read_past_noise(stream, wire.MARKER, seconds)
    return _checked(line[len(wire.MARKER) :].decode(errors="replace").strip())


def _checked(identity: str) -> str:
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
