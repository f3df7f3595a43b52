"""The contract that every kind of Disk keeps. A new kind registers a factory in KINDS."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent import image, qemu
from kvm_clone.agent.disk import DATA, HOLE, ZERO, Disk, Extent, MemoryDisk
from kvm_clone.agent.errors import AgentError
from kvm_clone.agent.file import FileDisk
from kvm_clone.agent.stream import Incoming
from kvm_clone.agent.wire import CHUNK

from .tools import (
    KIB,
    MIB,
    Write,
    arriving,
    filled,
    make_qcow2,
    make_raw,
    nbdkit,
    need,
    noise,
    qcow2_content,
    read,
    sent,
    through_pipe,
)


class Kind(NamedTuple):
    """How a kind is opened: `open` gives a disk of a size and content; `stored` is what another reader finds."""

    open: Callable[[Path, int, Sequence[Write]], AbstractContextManager[Disk]]
    stored: Callable[[Path, Disk], bytes] | None = None
    unit: int = 1
    sparse: bool = True


def put(disk: Disk, writes: Sequence[Write]) -> Disk:
    for offset, data in writes:
        disk.write(offset, memoryview(data))
    disk.flush()
    return disk


@contextmanager
def memory(_directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    yield put(MemoryDisk(size), writes)


@contextmanager
def file(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    disk = FileDisk(str(make_raw(directory / "disk", size)), writable=True)
    with closing(disk):
        yield put(disk, writes)


@contextmanager
def raw_nbd(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    need("qemu-nbd")
    disk = qemu.open_nbd(str(make_raw(directory / "disk", size)), "raw", writable=True)
    with closing(disk):
        yield put(disk, writes)


@contextmanager
def raw_nbdkit(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    with nbdkit("file", str(make_raw(directory / "disk", size))) as disk:
        yield put(disk, writes)


@contextmanager
def qcow2(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    disk = image.StagedImage(str(make_qcow2(directory / "disk", size)))
    with closing(disk):
        yield put(disk, writes)


@contextmanager
def mapped(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    disk = image.MappedDisk(str(make_qcow2(directory / "disk", size, writes)), "qcow2")
    with closing(disk):
        yield disk


@contextmanager
def mapped_compressed(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    path = make_qcow2(directory / "disk", size, writes, {"cluster_size": "4096"}, compress=True)
    disk = image.MappedDisk(str(path), "qcow2")
    with closing(disk):
        yield disk


def file_content(directory: Path, _disk: Disk) -> bytes:
    return (directory / "disk").read_bytes()


def image_content(directory: Path, _disk: Disk) -> bytes:
    return qcow2_content(directory / "disk")


KINDS = {
    "memory": Kind(memory, lambda _directory, disk: read(disk)),
    "file": Kind(file, file_content),
    "raw-nbd": Kind(raw_nbd, file_content, unit=512),
    "raw-nbdkit": Kind(raw_nbdkit, file_content),
    "qcow2": Kind(qcow2, image_content, unit=512),
    "mapped": Kind(mapped, unit=512),
    "mapped-compressed": Kind(mapped_compressed, unit=512),
}
WRITABLE = [name for name, kind in KINDS.items() if kind.stored]

ORDINARY = 2 * MIB
SIZES = [1, 511, 512, 4097, 256 * KIB, MIB - 1, MIB + 512, 2 * MIB + 64 * KIB + 513]

CASES: dict[str, Callable[[int], list[Write]]] = {
    "all zero": lambda _size: [],
    "zero except the last byte of a block, of a cluster and of the disk": lambda size: [
        (end - 1, b"\x01") for end in (4 * KIB, 128 * KIB, size) if end <= size
    ],
    "holes at both ends": lambda size: [(size // 3, noise(size // 3))],
    "holes in the middle": lambda size: [(0, noise(size // 4)), (size - size // 4, noise(size // 4, 1))],
    "data up to the end": lambda size: [(size - size // 5, noise(size // 5))],
    "data everywhere": lambda size: [(0, noise(size))],
    "written zeros": lambda size: [(0, noise(size // 2)), (size // 4, bytes(size // 4))],
    "unaligned, over the borders of blocks, clusters and chunks": lambda size: [
        (border * count - 3, noise(7, border))
        for border, count in ((512, 1), (4 * KIB, 1), (64 * KIB, 3), (MIB, 1))
        if border * count + 4 <= size
    ],
}  # fmt: skip


def sizes_of(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, size) for name in names for size in SIZES if size % KINDS[name].unit == 0]


def check(disk: Disk, expected: bytes | bytearray) -> None:
    """The reading half of the contract."""
    assert disk.size == len(expected)
    assert read(disk) == expected
    extents = list(disk.extents())
    assert_covers(extents, 0, disk.size)
    for extent in extents:
        content = bytearray(extent.length)
        disk.read_extent(extent, memoryview(content))
        assert content == expected[extent.offset : extent.end]
        if extent.kind != DATA:
            assert not any(content), f"{extent} holds data"
    assert sent(disk) == expected


def assert_covers(extents: Sequence[Extent], start: int, end: int) -> None:
    position = start
    for extent in extents:
        assert extent.offset == position, "a gap or an overlap"
        assert extent.length > 0
        assert extent.kind in (DATA, ZERO, HOLE)
        position = extent.end
    assert position == end


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_reading(name: str, case: str, tmp_path: Path) -> None:
    writes = CASES[case](ORDINARY)
    with KINDS[name].open(tmp_path, ORDINARY, writes) as disk:
        check(disk, filled(ORDINARY, writes))


@pytest.mark.parametrize(("name", "size"), sizes_of(list(KINDS)))
def test_sizes(name: str, size: int, tmp_path: Path) -> None:
    writes = [
        (0, noise(size // 3)),
        (size - 1, b"\x01"),
        *CASES["unaligned, over the borders of blocks, clusters and chunks"](size),
    ]
    with KINDS[name].open(tmp_path, size, writes) as disk:
        check(disk, filled(size, writes))


RANGES = [(0, 0), (0, 1), (1, 2), (511, 4097), (64 * KIB - 1, 64 * KIB + 1), (MIB, ORDINARY - 1), (ORDINARY - 1, None),
          (ORDINARY, None), (ORDINARY, ORDINARY), (700_001, 700_001)]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_extents_of_a_range(name: str, tmp_path: Path) -> None:
    writes = [(64 * KIB, noise(64 * KIB)), (MIB - 5, noise(300 * KIB))]
    expected = filled(ORDINARY, writes)
    with KINDS[name].open(tmp_path, ORDINARY, writes) as disk:
        for start, end in RANGES:
            extents = list(disk.extents(start, end))
            assert_covers(extents, start, ORDINARY if end is None else end)
            for extent in extents:
                content = bytearray(extent.length)
                disk.read_extent(extent, memoryview(content))
                assert content == expected[extent.offset : extent.end]
                assert extent.kind == DATA or not any(content)


@pytest.mark.parametrize("name", KINDS)
def test_untouched_space_is_not_called_data(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, [(MIB, b"\x01")]) as disk:
        data = sum(extent.length for extent in disk.extents() if extent.kind == DATA)
    assert 0 < data <= 64 * KIB


@pytest.mark.parametrize("name", KINDS)
def test_pieces_of_an_extent(name: str, tmp_path: Path) -> None:
    content = noise(ORDINARY)
    with KINDS[name].open(tmp_path, ORDINARY, [(0, content)]) as disk:
        extent = next(disk.extents())
        for start, end in ((0, 1), (1, 513), (4095, 4097), (65_535, 65_537), (100_000, extent.end)):
            piece = extent.cut(start, min(end, start + CHUNK))
            assert through_pipe(partial(disk.send, piece)) == content[piece.offset : piece.end]


@pytest.mark.parametrize("name", KINDS)
def test_close_twice(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, 4096, [(0, b"x")]) as disk:
        read(disk)
        disk.close()
        disk.close()


@pytest.mark.parametrize(("name", "size"), [case for case in sizes_of(WRITABLE) if case[1] not in (511, 4097)])
def test_flush_shows_everything_to_another_reader(name: str, size: int, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.stored
    with kind.open(tmp_path, size, []) as disk:
        expected = noise(size)
        disk.write(0, memoryview(expected))
        disk.flush()
        assert kind.stored(tmp_path, disk) == expected
        disk.zero(0, size // 2)
        disk.write(size - 1, memoryview(b"\x00"))
        disk.flush()
        assert kind.stored(tmp_path, disk) == bytes(size // 2) + expected[size // 2 : -1] + b"\x00"


ZEROED = [(0, ORDINARY), (0, 1), (ORDINARY - 1, 1), (64 * KIB, 64 * KIB), (64 * KIB - 1, 2), (4095, 64 * KIB + 2),
          (MIB - 1, MIB), (500_000, 1_000_000)]  # fmt: skip


@pytest.mark.parametrize("name", WRITABLE)
def test_zero_over_data(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.stored
    with kind.open(tmp_path, ORDINARY, []) as disk:
        for offset, length in ZEROED:
            content = bytearray(noise(ORDINARY))
            disk.write(0, memoryview(content))
            disk.zero(offset, length)
            disk.flush()
            content[offset : offset + length] = bytes(length)
            check(disk, content)
            assert kind.stored(tmp_path, disk) == content


@pytest.mark.parametrize("name", WRITABLE)
def test_zeroed_space_is_no_data_and_can_be_written_again(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, [(0, noise(ORDINARY))]) as disk:
        disk.zero(256 * KIB, MIB)
        disk.flush()
        inner = list(disk.extents(256 * KIB, 256 * KIB + MIB))
        assert not [extent for extent in inner if extent.kind == DATA]
        disk.write(512 * KIB, memoryview(b"again"))
        disk.flush()
        assert read(disk, 512 * KIB - 1, 7) == b"\0again\0"


@pytest.mark.parametrize("name", ["file", "raw-nbd", "raw-nbdkit", "qcow2"])
def test_zeroed_space_is_freed(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, 8 * MIB, [(0, noise(8 * MIB))]) as disk:
        disk.zero(0, 8 * MIB)
        disk.flush()
    assert os.stat(tmp_path / "disk").st_blocks * 512 < MIB


@pytest.mark.parametrize("name", WRITABLE)
def test_a_later_write_wins(name: str, tmp_path: Path) -> None:
    """Requests that are still under way must not overtake each other where they overlap."""
    with KINDS[name].open(tmp_path, ORDINARY, []) as disk:
        for turn in range(40):
            disk.write(0, memoryview(noise(MIB)))
            disk.zero(0, MIB)
            disk.write(4 * KIB, memoryview(bytes([1 + turn]) * MIB))
            disk.write(8 * KIB, memoryview(b"last"))
            assert read(disk, 0, 8 * KIB + 5) == bytes(4 * KIB) + bytes([1 + turn]) * 4 * KIB + b"last" + bytes(
                [1 + turn]
            )


MOVES = [("pipe", "splice"), ("socket", "splice"), ("pipe", "buffered")]


@pytest.mark.parametrize(("how", "way"), MOVES, indirect=["way"])
@pytest.mark.parametrize("name", WRITABLE)
def test_receive(name: str, how: str, way: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.stored
    pieces = [(0, CHUNK), (CHUNK, 1), (CHUNK + 1, 65_537), (ORDINARY - 3, 3), (CHUNK + 200_000, 512)]
    content = noise(sum(length for _, length in pieces))
    with kind.open(tmp_path, ORDINARY, []) as disk, arriving(content + b"rest", how=how) as source:
        incoming = Incoming(source)
        assert incoming.can_move == (way == "splice")
        expected, position = bytearray(ORDINARY), 0
        for offset, length in pieces:
            disk.receive(offset, length, incoming)
            expected[offset : offset + length] = content[position : position + length]
            position += length
        disk.flush()
        assert incoming.read(4) == b"rest"
        incoming.close()
        assert kind.stored(tmp_path, disk) == expected


@pytest.mark.parametrize(("how", "way"), MOVES, indirect=["way"])
@pytest.mark.parametrize("name", WRITABLE)
def test_receive_of_a_stream_that_ends_early(name: str, how: str, way: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, []) as disk, arriving(noise(100_000), how=how) as source:
        incoming = Incoming(source)
        with pytest.raises(EOFError):
            disk.receive(4096, 100_001, incoming)
        incoming.close()


@pytest.mark.parametrize("name", ["mapped", "mapped-compressed"])
def test_what_is_for_reading_refuses_to_write(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, 4096, []) as disk:
        with pytest.raises(AgentError, match="open for reading"):
            disk.write(0, memoryview(b"x"))
        with pytest.raises(AgentError, match="open for reading"):
            disk.zero(0, 1)


@pytest.mark.parametrize("name", ["file", "raw-nbdkit", "qcow2", "mapped"])
def test_a_range_outside_is_refused(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, []) as disk:
        for start, end in ((-1, 0), (0, ORDINARY + 1), (ORDINARY + 1, None), (2, 1)):
            with pytest.raises(ValueError, match="not within"):
                list(disk.extents(start, end))


MODEL_SIZE = 192 * KIB + 512
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "write-zeros"]),
        st.one_of(st.integers(0, MODEL_SIZE), st.sampled_from([512, 4 * KIB, 64 * KIB, 128 * KIB])),
        st.one_of(st.integers(0, 70 * KIB), st.sampled_from([1, 512, 4 * KIB, 64 * KIB])),
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", WRITABLE)
def test_any_sequence_of_writes_and_zeros(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, MODEL_SIZE, []) as disk:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(OPERATIONS)
        def run(operations: list[tuple[str, int, int]]) -> None:
            disk.zero(0, MODEL_SIZE)
            model = bytearray(MODEL_SIZE)
            for seed, (act, offset, length) in enumerate(operations):
                length = min(length, MODEL_SIZE - offset)
                data = noise(length, seed) if act == "write" else bytes(length)
                if act == "zero":
                    disk.zero(offset, length)
                else:
                    disk.write(offset, memoryview(data))
                model[offset : offset + length] = data
            disk.flush()
            check(disk, model)

        run()


def test_holes_are_told_from_explicit_zeros(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", MIB)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -z 64k 64k", "-c", "write 256k 64k", str(path)],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    disk = image.MappedDisk(str(path), "qcow2")
    kinds = [(extent.offset, extent.kind) for extent in disk.extents()]
    disk.close()
    assert kinds == [(0, HOLE), (64 * KIB, ZERO), (128 * KIB, HOLE), (256 * KIB, DATA), (320 * KIB, HOLE)]
