"""The data path: a sender on the source, a receiver on the destination, and one pipe between them.

Direct: the source's agent runs ssh to the destination, whose answers come back through the source's output.
Relay: the controller reaches both agents, and a pipe joins the output of one to the input of the other.
In both the controller reads the receiver's frames, and gives both agents their orders once they are ready. They can be
set up while the comparison is still finding out what there is to send.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.protocol import wire
from kvm_clone.agent.protocol.stream import enlarge_pipe
from kvm_clone.errors import InterruptedTransferError, TransferError
from kvm_clone.gather import undisturbed
from kvm_clone.hosts import payload
from kvm_clone.hosts.agent_errors import call_error
from kvm_clone.hosts.children import deaf, end_process, kill_process, spawn
from kvm_clone.hosts.frames import START_SECONDS, read_frame, read_marker
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.survey import direct_ssh
from kvm_clone.image import Image
from kvm_clone.options import Route, TransferOptions

READY_SECONDS = 45.0
"""How long a stream may be kept ready before it is used: less than its agents' patience, agent.__main__."""

_END_SECONDS = 20.0
_STDERR_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Job:
    """One image's content to send: see agent.transfer.Job.

    `fresh`: the staged image is known to read as zeros. `ranges`: what to send, None for everything. `durable`: the
    ranges that are durable already.
    """

    source: Image
    staged: Image
    fresh: bool = True
    ranges: tuple[tuple[int, int], ...] | None = None
    durable: tuple[tuple[int, int], ...] = ()

    def sending(self) -> dict[str, Any]:
        """Return the sender's part of the job, as its agent takes it."""
        ranges = None if self.ranges is None else [list(pair) for pair in self.ranges]
        return {"path": self.source.path, "format": self.source.format, "fresh": self.fresh, "ranges": ranges}

    def receiving(self) -> dict[str, Any]:
        """Return the receiver's part of the job, as its agent takes it."""
        durable = [list(pair) for pair in self.durable]
        return {"path": self.staged.path, "format": self.staged.format, "durable": durable}


OnBytes = Callable[[list[int]], None]
"""Receives a number of bytes for each job, in the jobs' order."""

OnDurable = Callable[[list[list[list[int]] | None]], None]
"""Hears which ranges of each job's disk are durable, in the jobs' order; None where nothing is new."""


@dataclass(frozen=True)
class Orders:
    """What a stream moves, and how.

    `vm`: the destination VM. The receiver ends when the agent of the VM's operation ends.
    """

    vm: str
    jobs: Sequence[Job]
    options: TransferOptions


class Stream:
    """A sender and a receiver that are ready, and the pipe between them. It carries out one order."""

    def __init__(
        self, sender: _Child, receiver: _Child | None, answers: asyncio.StreamReader, into: int | None = None
    ) -> None:
        """`into`: our end of the pipe to the receiver, for its request; None where the sender forwards that."""
        self._sender = sender
        self._receiver = receiver
        self._answers = answers
        self._into = into
        self._since = time.monotonic()

    @property
    def fresh(self) -> bool:
        """Whether the agents still wait for orders."""
        return time.monotonic() - self._since < READY_SECONDS and self._sender.process.returncode is None

    async def run(self, orders: Orders, on_written: OnBytes, on_durable: OnDurable) -> None:
        """Copy every disk; returns when all content is durable at the destination.

        `on_written` receives how much was written to each disk, `on_durable` which ranges of each are durable.
        Raises TransferError and its kinds, which name the host that failed.
        """
        receive = {"mode": "receive", "vm": orders.vm, "jobs": [job.receiving() for job in orders.jobs]}
        how = {"parallel": orders.options.parallel, "bandwidth_limit": orders.options.bandwidth_limit}
        send = {"jobs": [job.sending() for job in orders.jobs], **how}
        done, error = False, None
        try:
            order = wire.pack_frame({"go": True, "receive": receive, **send})
            if await self._tell_receiver(wire.pack_frame(receive)):
                self._sender.write(order)
                done, error = await self._hear(len(orders.jobs), on_written, on_durable)
        except wire.ProtocolError as broken:
            error = {"kind": kinds.PROTOCOL, "message": f"the data stream: {broken}"}
        await self._raise_failure(done, error)

    async def _tell_receiver(self, request: bytes) -> bool:
        """Whether the receiver has its request, or gets it from the sender; False when the receiver has ended."""
        try:
            if self._into is not None:
                await asyncio.to_thread(wire.write_all, self._into, request)
        except BrokenPipeError:
            return False
        self.close_pipe()
        return True

    async def _hear(self, count: int, on_written: OnBytes, on_durable: OnDurable) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the receiver is done, and the error that it reported. Raises ProtocolError."""
        while (frame := await self._answer()) is not None:
            if "written" in frame:
                on_written(_amounts(frame["written"], count))
            if "durable" in frame:
                on_durable(_durable(frame["durable"], count))
            if "error" in frame:
                return False, _error(frame["error"])
            if frame.get("done") is True:
                return True, None
        return False, None

    async def _answer(self) -> dict[str, Any] | None:
        """Return the receiver's next frame; None when it has ended: the children's stderr says why."""
        try:
            return await read_frame(self._answers)
        except (EOFError, OSError):
            return None

    def close_pipe(self) -> None:
        """Close our end of the pipe to the receiver, so that it reads its end when the sender closes the other one."""
        if self._into is not None:
            os.close(self._into)
            self._into = None

    async def _raise_failure(self, done: bool, error: dict[str, Any] | None) -> None:
        """Raise the first failure, if there is one. A process that only lost its peer is not the cause."""
        if error is not None and error.get("kind") != kinds.INTERRUPTED:
            raise call_error(error, (self._receiver or self._sender).destination)
        children = [child for child in (self._sender, self._receiver) if child is not None]
        statuses = [await child.end(willing=done) for child in children]
        if done and not any(statuses):
            return
        said = self._sender.said or (self._receiver.said if self._receiver else "")
        said = said or (error or {}).get("message", "") or "the stream broke off"
        raise InterruptedTransferError(
            f"the copy was interrupted: {said}", subject=self._sender.host, remedy="run the command again"
        )


def _amounts(said: Any, count: int) -> list[int]:
    """Return the bytes for each job. Raises ProtocolError when the answer is anything else."""
    if not isinstance(said, list) or len(said) != count or not all(type(one) is int and one >= 0 for one in said):
        raise wire.ProtocolError(f"no amounts for {count} disks: {str(said)[:200]}")
    return said


def _durable(said: Any, count: int) -> list[list[list[int]] | None]:
    """Ranges for each job, None where nothing is new. Raises ProtocolError when it is anything else."""
    if not isinstance(said, list) or len(said) != count or not all(one is None or _are_ranges(one) for one in said):
        raise wire.ProtocolError(f"no ranges for {count} disks: {str(said)[:200]}")
    return said


def _are_ranges(said: Any) -> bool:
    if not isinstance(said, list) or not all(isinstance(one, list) and len(one) == 2 for one in said):
        return False
    ends = [end for one in said for end in one]
    return all(type(end) is int and end >= 0 for end in ends) and all(a < b for a, b in itertools.pairwise(ends))


def _error(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise wire.ProtocolError(f"an error that is none: {str(said)[:200]}")
    return said


class _Child:
    """A child process, with the end of its stderr."""

    def __init__(self, process: asyncio.subprocess.Process, host: str, destination: str) -> None:
        self.process = process
        self.host = host
        self.destination = destination
        self._stderr = b""
        self.reader = asyncio.create_task(self._read_stderr())

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        while part := await self.process.stderr.read(4096):
            self._stderr = (self._stderr + part)[-_STDERR_LIMIT:]

    @property
    def said(self) -> str:
        """The error that the agent reported, else the last line of ssh."""
        lines = [line.strip() for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        ours = [line.removeprefix("kvm-clone: ") for line in lines if line.startswith("kvm-clone: ")]
        # The first line of an agent is the cause: one that comes later only lost its peer.
        if ours:
            return f"{self.host}: {ours[0]}"
        return f"{self.host}: {lines[-1]}" if lines else ""

    def write(self, data: bytes) -> None:
        """Write to the child's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    async def end(self, *, willing: bool) -> int:
        """Wait for the child's end and return its exit status.

        `willing`: the child is about to end by itself. Any other is made to end, and so is one that takes too long.
        """
        if willing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await self.process.wait()
        await end_process(self.process, patience=_END_SECONDS)
        await self.reader
        return self.process.returncode or 0

    async def kill(self) -> None:
        """End the child now."""
        await undisturbed(_killed([self]))


async def _killed(children: Sequence[_Child]) -> None:
    await kill_process(*(child.process for child in children))
    await asyncio.gather(*(child.reader for child in children))


async def _spawn(argv: list[str], host: str, destination: str, stdin: int, stdout: int) -> _Child:
    process = await spawn(*deaf(argv), stdin=stdin, stdout=stdout, stderr=asyncio.subprocess.PIPE)
    return _Child(process, host, destination)


def _start(request: dict[str, Any]) -> bytes:
    """Return what an agent reads first: its own code and its request."""
    return payload.preamble().encode() + payload.package() + wire.pack_frame(request)


def opened(source: Host, destination: Host, route: Route) -> contextlib.AbstractAsyncContextManager[Stream]:
    """Return a context manager: a stream between the hosts that is ready. Raises TransferError and its kinds."""
    return _direct(source, destination) if route is Route.DIRECT else _relay(source, destination)


@contextlib.asynccontextmanager
async def _direct(source: Host, destination: Host) -> AsyncIterator[Stream]:
    argv, known_hosts = await direct_ssh(destination)
    send = {
        "mode": "send",
        "ssh": argv,
        "known_hosts": known_hosts,
        "command": payload.remote_command(),
        "preamble": payload.preamble(),
    }
    sender = await _spawn(
        source.ssh.session_argv(source.ssh.agent_command()), source.name, destination.name, asyncio.subprocess.PIPE,
        asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        sender.write(_start(send))
        assert sender.process.stdout is not None
        for _ in ("the sender", "the receiver behind it"):
            await _ready(sender, sender.process.stdout)
        yield Stream(sender, None, sender.process.stdout)
    finally:
        await sender.kill()


async def _ready(child: _Child, stream: asyncio.StreamReader) -> None:
    try:
        await read_marker(stream, START_SECONDS)
    except (EOFError, OSError, TimeoutError, wire.ProtocolError) as error:
        raise await _not_ready(child, error) from error


async def _write_code(receiver: _Child, into: int) -> None:
    """Write the receiver's code into its pipe. That may block: not everywhere can a pipe be enlarged to hold it all."""
    package = payload.preamble().encode() + payload.package()
    writing = asyncio.create_task(asyncio.to_thread(wire.write_all, into, package))
    try:
        async with asyncio.timeout(START_SECONDS):
            await asyncio.shield(writing)
    except (OSError, TimeoutError, asyncio.CancelledError) as error:
        await receiver.kill()  # this ends the writing: the pipe has no other reader
        await asyncio.gather(writing, return_exceptions=True)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise await _not_ready(receiver, error) from error


async def _not_ready(child: _Child, error: Exception) -> TransferError:
    """End the child, and return the error that says why it did not get ready."""
    await (child.end(willing=False) if isinstance(error, EOFError) else child.kill())
    reason = str(error) if isinstance(error, wire.ProtocolError) else child.said or error or type(error).__name__
    text = f"the data stream could not be set up: {reason}"
    return InterruptedTransferError(text, subject=child.host, remedy="run the command again")


@contextlib.asynccontextmanager
async def _relay(source: Host, destination: Host) -> AsyncIterator[Stream]:
    children: list[_Child] = []
    stream: Stream | None = None
    out, into = os.pipe()
    try:
        enlarge_pipe(into)
        sender = await _spawn(
            source.ssh.session_argv(source.ssh.agent_command()),
            source.name,
            destination.name,
            asyncio.subprocess.PIPE,
            into,
        )
        children.append(sender)
        os.close(into)
        into = -1
        sender.write(_start({"mode": "send"}))
        await _pipe_ready(sender, out)
        # The receiver reads its code and its request from the same pipe, before the sender's records.
        into = os.open(f"/proc/self/fd/{out}", os.O_WRONLY | os.O_CLOEXEC)
        receiver = await _spawn(
            destination.ssh.session_argv(destination.ssh.agent_command()), destination.name, destination.name, out,
            asyncio.subprocess.PIPE,
        )  # fmt: skip
        children.append(receiver)
        os.close(out)
        out = -1
        await _write_code(receiver, into)
        assert receiver.process.stdout is not None
        await _ready(receiver, receiver.process.stdout)
        stream = Stream(sender, receiver, receiver.process.stdout, into)
        into = -1
        yield stream
    finally:
        try:
            await undisturbed(_killed(children))  # before the pipe is closed, which a thread may still be using
        finally:
            for descriptor in (out, into):
                if descriptor >= 0:
                    os.close(descriptor)
            if stream is not None:
                stream.close_pipe()


async def _pipe_ready(sender: _Child, out: int) -> None:
    """Wait for the marker in a pipe that another process reads from afterwards."""
    try:
        async with asyncio.timeout(START_SECONDS):
            await _take_marker(out)
    except (EOFError, OSError, TimeoutError, wire.ProtocolError) as error:
        raise await _not_ready(sender, error) from error


async def _take_marker(out: int) -> None:
    """Skip what a login prints, up to the marker. After it a sender writes nothing before it has its orders.

    Raises EOFError, ProtocolError.
    """
    marker = wire.MARKER + payload.identity().encode()
    skipped, rest = 0, b""
    while skipped <= wire.NOISE_LIMIT:
        await _readable(out)
        part = os.read(out, 1 << 16)
        if not part:
            raise EOFError("the connection ended before the agent was ready")
        skipped += len(part)
        *lines, rest = (rest + part).split(b"\n")
        if marker in lines:
            if lines[-1] != marker or rest:
                raise wire.ProtocolError("something prints into the data stream, behind the agent's marker")
            return
    raise wire.ProtocolError("the login prints without end instead of running the agent")


async def _readable(descriptor: int) -> None:
    """Wait until the descriptor is readable, as the kernel reports after the last read."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
