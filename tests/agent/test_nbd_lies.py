"""NBD servers that lie, talk too much, or stop in the middle: one error, no hang, bounded memory."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvm_clone.agent.disks import disk as disks
from kvm_clone.agent.disks import nbd, nbd_session
from kvm_clone.agent.disks.disk import DATA, HOLE, Disk
from kvm_clone.agent.disks.nbd import ALLOCATION, NbdDisk
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError, from_exception
from kvm_clone.agent.protocol.wire import CHUNK, ProtocolError

from .tools import KIB, MIB

pytestmark = pytest.mark.timeout(30)

SIZE = 64 * MIB
CONTEXT = 77
MOST_MEMORY = 16 * MIB
"""What an operation on CHUNK bytes may take at most, whatever the server says."""

STRUCTURED, GO, SET_META = nbd_session._OPT_STRUCTURED_REPLY, nbd_session._OPT_GO, nbd_session._OPT_SET_META_CONTEXT
ACK, INFO, META = nbd_session._REP_ACK, nbd_session._REP_INFO, nbd_session._REP_META_CONTEXT
DATA_CHUNK, HOLE_CHUNK, STATUS_CHUNK = nbd._REPLY_OFFSET_DATA, nbd._REPLY_OFFSET_HOLE, nbd._REPLY_BLOCK_STATUS
ERROR_CHUNK, ERROR_AT_CHUNK = 1 << 15 | 1, 1 << 15 | 2
DONE = nbd._REPLY_FLAG_DONE

GREETING = struct.pack(">QQH", nbd_session._MAGIC, nbd_session._OPTION_MAGIC, 3)


def option_reply(option: int, kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return struct.pack(">QIII", nbd_session._OPTION_REPLY_MAGIC, option, kind, length) + body


def export(size: int = SIZE) -> bytes:
    return option_reply(GO, INFO, struct.pack(">HQH", 0, size, 1))


ACKS = {option: option_reply(option, ACK) for option in (STRUCTURED, SET_META, GO)}
METADATA = option_reply(SET_META, META, struct.pack(">I", CONTEXT) + ALLOCATION.encode())
AGREED = GREETING + ACKS[STRUCTURED] + METADATA + ACKS[SET_META] + export() + ACKS[GO]


def chunk(kind: int, body: bytes = b"", flags: int = DONE, cookie: int = 1, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return struct.pack(">IHHQI", nbd._STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length) + body


def simple(code: int = 0, cookie: int = 1) -> bytes:
    return struct.pack(">IIQ", nbd._SIMPLE_REPLY_MAGIC, code, cookie)


def content(offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset) + data


def status(*extents: tuple[int, int], context: int = CONTEXT) -> bytes:
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)


def named(code: int, text: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">IH", code, len(text) if length is None else length) + text


@contextmanager
def saying(says: Iterator[bytes], then: str) -> Iterator[socket.socket]:
    """The client's end of a connection to a server that says this, whatever it hears; `then` it ends or is silent."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with suppress(OSError):
            for part in says:
                theirs.sendall(part)
        if then == "ends":
            with suppress(OSError):
                theirs.shutdown(socket.SHUT_WR)

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield ours
    finally:
        ours.close()
        with suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)
        server.join()
        theirs.close()


def over(says: bytes, then: str, act: Act, again: bytes = b"") -> None:
    """Connect and act. `again`: what the server goes on to say without end."""

    def parts() -> Iterator[bytes]:
        yield says
        while again:
            yield again * (1 + MIB // 16 // len(again))

    with saying(parts(), then) as connection:
        disk = NbdDisk(connection)
        try:
            act(disk)
        finally:
            disk.close()


Act = Callable[[NbdDisk], object]


def READ(disk: NbdDisk) -> None:  # noqa: N802 - the tables read better so
    disk.readinto(MIB, memoryview(bytearray(4096)))


def EXTENTS(disk: NbdDisk) -> None:  # noqa: N802
    list(disk.extents(min(MIB, disk.size), min(2 * MIB, disk.size)))  # nobody asks beyond a disk's end


def DIRTY(disk: NbdDisk) -> None:  # noqa: N802
    list(disk.dirty())


def WRITE(disk: NbdDisk) -> None:  # noqa: N802
    disk.write(0, memoryview(bytes(512)))
    disk.flush()


def ZERO(disk: NbdDisk) -> None:  # noqa: N802
    disk.zero(0, MIB)
    disk.flush()


def OPEN(disk: NbdDisk) -> None:  # noqa: N802
    assert disk.size


class Lie(NamedTuple):
    """What a server says, and the error that it comes to. `again`: what it then says without end."""

    says: bytes
    act: Act
    error: str
    again: bytes = b""


HANDSHAKES = {
    "a size of 2^64-1": Lie(AGREED.replace(export(), export((1 << 64) - 1)), OPEN, "more than there can be"),
    "a size of 2^63": Lie(AGREED.replace(export(), export(1 << 63)), OPEN, "more than there can be"),
    "two sizes": Lie(AGREED.replace(export(), export(1) + export(2)), OPEN, "contradicts itself"),
    "no size": Lie(AGREED.replace(export(), b""), OPEN, "does not offer"),
    "a short size": Lie(
        AGREED.replace(export(), option_reply(GO, INFO, b"\0\0\0\1")), OPEN, "contradicts itself"),
    "a long size": Lie(
        AGREED.replace(export(), option_reply(GO, INFO, bytes(40))), OPEN, "contradicts itself"),
    "information of no type": Lie(AGREED.replace(export(), option_reply(GO, INFO, b"\0")), OPEN, "does not offer"),
    "another context": Lie(
        AGREED.replace(METADATA, option_reply(SET_META, META, b"\0\0\0\1qemu:other")), OPEN, "other than base"),
    "two contexts": Lie(AGREED.replace(METADATA, METADATA + METADATA), OPEN, "other than base"),
    "a short context": Lie(AGREED.replace(METADATA, option_reply(SET_META, META, b"\0\0")), OPEN, "other than base"),
    "a reply of 1 GiB": Lie(
        GREETING + option_reply(STRUCTURED, INFO, length=1 << 30), OPEN, "a reply of 1073741824 bytes", bytes(MIB)),
    "a reply of 4 GiB": Lie(
        GREETING + option_reply(STRUCTURED, INFO, length=(1 << 32) - 1), OPEN, "a reply of 4294967295", bytes(MIB)),
    "an error of 1 GiB": Lie(
        GREETING + option_reply(STRUCTURED, 1 << 31 | 1, length=1 << 30), OPEN, "a reply of 1073741824", bytes(MIB)),
    "replies without end": Lie(GREETING, OPEN, "replies without end", option_reply(STRUCTURED, INFO, bytes(100))),
    "a reply to another option": Lie(GREETING + ACKS[GO], OPEN, "not a reply to NBD option 8"),
    "greetings without end": Lie(GREETING, OPEN, "not a reply to NBD option 8", GREETING),
}  # fmt: skip

READS = {
    "a chunk of 1 GiB": Lie(
        chunk(DATA_CHUNK, length=1 << 30) + content(MIB, b""), READ, "nobody asked for", bytes(MIB)),
    "a chunk of 4 GiB": Lie(
        chunk(DATA_CHUNK, length=(1 << 32) - 1) + content(MIB, b""), READ, "nobody asked for", bytes(MIB)),
    "an odd chunk of 4 GiB": Lie(chunk(4711, length=(1 << 32) - 1), READ, "of type 4711", bytes(MIB)),
    "a hole of 4 GiB": Lie(chunk(HOLE_CHUNK, length=(1 << 32) - 1), READ, "of type 2", bytes(MIB)),
    "nothing of 4 GiB": Lie(chunk(0, length=(1 << 32) - 1), READ, "of type 0", bytes(MIB)),
    "data before": Lie(chunk(DATA_CHUNK, content(MIB - 1, bytes(4096))), READ, "outside"),
    "data after": Lie(chunk(DATA_CHUNK, content(MIB + 1, bytes(4096))), READ, "outside"),
    "data at the end of numbers": Lie(chunk(DATA_CHUNK, content((1 << 64) - 1, bytes(4096))), READ, "outside"),
    "a byte too many": Lie(chunk(DATA_CHUNK, content(MIB, bytes(4097))), READ, "nobody asked for"),
    "a byte too few": Lie(chunk(DATA_CHUNK, content(MIB, bytes(4095))), READ, "does not send all"),
    "data of no length": Lie(chunk(DATA_CHUNK, content(MIB, b"")), READ, "of type 1 and 8 bytes"),
    "data of half an offset": Lie(chunk(DATA_CHUNK, b"\0\0\0"), READ, "of type 1 and 3 bytes"),
    "nothing": Lie(chunk(0), READ, "does not send all"),
    "a gap": Lie(
        chunk(DATA_CHUNK, content(MIB, bytes(2000)), 0) + chunk(DATA_CHUNK, content(MIB + 2096, bytes(2000))),
        READ, "does not send all"),
    "the same twice, and no rest": Lie(
        chunk(DATA_CHUNK, content(MIB, bytes(2048)), 0) + chunk(DATA_CHUNK, content(MIB, bytes(2048))),
        READ, "does not send all"),
    "the same without end": Lie(b"", READ, "nobody asked for", chunk(DATA_CHUNK, content(MIB, bytes(2048)), 0)),
    "a hole outside": Lie(chunk(HOLE_CHUNK, struct.pack(">QI", 0, 4096)), READ, "outside"),
    "a hole beyond": Lie(chunk(HOLE_CHUNK, struct.pack(">QI", MIB, (1 << 32) - 1)), READ, "nobody asked for"),
    "a hole of nothing": Lie(chunk(HOLE_CHUNK, struct.pack(">QI", MIB, 0)), READ, "outside"),
    "a short hole": Lie(chunk(HOLE_CHUNK, struct.pack(">Q", MIB)), READ, "of type 2 and 8 bytes"),
    "a long hole": Lie(chunk(HOLE_CHUNK, struct.pack(">QIQ", MIB, 4096, 0)), READ, "of type 2 and 20 bytes"),
    "nothing, not done": Lie(chunk(0, flags=0), READ, "of type 0"),
    "another cookie": Lie(chunk(DATA_CHUNK, content(MIB, bytes(4096)), cookie=2), READ, "no request of ours, cookie 2"),
    "another cookie of 4 GiB": Lie(chunk(DATA_CHUNK, cookie=9, length=(1 << 32) - 1), READ, "cookie 9", bytes(MIB)),
    "a simple reply to another": Lie(simple(cookie=0), READ, "no request of ours, cookie 0"),
    "content without structure": Lie(simple() + bytes(4096), READ, "without structure"),
    "extents": Lie(chunk(STATUS_CHUNK, status((4096, 0))), READ, "of type 5"),
    "an option's reply": Lie(ACKS[GO], READ, "not an NBD reply"),
    "text": Lie(b"HTTP/1.1 400 Bad Request\r\n\r\n", READ, "not an NBD reply"),
    "errors without end": Lie(b"", READ, "without end", chunk(ERROR_CHUNK, named(errno.EIO), 0)),
    "a short error": Lie(chunk(ERROR_CHUNK, b"\0\0\0\5"), READ, "an NBD error of 4 bytes"),
    "an error of 1 GiB": Lie(chunk(ERROR_CHUNK, length=1 << 30), READ, "an NBD error of 1073741824", bytes(MIB)),
    "an error longer than it is": Lie(chunk(ERROR_CHUNK, named(5, b"no", 60000)), READ, "has 60000 of 8 bytes"),
    "an error without an offset": Lie(chunk(ERROR_AT_CHUNK, named(5, b"no")), READ, "has 2 of 8 bytes"),
    "an error that is none": Lie(chunk(ERROR_CHUNK, named(0, b"no")), READ, "an NBD error 0"),
}  # fmt: skip

STATUSES = {
    "an extent of no length": Lie(chunk(STATUS_CHUNK, status((0, 0))), EXTENTS, "bytes too many"),
    "no length at the end": Lie(chunk(STATUS_CHUNK, status((4096, 0), (0, 0))), EXTENTS, "bytes too many"),
    "extents of no length without end": Lie(b"", EXTENTS, "bytes too many", chunk(STATUS_CHUNK, status((0, 3)))),
    "extents beyond what was asked": Lie(chunk(STATUS_CHUNK, status((MIB, 0), (1, 0))), EXTENTS, "bytes too many"),
    "4 GiB, and more": Lie(
        chunk(STATUS_CHUNK, status(((1 << 32) - 1, 0), ((1 << 32) - 1, 3))), EXTENTS, "bytes too many"),
    "no extents": Lie(chunk(STATUS_CHUNK, status()), EXTENTS, "a block status of|an NBD block status of 4 bytes"),
    "no context": Lie(chunk(STATUS_CHUNK, b""), EXTENTS, "block status of 0 bytes"),
    "half a context": Lie(chunk(STATUS_CHUNK, b"\0\0"), EXTENTS, "block status of 2 bytes"),
    "half an extent": Lie(chunk(STATUS_CHUNK, status((4096, 0))[:-4]), EXTENTS, "block status of 8 bytes"),
    "an odd struct": Lie(chunk(STATUS_CHUNK, status((4096, 0)) + b"\0"), EXTENTS, "block status of 13 bytes"),
    "extents of 1 GiB": Lie(chunk(STATUS_CHUNK, length=4 + (1 << 30)), EXTENTS, "block status of", bytes(MIB)),
    "extents of 4 GiB": Lie(chunk(STATUS_CHUNK, length=(1 << 32) - 4), EXTENTS, "block status of", bytes(MIB)),
    "another context": Lie(chunk(STATUS_CHUNK, status((MIB, 0), context=1)), EXTENTS, "context 1, which nobody"),
    "two replies in one": Lie(chunk(STATUS_CHUNK, status((MIB, 0)), 0) * 2, EXTENTS, "of type 5"),
    "success without extents": Lie(chunk(0), EXTENTS, "without extents"),
    "a simple success": Lie(simple(), EXTENTS, "without extents"),
    "data": Lie(chunk(DATA_CHUNK, content(MIB, bytes(512))), EXTENTS, "nobody asked for"),
}  # fmt: skip

OTHERS = {
    "data for a write": Lie(chunk(DATA_CHUNK, content(0, bytes(512))), WRITE, "nobody asked for"),
    "extents for a write": Lie(chunk(STATUS_CHUNK, status((512, 0))), WRITE, "of type 5"),
    "a hole for zeroes": Lie(chunk(HOLE_CHUNK, struct.pack(">QI", 0, 512)), ZERO, "nobody asked for"),
    "a write done twice": Lie(simple() * 2, WRITE, "no request of ours, cookie 1"),
}


def lies() -> Iterator[tuple[str, Lie]]:
    yield from HANDSHAKES.items()
    for what, table in (("read", READS), ("extents", STATUSES), ("other", OTHERS)):
        yield from ((f"{what}: {name}", lie._replace(says=AGREED + lie.says)) for name, lie in table.items())


LIES = dict(lies())


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_one_error(name: str) -> None:
    lie = LIES[name]
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=lie.error) as caught:
            over(lie.says, "is silent", lie.act, lie.again)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < 10
    assert from_exception(caught.value).kind == errors.PROTOCOL


def test_the_server_of_these_tests_can_tell_the_truth() -> None:
    pieces = chunk(HOLE_CHUNK, struct.pack(">QI", MIB + 1000, 3096), 0) + chunk(DATA_CHUNK, content(MIB, b"x" * 1000))
    with saying(iter([AGREED + pieces]), "is silent") as connection:
        disk = NbdDisk(connection)
        assert disk.size == SIZE
        view = bytearray(b"?" * 4096)
        disk.readinto(MIB, memoryview(view))
        assert bytes(view) == b"x" * 1000 + bytes(3096)
        disk.close()


def heard(connection: socket.socket, count: int) -> list[tuple[int, int, int]]:
    """The (cookie, offset, length) of so many requests behind the handshake, none of which has had its reply."""
    magic, size = nbd._REQUEST_MAGIC.to_bytes(4, "big"), nbd._REQUEST.size
    data = b""
    while magic not in data or len(data) - data.index(magic) < count * size:
        data += connection.recv(MIB)
    start = data.index(magic)
    return [nbd._REQUEST.unpack_from(data, at)[3:] for at in range(start, len(data), size)]


@pytest.mark.parametrize("order", ["as asked", "reversed", "interleaved"])
def test_reads_in_flight_are_matched_by_their_cookies(order: str) -> None:
    """The server replies only when all of them have come."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)

    def serve() -> None:
        theirs.sendall(AGREED)
        asked = heard(theirs, disks.READS_AHEAD)
        halves = [
            chunk(DATA_CHUNK, content(at, bytes([at // KIB]) * (length // 2)), flags, cookie)
            for cookie, offset, length in (asked if order == "as asked" else asked[::-1])
            for at, flags in ((offset, 0), (offset + length // 2, DONE))
        ]
        theirs.sendall(b"".join(halves[::2] + halves[1::2] if order == "interleaved" else halves))

    with closing(ours), closing(theirs):
        server = threading.Thread(target=serve)
        server.start()
        disk = NbdDisk(ours)
        runs = [[disks.Extent(number * 2 * KIB, 2 * KIB, DATA)] for number in range(disks.READS_AHEAD)]
        found = [bytes(disk.content(piece)) for (piece,) in disks.ahead(disk, runs)]
        server.join()
    assert found == [bytes([2 * n]) * KIB + bytes([2 * n + 1]) * KIB for n in range(disks.READS_AHEAD)]


def test_an_error_of_a_read_that_was_begun_is_an_error_of_what_comes_before_it_or_of_itself() -> None:
    failing = AGREED + chunk(ERROR_CHUNK, named(errno.EIO), cookie=2)
    good = chunk(DATA_CHUNK, content(0, bytes(KIB)), cookie=1)
    for says in (failing + good, AGREED + good + failing.removeprefix(AGREED)):
        with saying(iter([says]), "ends") as connection:
            disk = NbdDisk(connection)
            pieces = [disks.Extent(0, KIB, DATA), disks.Extent(KIB, KIB, DATA)]
            for piece in pieces:
                disk.begin(piece)
            with pytest.raises(OSError, match=f"read at {KIB}") as caught:
                [disk.content(piece) for piece in pieces]
            assert caught.value.errno == errno.EIO


def test_the_last_extent_may_go_beyond_what_was_asked() -> None:
    """The protocol lets a server say more than it was asked, in the last one."""
    says = AGREED + chunk(STATUS_CHUNK, status((4096, 0), ((1 << 32) - 1, 3)))
    with saying(iter([says]), "is silent") as connection:
        disk = NbdDisk(connection)
        extents = list(disk.extents(MIB, 2 * MIB))
        disk.close()
    assert [(one.offset, one.length, one.kind) for one in extents] == [
        (MIB, 4096, DATA),
        (MIB + 4096, MIB - 4096, HOLE),
    ]


def test_a_broken_connection_is_not_used_again() -> None:
    says = AGREED + chunk(DATA_CHUNK, content(0, bytes(4096))) + chunk(DATA_CHUNK, content(MIB, b"x" * 4096), cookie=2)
    with saying(iter([says]), "is silent") as connection:
        disk = NbdDisk(connection)
        for act in (READ, READ, EXTENTS, WRITE, ZERO):
            with pytest.raises(ProtocolError, match="outside"):
                act(disk)
        disk.close()


CODES = {
    errno.ENOSPC: errno.ENOSPC, errno.ESHUTDOWN: errno.ESHUTDOWN, errno.ENOENT: errno.EINVAL, 0: None,
    (1 << 31) - 1: errno.EINVAL, 1 << 31: errno.EINVAL, (1 << 32) - 1: errno.EINVAL,
}  # fmt: skip


@pytest.mark.parametrize("code", [code for code in CODES if code])
@pytest.mark.parametrize("how", ["simple", "structured", "with an offset"])
def test_an_error_of_any_number(how: str, code: int) -> None:
    said = {
        "simple": simple(code),
        "structured": chunk(ERROR_CHUNK, named(code, b"because")),
        "with an offset": chunk(ERROR_AT_CHUNK, named(code, b"because") + bytes(8)),
    }[how]
    for act in (READ, EXTENTS):
        with pytest.raises(OSError) as caught:
            over(AGREED + said, "is silent", act)
        assert caught.value.errno == CODES[code]


STOPS = [
    *range(0, len(AGREED), 7),
    *(len(AGREED) + more for more in (0, 1, 4, 19, 20, 27, 28, 1000, 4096 + 27)),
]


@pytest.mark.parametrize("then", ["ends", "is silent"])
def test_a_server_that_stops_in_the_middle(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_session, "_TIMEOUT", 0.05)
    whole = AGREED + chunk(DATA_CHUNK, content(MIB, bytes(4096)))
    for stop in STOPS:
        with pytest.raises(OSError) as caught:
            over(whole[:stop], then, READ)
        assert caught.value.errno == (errno.ECONNRESET if then == "ends" else errno.ETIMEDOUT), stop


TRICKLES = {
    "the handshake": (b"", AGREED, OPEN),
    "a read": (AGREED, chunk(DATA_CHUNK, content(MIB, bytes(4096))), READ),
    "extents": (AGREED, chunk(STATUS_CHUNK, status((MIB, 0))), EXTENTS),
}


@pytest.mark.parametrize("name", TRICKLES)
def test_a_server_that_says_a_byte_now_and_then(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in time, and all of them never."""
    monkeypatch.setattr(nbd_session, "_TIMEOUT", 0.3)
    first, then, act = TRICKLES[name]

    def parts() -> Iterator[bytes]:
        yield first
        for byte in then:
            time.sleep(0.05)
            yield bytes([byte])

    begun = time.monotonic()
    with saying(parts(), "is silent") as connection, pytest.raises(OSError) as caught:
        act(NbdDisk(connection))
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begun < 2


def test_a_server_that_takes_a_little_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_session, "_TIMEOUT", 0.5)
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.sendall(AGREED)

    def take() -> None:
        while theirs.recv(512):
            time.sleep(0.05)

    server = threading.Thread(target=take)
    disk = NbdDisk(ours)
    server.start()
    begun = time.monotonic()
    with pytest.raises(OSError) as caught:
        disk.write(0, memoryview(bytes(CHUNK)))
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begun < 3
    disk.close()
    theirs.shutdown(socket.SHUT_RDWR)
    server.join()
    theirs.close()


def test_a_server_that_does_not_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_session, "_TIMEOUT", 0.3)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = []
        begun = time.monotonic()
        for _ in range(3):  # the first fills what may wait
            with pytest.raises(OSError) as caught:
                waiting.append(nbd.connect(nbd.uri(path, "vda")))
            assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - begun < 5


@contextmanager
def listening(directory: Path, says: bytes) -> Iterator[str]:
    """A socket behind which a server says all this to everybody."""
    path = str(directory / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(says)
                while connection.recv(4096):
                    pass

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield path
        server.join()


BITMAP = AGREED.replace(METADATA, option_reply(SET_META, META, struct.pack(">I", CONTEXT) + b"qemu:dirty-bitmap:b"))


def test_a_bitmap_that_lies_is_an_error_of_the_call(tmp_path: Path) -> None:
    with listening(tmp_path, BITMAP + chunk(STATUS_CHUNK, status((0, 1)))) as path:
        with pytest.raises(ProtocolError) as caught:
            host_info.dirty(nbd.uri(path, "vda"), "b")
        assert from_exception(caught.value).kind == errors.PROTOCOL


def test_a_bitmap_in_very_small_pieces_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "MOST_RANGES", 1000)
    monkeypatch.setattr(host_info, "BLOCK", 16)
    pieces = status(*((1, number % 2) for number in range(1 << 17)))
    rest = chunk(STATUS_CHUNK, status((SIZE, 0)), cookie=2)
    with listening(tmp_path, BITMAP + chunk(STATUS_CHUNK, pieces) + rest) as path:
        tracemalloc.start()
        try:
            found = host_info.dirty(nbd.uri(path, "vda"), "b")
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
    assert 1 <= len(found) <= 1000
    assert found[0][0] <= 1
    assert found[-1][1] >= 1 << 17


numbers = st.sampled_from([0, 1, 2, 3, 5, 7, 4096, MIB, 1 << 31, (1 << 32) - 1]) | st.integers(0, 50)
bodies = st.one_of(
    st.binary(max_size=64),
    st.builds(content, st.sampled_from([0, MIB, MIB + 512, (1 << 64) - 1]), st.binary(max_size=600)),
    st.builds(lambda *extents: status(*extents), *[st.tuples(numbers, st.integers(0, 3))] * 3),
    st.builds(named, numbers, st.binary(max_size=20), st.none() | st.integers(0, 65535)),
)
chunks = st.builds(
    chunk,
    st.sampled_from([0, 1, 2, 5, ERROR_CHUNK, ERROR_AT_CHUNK]) | st.integers(0, 65535),
    bodies,
    st.sampled_from([0, 1]) | st.integers(0, 65535),
    st.sampled_from([1, 2]) | st.integers(0, 5),
    st.none() | numbers,
)
replies = st.lists(st.one_of(chunks, chunks, st.builds(simple, numbers, st.integers(0, 3)), st.binary(max_size=40)))
options = st.builds(
    option_reply,
    st.sampled_from([STRUCTURED, SET_META, GO]),
    st.sampled_from([ACK, INFO, META, 1 << 31 | 1]),
    st.binary(max_size=40),
    st.none() | numbers,
)
handshakes = st.lists(st.one_of(options, st.sampled_from([*ACKS.values(), METADATA, export()]), st.binary(max_size=20)))
ACTS = [READ, EXTENTS, WRITE, ZERO, DIRTY]

slow = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def survives(says: bytes, acts: Sequence[Act]) -> None:
    """Nothing but the documented errors, no more memory than that, and in time: the server ends in the end."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with saying(iter([says]), "ends") as connection:
            disk: Disk | None = None
            with suppress(OSError, ProtocolError, AgentError):
                disk = opened = NbdDisk(connection)
                for act in acts:
                    with suppress(OSError, ProtocolError, AgentError):
                        act(opened)
            if disk is not None:
                disk.close()
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY + 4 * len(says)
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < 5


@slow
@given(replies, st.permutations(ACTS))
def test_no_reply_hangs_or_surprises(said: list[bytes], acts: list[Act]) -> None:
    survives(AGREED + b"".join(said), acts)


@slow
@given(handshakes)
def test_no_handshake_hangs_or_surprises(said: list[bytes]) -> None:
    survives(GREETING + b"".join(said), [READ, EXTENTS])


@slow
@given(st.binary(max_size=400), st.integers(0, len(AGREED)))
def test_no_bytes_hang_or_surprise(said: bytes, cut: int) -> None:
    survives(AGREED[:cut] + said, [READ, EXTENTS])


@slow
@example(1465)  # a disk of no size
@given(st.integers(0, 1 << 32))
def test_no_flipped_bit_hangs_or_surprises(seed: int) -> None:
    """What a server says that is right but for a bit."""
    chance = random.Random(seed)
    says = bytearray(
        AGREED
        + chunk(STATUS_CHUNK, status((512 * KIB, 0), (512 * KIB, 3)))
        + chunk(HOLE_CHUNK, struct.pack(">QI", MIB, 4000), 0, 2)
        + chunk(DATA_CHUNK, content(MIB + 4000, bytes(96)), 1, 2)
    )
    says[chance.randrange(len(says))] ^= 1 << chance.randrange(8)
    survives(bytes(says), [EXTENTS, READ, WRITE])
