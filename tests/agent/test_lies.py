"""Controllers and agents whose other side says what it cannot, too much, or stops in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone import payload
from kvm_clone.agent import errors
from kvm_clone.agent.wire import FRAME_LIMIT, pack_channel, pack_frame
from kvm_clone.errors import InterruptedTransferError, KvmCloneError, TransferError
from kvm_clone.host import AgentCallError, Host
from kvm_clone.ssh import SshOptions, parse_address

from .test_loader import WHOLE, agent
from .tools import need

pytestmark = pytest.mark.timeout(60)


def altered(module: str, text: str) -> bytes:
    """The agent's package with `text` at the end of one of its modules."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.package())) as package, zipfile.ZipFile(buffer, "w") as archive:
        for name in package.namelist():
            added = text.encode() if name == f"kvm_clone/agent/{module}.py" else b""
            archive.writestr(name, package.read(name) + added)
    return buffer.getvalue()


@contextlib.asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[Host]:
    """This machine as a host, with its agent; it is to end soon, whatever was said, and to leave no process."""
    host = Host(parse_address("localhost"), SshOptions(), directory, interactive=False)
    await host.connect()
    assert host._process is not None
    agent = host._process.pid
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
    travelling("facts", f"\n\ndef host():\n    return 'x' * {FRAME_LIMIT}\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            begun = time.monotonic()
            with pytest.raises(AgentCallError, match="localhost: the answer to host: a message of") as caught:
                await host.call("host")
            assert caught.value.kind == errors.PROTOCOL
            assert time.monotonic() - begun < 20
            assert await host.call("exists", path=str(tmp_path)) is True

    asyncio.run(run())


def test_a_call_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(tmp_path) as host:
            for question in (LONG, [float("nan")]):
                with pytest.raises(AgentCallError, match="localhost: exists cannot be asked for: a message") as caught:
                    await host.call("exists", path=question)
                assert caught.value.kind == errors.PROTOCOL
                assert isinstance(caught.value, TransferError)
            assert not host._calls
            assert await host.call("exists", path=str(tmp_path)) is True

    asyncio.run(run())


def test_an_error_without_end_arrives_cut(travelling: Any, tmp_path: Path) -> None:
    travelling("facts", f"\n\ndef host():\n    raise OSError(5, 'x' * {FRAME_LIMIT})\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(AgentCallError) as caught:
                await host.call("host")
            assert 1000 < len(str(caught.value)) < 100_000

    asyncio.run(run())


LIAR = """

def _lie(self):
    number = read_frame(self._source)["id"]
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
    "the bytes of a channel": (pack_channel(1, b"x"), ""),
    "no number": (pack_frame({"ok": 1}), ""),
    "a list for a number": (pack_frame({"id": [1], "ok": 1}), ""),
    "a flag for a number": (pack_frame({"id": True, "ok": 1}), ""),
    "a number for an error": (b"", "self._write(pack_frame({'id': number, 'error': 5}))"),
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
                await asyncio.wait_for(host.call("host"), 20)
            assert host.lost
            with pytest.raises(InterruptedTransferError):
                await host.call("host")
            return caught.value

    error = asyncio.run(run())
    assert len(str(error)) < 1000
    if then != "os._exit(0)":
        assert "does not keep to the protocol" in str(error)
    assert error.remedy


def test_an_error_of_a_kind_that_is_none(travelling: Any, tmp_path: Path) -> None:
    travelling("server", LIAR.format(before=b"", then="self._write(pack_frame({'id': number, 'error': {'kind': []}}))"))

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(KvmCloneError, match="no reason given"):
                await host.call("host")

    asyncio.run(run())


def test_an_agent_that_cannot_even_answer_ends(travelling: Any, tmp_path: Path) -> None:
    """The controller must not wait for ever."""
    travelling("server", "\n\ndef pack_frame(message):\n    raise MemoryError\n")

    async def run() -> None:
        async with connected(tmp_path) as host:
            with pytest.raises(InterruptedTransferError, match="no answer could be given: MemoryError"):
                await asyncio.wait_for(host.call("host"), 20)

    asyncio.run(run())


GO = {"go": True, "jobs": [], "parallel": 1, "rate": 0}

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
