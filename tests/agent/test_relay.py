"""The stream to libvirt: what is asked under an operation's lock has ended before somebody else can have the lock."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.agent import names, relay
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.relay import Packets, Relay
from kvm_clone.agent.staging.hold import Hold
from kvm_clone.agent.staging.lock import OperationLock

from .tools import eventually

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]

CALL, REPLY, EVENT, CALL_WITH_FDS, REPLY_WITH_FDS = 0, 1, 2, 4, 5


def packet(kind: int, content: bytes = b"") -> bytes:
    """A packet of libvirt's RPC."""
    return struct.pack(">7I", 28 + len(content), 0x20008086, 1, 7, kind, 1, 0) + content


class Daemon:
    """Listens where libvirt would, and answers when it is told to."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self.connection = socket.socket()

    def accept(self) -> None:
        self.connection.close()
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(10)

    def close(self) -> None:
        self.connection.close()
        self._listener.close()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    running = Daemon(tmp_path)
    yield running
    running.close()


@pytest.fixture
def held() -> Iterator[Hold]:
    hold = Hold("web", {})
    yield hold
    hold.release()


Said = queue.Queue[bytes]


def connected(daemon: Daemon, hold: Hold | None = None) -> tuple[Relay, Said]:
    """A relay, and what the daemon says through it."""
    said: Said = queue.Queue()
    opened = Relay(["/nowhere/sock", daemon.path], said.put, hold)
    daemon.accept()
    return opened, said


def is_free() -> bool:
    try:
        OperationLock(names.lock_path("web"), {}).release()
    except AgentError:
        return False
    return True


@pytest.mark.parametrize("fenced", [False, True])
def test_both_ways_and_the_end(fenced: bool, daemon: Daemon, held: Hold) -> None:
    opened, said = connected(daemon, held if fenced else None)
    opened.send(packet(CALL, b"question"))
    assert daemon.connection.recv(100) == packet(CALL, b"question")
    daemon.connection.sendall(packet(REPLY, b"answer"))
    assert said.get(timeout=10) == packet(REPLY, b"answer")
    opened.send(b"")
    assert daemon.connection.recv(100) == b""
    assert said.get(timeout=10) == b""


def test_the_daemon_ends(daemon: Daemon) -> None:
    opened, said = connected(daemon)
    daemon.connection.close()
    assert said.get(timeout=10) == b""
    opened.send(packet(CALL))
    opened.close()


def test_no_daemon_listens(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        AgentError, match=r"libvirt does not listen: /nowhere/sock: No such.*/file: Connection"
    ) as caught:
        Relay(["/nowhere/sock", str(tmp_path / "file")], lambda data: None)
    assert caught.value.kind == errors.MISSING


def test_nothing_gets_through_when_the_lock_is_lost(daemon: Daemon, held: Hold, locks: Path) -> None:
    """A controller that was stopped, and goes on after another run has taken the lock."""
    opened, said = connected(daemon, held)
    for path in locks.iterdir():
        path.unlink()
    other = OperationLock(names.lock_path("web"), {})
    opened.send(packet(CALL, b"undefine"))
    assert daemon.connection.recv(100) == b""
    daemon.connection.close()
    assert said.get(timeout=10) == b""
    other.release()


@pytest.mark.parametrize("then", [b"", packet(CALL, b"one more")], ids=["it goes away", "it asks more"])
@pytest.mark.parametrize("when", ["before the end", "meanwhile"])
def test_what_is_under_way_ends_before_the_lock_is_let_go_of(
    when: str, then: bytes, daemon: Daemon, held: Hold
) -> None:
    """Whatever the controller does: libvirt goes on with what it was asked when its client goes away."""
    opened, said = connected(daemon, held)
    opened.send(packet(CALL, b"define"))
    assert daemon.connection.recv(100) == packet(CALL, b"define")
    daemon.connection.sendall(packet(EVENT, b"something else"))
    if when == "before the end" and not then:
        opened.send(then)
    ending = threading.Thread(target=held.release)
    ending.start()
    ending.join(0.2)
    opened.send(then)
    ending.join(0.3)
    assert ending.is_alive()
    assert not is_free()
    daemon.connection.sendall(packet(REPLY, b"done"))
    ending.join(10)
    assert is_free()
    assert daemon.connection.recv(100) == b"", "what was asked since does not get through"
    daemon.connection.close()
    assert eventually(lambda: said.queue and said.queue[-1] == b"")
    assert b"".join(said.queue) == packet(EVENT, b"something else") + packet(REPLY, b"done")


def test_a_daemon_that_does_not_answer_is_not_waited_for_without_end(
    daemon: Daemon, held: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_DRAIN_SECONDS", 0.3)
    opened, _ = connected(daemon, held)
    opened.send(packet(CALL))
    assert daemon.connection.recv(100)
    started = time.monotonic()
    held.release()
    assert 0.3 <= time.monotonic() - started < 5
    daemon.connection.close()


def test_a_daemon_that_ends_instead_of_answering(daemon: Daemon, held: Hold) -> None:
    opened, _ = connected(daemon, held)
    opened.send(packet(CALL))
    assert daemon.connection.recv(100)
    threading.Timer(0.2, daemon.connection.close).start()
    started = time.monotonic()
    held.release()
    assert time.monotonic() - started < 5


def test_a_relay_is_not_opened_without_the_lock(daemon: Daemon, held: Hold, locks: Path) -> None:
    for path in locks.iterdir():
        path.unlink()
    with pytest.raises(AgentError, match="is not ours any more"):
        Relay([daemon.path], lambda data: None, held)
    daemon.accept()
    assert eventually(lambda: daemon.connection.recv(100) == b"")


PACKETS = st.lists(
    st.tuples(st.sampled_from([CALL, REPLY, EVENT, 3, CALL_WITH_FDS, REPLY_WITH_FDS]), st.binary(max_size=40)),
    max_size=8,
)


@given(PACKETS, st.lists(st.integers(1, 50), max_size=20), st.binary(max_size=27))
def test_packets_are_counted_however_they_are_cut(
    packets: list[tuple[int, bytes]], cuts: list[int], torn: bytes
) -> None:
    stream = b"".join(packet(kind, content) for kind, content in packets) + torn
    counted = Packets()
    for cut in cuts:
        counted.feed(stream[:cut])
        stream = stream[cut:]
    counted.feed(stream)
    assert counted.calls == sum(kind in (CALL, CALL_WITH_FDS) for kind, _ in packets)
    assert counted.replies == sum(kind in (REPLY, REPLY_WITH_FDS) for kind, _ in packets)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken(data: bytes) -> None:
    Packets().feed(data)
