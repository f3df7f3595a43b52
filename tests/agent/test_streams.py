"""The data path's processes: logins that print into it, ends that lie, stop or vanish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.wire import NOISE_LIMIT, pack_channel
from kvm_clone.errors import InterruptedTransferError, TransferError
from kvm_clone.hosts import payload
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.ssh import SshOptions, parse_address
from kvm_clone.hosts.ssh_connection import SshConnection
from kvm_clone.image import Image
from kvm_clone.options import Route, TransferOptions
from kvm_clone.transfer import transport
from kvm_clone.transfer.transport import Job, Orders, Stream

from .test_lies import altered
from .tools import MIB, eventually, make_raw, noise, processes

pytestmark = pytest.mark.timeout(90)


@contextlib.asynccontextmanager
async def stream(directory: Path) -> AsyncIterator[tuple[Stream, Orders]]:
    """A relayed stream within this machine, and an order for it."""
    size = 4 * MIB
    source = Image(str(make_raw(directory / "from", size, [(0, noise(size))])), "raw")
    staged = Image(str(make_raw(directory / "to", size)), "raw")
    host = Host(parse_address("localhost"), SshOptions(), directory, interactive=False)
    async with transport.opened(host, host, Route.RELAY) as opened:
        yield opened, Orders("", [Job(source, staged)], TransferOptions(parallel=1))


async def copy(directory: Path) -> list[list[int]]:
    heard: list[list[int]] = []
    async with stream(directory) as (opened, orders):
        await opened.run(orders, heard.append, lambda _: None)
    return heard


def test_a_stream_within_this_machine(tmp_path: Path) -> None:
    assert asyncio.run(copy(tmp_path))[-1] == [4 * MIB]
    assert (tmp_path / "to").read_bytes() == noise(4 * MIB)
    assert not processes(str(tmp_path))


Login = Callable[[str, int], None]


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> Login:
    """Makes the n-th session's login run a command first: the sender's is 0, the receiver's 1."""

    def run_first(command: str, number: int) -> None:
        sessions = iter(range(10))
        agent = payload.remote_command()
        monkeypatch.setattr(
            SshConnection,
            "agent_command",
            lambda _: f"{command if next(sessions) == number else ''}\n{agent}",
        )

    return run_first


SURVIVED = {
    "lines": f"yes banner | head -c {NOISE_LIMIT - 1000}",
    "one line": "head -c 100000 /dev/zero | tr '\\0' x",
    "much on stderr": "yes banner | head -c 3000000 >&2",
    "a line without end on stderr": "head -c 3000000 /dev/zero >&2",
}


@pytest.mark.parametrize("end", [0, 1], ids=["sender", "receiver"])
@pytest.mark.parametrize("name", SURVIVED)
def test_a_login_that_prints(name: str, end: int, login: Login, tmp_path: Path) -> None:
    login(SURVIVED[name], end)
    assert asyncio.run(copy(tmp_path))[-1] == [4 * MIB]
    assert (tmp_path / "to").read_bytes() == noise(4 * MIB)


TOO_MUCH = {
    "2 MB": ("yes banner | head -c 2000000", "prints without end"),
    "without end": ("yes banner", "prints without end"),
    "without end or line": ("echo welcome >&2; cat /dev/zero", "prints without end"),
    "its last words": ("echo no room here >&2; exit 7", "no room here"),
}


@pytest.mark.parametrize("end", [0, 1], ids=["sender", "receiver"])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_login_that_prints_without_end(name: str, end: int, login: Login, tmp_path: Path) -> None:
    command, said = TOO_MUCH[name]
    login(command, end)
    begun = time.monotonic()
    with pytest.raises(InterruptedTransferError, match=f"could not be set up: .*{said}"):
        asyncio.run(copy(tmp_path))
    assert time.monotonic() - begun < 10
    assert not processes(str(tmp_path))


@pytest.mark.parametrize("end", [0, 1], ids=["sender", "receiver"])
def test_a_login_that_says_nothing(end: int, login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "START_SECONDS", 1.0)
    monkeypatch.setattr(transport, "_END_SECONDS", 1.0)
    login("exec sleep 77", end)
    begun = time.monotonic()
    with pytest.raises(InterruptedTransferError, match="could not be set up"):
        asyncio.run(copy(tmp_path))
    assert time.monotonic() - begun < 15


def test_a_pipe_that_takes_little(login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver does not read itself out of it: what is written must not wait for ever."""
    monkeypatch.setattr(transport, "START_SECONDS", 1.0)
    monkeypatch.setattr(transport, "enlarge_pipe", lambda _: None)
    content = altered("wire", "#" * (1 << 17))
    monkeypatch.setattr(payload, "package", lambda: content)
    login("exec sleep 77", 1)
    begun = time.monotonic()
    with pytest.raises(InterruptedTransferError, match="could not be set up"):
        asyncio.run(copy(tmp_path))
    assert time.monotonic() - begun < 15


def test_what_prints_behind_the_marker_is_noticed(login: Login, tmp_path: Path) -> None:
    ready, said = tmp_path / "ready", tmp_path / "said"
    login(f"(until [ -e {ready} ]; do sleep 0.05; done; echo late; : > {said}) &", 0)

    async def run() -> None:
        async with stream(tmp_path) as (opened, orders):
            ready.touch()
            assert await asyncio.to_thread(eventually, said.exists)
            await opened.run(orders, lambda _: None, lambda _: None)

    with pytest.raises(TransferError):
        asyncio.run(run())


LIES = {
    "amounts of other disks": "\ndef run(self): self._report([1, 2])\nReceiver.run = run\n",
    "no amounts": "\ndef run(self): self._report('much')\nReceiver.run = run\n",
    "negative amounts": "\ndef run(self): self._durable([-1])\nReceiver.run = run\n",
    "flags for amounts": "\ndef run(self): self._durable([True])\nReceiver.run = run\n",
}

RAW = {
    "a length of 4 GiB": b"\xff" * 4,
    "text": b"Last login: today\n",
    "a list": b"\0\0\0\2[]",
    "a channel's bytes": pack_channel(1, b"x"),
    "an error that is none": b'\0\0\0\x0c{"error": 5 }',
}


def assert_lie(directory: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(AgentCallError, match="the data stream: ") as caught:
        asyncio.run(copy(directory))
    assert caught.value.kind == errors.PROTOCOL
    assert not caught.value.interrupted
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("name", LIES)
def test_a_receiver_that_lies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = altered("transfer", LIES[name])
    monkeypatch.setattr(payload, "package", lambda: content)
    assert_lie(tmp_path)


@pytest.mark.parametrize("name", RAW)
def test_a_receiver_that_says_what_is_no_frame(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = altered(
        "__main__",
        f"\ndef _receive(request, out):\n    write_all(out, {RAW[name]!r})\n    time.sleep(60)\n",
    )
    monkeypatch.setattr(payload, "package", lambda: content)
    assert_lie(tmp_path)


ENDS = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half a frame": b"\0\0\0\x20{",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_receiver_that_stops_in_the_middle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = altered(
        "__main__", f"\ndef _receive(request, out):\n    write_all(out, {ENDS[name]!r})\n    os._exit(1)\n"
    )
    monkeypatch.setattr(payload, "package", lambda: content)
    with pytest.raises(InterruptedTransferError):
        asyncio.run(copy(tmp_path))


def test_a_receiver_that_is_gone_before_it_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        async with stream(tmp_path) as (opened, orders):
            assert opened._receiver is not None
            os.kill(opened._receiver.process.pid, 9)
            await opened._receiver.process.wait()
            await opened.run(orders, lambda _: None, lambda _: None)

    with pytest.raises(InterruptedTransferError):
        asyncio.run(run())


def test_a_callers_own_error_is_its_own(tmp_path: Path) -> None:
    def hear(_: list[int]) -> None:
        raise BrokenPipeError("of the caller's")

    async def run() -> None:
        async with stream(tmp_path) as (opened, orders):
            await opened.run(orders, hear, lambda _: None)

    with pytest.raises(BrokenPipeError, match="of the caller's"):
        asyncio.run(run())
