"""Controllers and agents whose other side says what it cannot, too much, or stops in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import server
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.wire import CHANNEL_BIT, CHUNK, FRAME_LIMIT, pack_channel, pack_frame
from kvm_clone.errors import InterruptedTransferError, KvmCloneError, TransferError
from kvm_clone.hosts import outputs, payload
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.ssh import SshOptions, parse_address

from .test_loader import IMPATIENT, WHOLE, agent
from .tools import arriving, ending, need, python

pytestmark = [pytest.mark.timeout(60), pytest.mark.sampled]


def altered(module: str, text: str) -> bytes:
    """The agent's package with `text` at the end of one of its modules."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.package())) as package, zipfile.ZipFile(buffer, "w") as archive:
        for name in package.namelist():
            added = text.encode() if name.endswith(f"/{module}.py") else b""
            if not name.endswith(f"/{module}.pyc"):
                archive.writestr(name, package.read(name) + added)
    return buffer.getvalue()


@contextlib.asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[Host]:
    """This machine as a host, with its agent; it is to end soon, whatever was said, and to leave no process."""
    host = Host(parse_address("localhost"), SshOptions(), directory, interactive=False)
    await host.connect()
    assert host.ssh._process is not None
    agent = host.ssh._process.pid
    try:
        yield host
    finally:
        begun = time.monotonic()
        await host.close()
        assert time.monotonic() - begun < 12
    assert not Path(f"/proc/{agent}").exists()


@pytest.fixture
def travelling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes another package travel as the agent."""

    def change(module: str, text: str) -> None:
        content = altered(module, text)
        monkeypatch.setattr(payload, "package", lambda: content)

    return change


LONG = "x" * (FRAME_LIMIT + 1)


def test_an_answer_that_is_too_large_is_an_error(travelling: Any, tmp_path: Path) -> None:
    travelling("host_info", f"\n\ndef host():\n    return 'x' * {FRAME_LIMIT}\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            begun = time.monotonic()
            with pytest.raises(AgentCallError, match="localhost: the answer to host: a message of") as caught:
                await host.link.call("host")
            assert caught.value.kind == errors.PROTOCOL
            assert time.monotonic() - begun < 20
            assert await host.link.call("exists", path=str(tmp_path)) is True

    asyncio.run(run())


def test_a_call_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(tmp_path) as host:
            for question in (LONG, [float("nan")]):
                with pytest.raises(AgentCallError, match="localhost: exists cannot be asked for: a message") as caught:
                    await host.link.call("exists", path=question)
                assert caught.value.kind == errors.PROTOCOL
                assert isinstance(caught.value, TransferError)
            assert not host.link._calls
            assert await host.link.call("exists", path=str(tmp_path)) is True

    asyncio.run(run())


def test_an_error_without_end_arrives_cut(travelling: Any, tmp_path: Path) -> None:
    travelling("host_info", f"\n\ndef host():\n    raise OSError(5, 'x' * {FRAME_LIMIT})\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(AgentCallError) as caught:
                await host.link.call("host")
            assert 1000 < len(str(caught.value)) < 100_000

    asyncio.run(run())


LIAR = """

def _lie(self):
    number = read_any(self._source)["id"]
    write_all(self._out, {before!r})
    {then}
    while os.read(self._source, 65536):
        pass

Server.serve = _lie
"""

NESTED = b"[" * 100_000

LIES: dict[str, tuple[bytes, str]] = {
    "a length of 4 GiB": (b"\xff" * 4, ""),
    "a length of 2 GiB": (b"\x7f\xff\xff\xff", ""),
    "a length just too large": (struct.pack(">I", FRAME_LIMIT + 1) + b"x" * 100, ""),
    "a length cut off": (b"\0\0", "os._exit(0)"),
    "a body cut off": (pack_frame({"id": 1})[:-1], "os._exit(0)"),
    "a body of nothing": (b"\0\0\0\0", ""),
    "nested deep": (struct.pack(">I", len(NESTED)) + NESTED, ""),
    "not JSON": (b"\0\0\0\4oops", ""),
    "not an object": (b"\0\0\0\2[]", ""),
    "NaN": (b"\0\0\0\x08{\"a\":NaN", ""),
    "a channel without a number": (b"\x80\0\0\3abc", ""),
    "too much of a channel": (struct.pack(">I", CHANNEL_BIT | (4 + CHUNK + 1)) + bytes(100), ""),
    "a channel's bytes cut off": (pack_channel(1, b"xyz")[:-1], "os._exit(0)"),
    "no number": (pack_frame({"ok": 1}), ""),
    "a list for a number": (pack_frame({"id": [1], "ok": 1}), ""),
    "a flag for a number": (pack_frame({"id": True, "ok": 1}), ""),
    "a number for an error": (b"", "self._write(pack_frame({'id': number, 'error': 5}))"),
    "a number for progress": (b"", "self._write(pack_frame({'id': number, 'progress': 5}))"),
    "a flood": (b"", "[write_all(self._out, bytes(1 << 20)) for _ in range(1000)]"),
    "noise": (b"", "[write_all(self._out, b'word ' * 200_000) for _ in range(100)]"),
    "the end": (b"", "os._exit(0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_an_agent_that_lies_is_lost(name: str, travelling: Any, tmp_path: Path) -> None:
    before, then = LIES[name]
    travelling("server", LIAR.format(before=before, then=then))

    async def run() -> KvmCloneError:
        async with connected(tmp_path) as host:
            with pytest.raises(InterruptedTransferError, match="the connection to localhost was lost") as caught:
                await asyncio.wait_for(host.link.call("host"), 20)
            assert host.link.lost
            with pytest.raises(InterruptedTransferError):
                await host.link.call("host")
            return caught.value

    error = asyncio.run(run())
    assert len(str(error)) < 1000
    if then != "os._exit(0)":
        assert "does not keep to the protocol" in str(error)
    assert error.remedy


def test_the_bytes_of_a_channel_that_is_not_open_are_nobodys(travelling: Any, tmp_path: Path) -> None:
    """A daemon may be gone, and its end be told, before the controller knows the channel's number."""
    told = "self._write(pack_frame({'id': number, 'ok': 5}))"
    travelling("server", LIAR.format(before=pack_channel(1, b"x") + pack_channel(1, b""), then=told))

    async def run() -> None:
        async with connected(tmp_path) as host:
            assert await asyncio.wait_for(host.link.call("host"), 20) == 5
            assert not host.link.lost

    asyncio.run(run())


def test_an_error_of_a_kind_that_is_none(travelling: Any, tmp_path: Path) -> None:
    travelling("server", LIAR.format(before=b"", then="self._write(pack_frame({'id': number, 'error': {'kind': []}}))"))

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(KvmCloneError, match="no reason given"):
                await host.link.call("host")

    asyncio.run(run())


def test_an_agent_that_cannot_even_answer_ends(travelling: Any, tmp_path: Path) -> None:
    """The controller must not wait for ever."""
    travelling("server", "\n\ndef pack_frame(message):\n    raise MemoryError\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(InterruptedTransferError, match="no answer could be given: MemoryError"):
                await asyncio.wait_for(host.link.call("host"), 20)

    asyncio.run(run())


GO = {"go": True, "jobs": [], "parallel": 1, "bandwidth_limit": 0}

BAD_REQUESTS: dict[str, list[dict[str, Any]]] = {
    "no jobs": [{"mode": "receive"}],
    "jobs that are none": [{"mode": "receive", "jobs": [{"nonsense": 1}]}],
    "a number for jobs": [{"mode": "receive", "jobs": 5}],
    "nothing to send": [{"mode": "send"}, {"go": True}],
    "jobs that are none to send": [{"mode": "send"}, {**GO, "jobs": ["x"]}],
    "a receiver by half": [{"mode": "send", "ssh": ["ssh"]}, GO],
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_request_that_cannot_be_understood(name: str) -> None:
    with agent("argv", WHOLE, *BAD_REQUESTS[name]) as running:
        running.process.wait(20)
        status, said = running.end()
    assert status == 3
    assert said.startswith("kvm-clone: ")
    assert said.count("\n") == 1


def test_a_sender_whose_ssh_fails_leaves_it_the_last_word() -> None:
    need("ssh")
    ssh = ["ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-p", "1", "--", "127.0.0.1"]
    request = {"mode": "send", "ssh": ssh, "known_hosts": "", "command": "x", "preamble": payload.preamble()}
    with agent("argv", WHOLE, request) as running:
        running.ready()
        time.sleep(1)
        status, said = running.end()
    assert status == 3
    assert said.startswith("ssh: connect to host 127.0.0.1 port 1")
    assert said.count("\n") == 1


MIDDLES = {"in a length": b"\0\0", "behind a length": b"\0\0\0\x20", "in a body": pack_frame({"id": 1})[:-1]}


CHANNEL = pack_channel(1, b"xyz")
CHANNEL_MIDDLES = {
    "in a channel's length": CHANNEL[:1],
    "behind a channel's length": CHANNEL[:4],
    "in a channel's number": CHANNEL[:6],
    "behind a channel's number": CHANNEL[:8],
    "in a channel's bytes": CHANNEL[:-1],
}
BOTH_MIDDLES = {**MIDDLES, **CHANNEL_MIDDLES}


@pytest.mark.parametrize("name", BOTH_MIDDLES)
def test_an_agent_that_stops_in_the_middle_is_lost(
    name: str, travelling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_STEADY_SECONDS", 0.5)
    travelling("server", LIAR.format(before=BOTH_MIDDLES[name], then=""))

    async def run() -> None:
        async with connected(tmp_path) as host:
            await asyncio.sleep(1)  # between frames it may be silent
            with pytest.raises(InterruptedTransferError):
                await asyncio.wait_for(host.link.call("host"), 20)

    asyncio.run(run())


@pytest.mark.parametrize("name", BOTH_MIDDLES)
def test_a_controller_that_stops_in_the_middle_counts_as_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without power closes no connection."""
    monkeypatch.setattr(server, "SILENCE_SECONDS", 0.3)
    with arriving(pack_frame({"id": 0, "call": "ping"}) + BOTH_MIDDLES[name], then_silence=True) as source:
        out = os.open(os.devnull, os.O_WRONLY)
        begun = time.monotonic()
        server.Server(source, out).serve()
        assert time.monotonic() - begun < 5
        time.sleep(0.2)  # the answer's thread may be at it
        os.close(out)


@pytest.mark.parametrize("name", MIDDLES)
def test_a_request_that_stops_in_the_middle(name: str) -> None:
    with ending(python(IMPATIENT, stderr=subprocess.PIPE)) as running:
        assert running.stdin
        assert running.stderr
        running.stdin.write(MIDDLES[name])
        running.stdin.flush()
        assert running.wait(20) == 3
        assert b"said nothing" in running.stderr.read()


@pytest.mark.parametrize("cut", [0, 10, 72, 1000])
def test_a_package_that_stops_in_the_middle(cut: int) -> None:
    loader = payload.loader().replace("alarm(30)", "alarm(1)")
    argv = [sys.executable, "-I", "-c", f"import signal; signal.alarm(1)\n{loader}"]
    with ending(subprocess.Popen(argv, stdin=subprocess.PIPE)) as loading:
        assert loading.stdin
        loading.stdin.write(WHOLE[len(payload.loader()) :][:cut])
        loading.stdin.flush()
        assert loading.wait(20) == -signal.SIGALRM


@pytest.mark.parametrize("cut", [0, 10])
def test_a_loader_that_stops_in_the_middle(cut: int) -> None:
    command = payload.remote_command(sys.executable)
    assert "alarm(30)" in command
    with ending(subprocess.Popen(["sh", "-c", command.replace("alarm(30)", "alarm(1)")], stdin=subprocess.PIPE)) as one:
        assert one.stdin
        one.stdin.write(WHOLE[:cut])
        one.stdin.flush()
        assert one.wait(20) == -signal.SIGALRM


def test_a_package_that_comes_slowly_is_waited_for() -> None:
    """Whatever comes shows that the other end is there."""
    rest = WHOLE[len(payload.loader()) :]
    loader = payload.loader().replace("alarm(30)", "alarm(2)")
    argv = [sys.executable, "-I", "-c", f"import signal; signal.alarm(2)\n{loader}"]
    with ending(subprocess.Popen(argv, stdin=subprocess.PIPE)) as loading:
        assert loading.stdin
        for at in range(4):
            loading.stdin.write(rest[at * 1000 : (at + 1) * 1000])
            loading.stdin.flush()
            time.sleep(0.9)
        assert loading.poll() is None


def test_progress_that_its_hearer_does_not_bear_ends_the_call(travelling: Any, tmp_path: Path) -> None:
    travelling(
        "server",
        LIAR.format(
            before=b"",
            then="[self._write(pack_frame({'id': number, **what})) for what in ({'progress': {}}, {'ok': 1})]",
        ),
    )

    def hear(state: dict[str, Any]) -> None:
        raise LookupError(f"of the hearer's own: {state}")

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(LookupError, match="of the hearer's own"):
                await asyncio.wait_for(host.link.call("host", hear), 20)
            assert not host.link.lost

    asyncio.run(run())
