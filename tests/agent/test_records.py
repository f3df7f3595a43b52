"""Streams of records that lie: one error each, and what a receiver calls a success is what was sent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent.digests import service
from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import Extent, MemoryDisk, Ranges
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.protocol.wire import (
    CHUNK,
    COMPRESSED,
    DATA,
    DISK_END,
    END,
    IDLE,
    RECORD_HEADER,
    RECORD_MAGIC,
    ZERO,
    ProtocolError,
    Record,
    unpack_record,
)
from kvm_clone.agent.transfer import Job, Receiver, Sender

from .naive_hash import BY_SHA256
from .tools import MIB, arriving, make_qcow2, make_raw, noise, processes, through_pipe

pytestmark = pytest.mark.timeout(60)

SIZE = 8192
LAST = (1 << 64) - 1


def data(offset: int, content: bytes, disk: int = 0) -> bytes:
    return Record(DATA, disk, offset, len(content)).pack() + content


def header(type_: int, disk: int = 0, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return RECORD_HEADER.pack(RECORD_MAGIC, type_, flags, disk, offset, length)


WHOLE = data(0, b"x" * SIZE)
DISK_ENDS, ENDS = header(DISK_END, offset=SIZE), header(END, length=SIZE)

LIES: dict[str, tuple[bytes, str, str]] = {
    "a length of 2^64-1": (header(DATA, length=LAST), errors.PROTOCOL, "more than"),
    "a length of 2^63": (header(DATA, length=1 << 63), errors.PROTOCOL, "more than"),
    "a byte more than a chunk": (header(DATA, length=CHUNK + 1), errors.PROTOCOL, "more than"),
    "an offset of 2^64-1": (header(DATA, offset=LAST, length=1), errors.PROTOCOL, "up to byte 18446744073709551616"),
    "an offset that overflows": (header(DATA, offset=LAST - 10, length=CHUNK), errors.PROTOCOL, "up to byte"),
    "an offset of 2^63": (header(DATA, offset=1 << 63, length=1), errors.PROTOCOL, "up to byte"),
    "a byte beyond the end": (header(DATA, offset=SIZE, length=1), errors.PROTOCOL, "up to byte 8193 of 8192"),
    "data of no length": (header(DATA), errors.PROTOCOL, "type 1 and 0 bytes"),
    "zeros of 2^60": (header(ZERO, length=1 << 60), errors.PROTOCOL, "up to byte"),
    "zeros of 2^64-1": (header(ZERO, offset=1, length=LAST), errors.PROTOCOL, "up to byte"),
    "zeros of no length": (header(ZERO), errors.PROTOCOL, "type 2 and 0 bytes"),
    "a disk that is not there": (header(DATA, disk=1, length=1) + b"x", errors.PROTOCOL, "disk 1 of 1"),
    "the last disk that there can be": (header(ZERO, disk=65535, length=1), errors.PROTOCOL, "disk 65535 of 1"),
    "the end of a disk that is not there": (header(DISK_END, 1, SIZE), errors.PROTOCOL, "disk 1 of 1"),
    "a larger disk's end": (header(DISK_END, offset=SIZE + 1), errors.PROTOCOL, "has 8193 bytes, this one 8192"),
    "a smaller disk's end": (header(DISK_END, offset=0), errors.PROTOCOL, "has 0 bytes, this one 8192"),
    "a disk's end with a length": (header(DISK_END, offset=SIZE, length=1), errors.PROTOCOL, "type 3 and 1 bytes"),
    "a disk's end twice": (WHOLE + DISK_ENDS + DISK_ENDS + ENDS, errors.PROTOCOL, "disk 0 behind its end"),
    "data behind a disk's end": (WHOLE + DISK_ENDS + WHOLE, errors.PROTOCOL, "disk 0 behind its end"),
    "zeros behind a disk's end": (WHOLE + DISK_ENDS + header(ZERO, length=1), errors.PROTOCOL, "behind its end"),
    "no disk's end": (WHOLE + ENDS, errors.INTERRUPTED, "before the end of 1 of its disks"),
    "the end alone": (header(END), errors.INTERRUPTED, "before the end of 1 of its disks"),
    "more than was sent": (WHOLE + DISK_ENDS + header(END, length=SIZE + 1), errors.INTERRUPTED, "sent 8193 bytes"),
    "less than was sent": (WHOLE + DISK_ENDS + header(END), errors.INTERRUPTED, "sent 0 bytes, 8192 arrived"),
    "2^64-1 sent": (DISK_ENDS + header(END, length=LAST), errors.INTERRUPTED, "sent 18446744073709551615 bytes"),
    "an idle record with a length": (header(IDLE, length=5), errors.PROTOCOL, "type 5 and 5 bytes"),
    "unknown flags": (header(DATA, length=1, flags=2) + b"x", errors.PROTOCOL, "flags 0x2"),
    "compressed zeros": (header(ZERO, length=1, flags=COMPRESSED), errors.PROTOCOL, "flags 0x1"),
    "an unknown type": (header(6), errors.PROTOCOL, "not a record"),
    "type 255": (header(255, length=LAST), errors.PROTOCOL, "not a record"),
    "nothing": (b"", errors.INTERRUPTED, "ended before its end"),
    "half a header": (WHOLE + DISK_ENDS[:10], errors.INTERRUPTED, "the stream ended"),
    "half of what was to come": (WHOLE[:-100], errors.INTERRUPTED, "the stream ended"),
}  # fmt: skip


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("name", LIES)
def test_a_stream_that_lies(name: str, format_: str, tmp_path: Path) -> None:
    content, kind, said = LIES[name]
    path = make_raw(tmp_path / "to", SIZE) if format_ == "raw" else make_qcow2(tmp_path / "to", SIZE)
    begun = time.monotonic()
    with arriving(content) as source, pytest.raises(AgentError, match=said) as caught:
        Receiver(source, [Job(str(path), format_)], lambda _: None).run()
    assert caught.value.kind == kind
    assert time.monotonic() - begun < 10
    assert not processes(str(tmp_path))
    if format_ == "raw":
        assert path.stat().st_size == SIZE


def test_a_stream_that_is_right(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "to", SIZE)
    with arriving(header(IDLE) + WHOLE + DISK_ENDS + header(IDLE) + ENDS) as source:
        Receiver(source, [Job(str(path), "raw")], lambda _: None).run()
    assert path.read_bytes() == b"x" * SIZE


SIZES = [SIZE, 1024, 512]

offsets = st.sampled_from([0, 1, 512, SIZE - 1, SIZE, 1 << 63, LAST]) | st.integers(0, SIZE)
good_data = st.builds(data, st.integers(0, 600), st.binary(min_size=1, max_size=600), st.integers(0, 2))
headers = st.builds(header, st.integers(0, 7), st.integers(0, 3), offsets, offsets, st.sampled_from([0, 0, 0, 1, 2]))
zeros = st.builds(lambda disk, offset, length: header(ZERO, disk, offset, length), st.integers(0, 2), offsets, offsets)
ends = [header(DISK_END, index, size) for index, size in enumerate(SIZES)]
pieces = st.lists(st.one_of(good_data, good_data, zeros, headers, st.sampled_from(ends), st.binary(max_size=40)))


def model(content: bytes) -> list[bytes] | None:
    """What the disks hold after a stream that is right; None when it is not."""
    disks = [bytearray(b"?" * size) for size in SIZES]
    ended: set[int] = set()
    written = position = 0
    while position + RECORD_HEADER.size <= len(content):
        try:
            record = unpack_record(content[position : position + RECORD_HEADER.size])
        except ProtocolError:
            return None
        position += RECORD_HEADER.size
        if record.type == END:
            return [bytes(disk) for disk in disks] if len(ended) == 3 and record.length == written else None
        if record.type == IDLE:
            continue
        if record.disk >= 3 or record.disk in ended or record.offset + record.length > SIZES[record.disk]:
            return None
        if record.type == DISK_END:
            if record.offset != SIZES[record.disk]:
                return None
            ended.add(record.disk)
            continue
        held = content[position : position + record.length] if record.type == DATA else bytes(record.length)
        if len(held) < record.length:
            return None
        disks[record.disk][record.offset : record.offset + record.length] = held
        written += record.length if record.type == DATA else 0
        position += record.length if record.type == DATA else 0
    return None


def received(content: bytes, directory: Path) -> list[bytes] | None:
    """What the receiver makes of it; None when it raises the documented error."""
    paths = [directory / f"disk {index}" for index in range(3)]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(b"?" * size)
    jobs = [Job(str(path), "raw") for path in paths]
    begun = time.monotonic()
    with arriving(content) as source:
        try:
            Receiver(source, jobs, lambda _: None).run()
        except AgentError as error:
            assert error.kind in (errors.PROTOCOL, errors.INTERRUPTED)
            return None
        finally:
            assert time.monotonic() - begun < 10
            assert [os.stat(path).st_size for path in paths] == SIZES
    return [path.read_bytes() for path in paths]


many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(pieces)
def test_random_records_never_pass_for_what_they_are_not(tmp_path: Path, said: list[bytes]) -> None:
    content = b"".join(said)
    assert received(content, tmp_path) == model(content)


@many
@given(st.lists(st.one_of(good_data, st.just(header(IDLE)))), st.sampled_from([0, 0, 0, 1]), st.permutations(ends))
def test_a_stream_that_is_nearly_right(tmp_path: Path, said: list[bytes], more: int, last: list[bytes]) -> None:
    kept = [record for record in said if fits(record)]
    sums = sum(len(record) - RECORD_HEADER.size for record in kept)
    content = b"".join([*kept, *last, header(END, length=sums + more)])
    found = received(content, tmp_path)
    assert found == model(content)
    assert (found is None) == bool(more)


def fits(record: bytes) -> bool:
    about = unpack_record(record[: RECORD_HEADER.size])
    return about.type == IDLE or about.offset + about.length <= SIZES[about.disk]


class Forgetful(MemoryDisk):
    """Leaves an extent out."""

    def within(self, ranges: Ranges) -> Iterator[Extent]:
        found = list(super().within(ranges))
        yield from found[:-1]


def forgetful(*_: object) -> MemoryDisk:
    disk = Forgetful(4 * MIB)
    disk.write(0, memoryview(noise(4096)))
    disk.write(3 * MIB, memoryview(noise(4096)))
    return disk


RANGES: list[Sequence[Sequence[int]] | None] = [None, [[0, MIB], [2 * MIB, 4 * MIB]]]


@pytest.mark.parametrize("ranges", RANGES, ids=["the whole", "ranges"])
def test_extents_that_leave_something_out_are_not_sent(
    ranges: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "open_for_reading", forgetful)
    kinds = []

    def send(out: int) -> None:
        with pytest.raises(AgentError, match="the extents of it leave out") as caught:
            Sender(out, [Job("it", "raw", ranges=ranges)], 1, 0).run()
        kinds.append(caught.value.kind)

    content = through_pipe(send)
    assert kinds == [errors.PROTOCOL]
    assert header(DISK_END, offset=4 * MIB) not in content


@pytest.mark.parametrize("ranges", [*RANGES[1:], [[0, 4 * MIB]]], ids=str)
def test_extents_that_leave_something_out_are_not_digested(
    ranges: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "open_for_reading", forgetful)
    how = [BY_SHA256.method, BY_SHA256.key.hex()]
    with pytest.raises(AgentError, match="the extents of it leave out") as caught:
        service.DigestService().segments("it", "raw", how, ranges, lambda _: None)
    assert caught.value.kind == errors.PROTOCOL
    with pytest.raises(AgentError, match="the extents of it leave out"):
        service.DigestService().blocks("it", "raw", how, ranges)
