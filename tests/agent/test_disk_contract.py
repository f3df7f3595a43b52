"""The contract that every kind of Disk keeps. A new kind registers a factory in KINDS."""

from __future__ import annotations

import itertools
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

from kvm_clone.agent.disks import image, nbd, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.disks.disk import (
    DATA,
    HOLE,
    READS_AHEAD,
    ZERO,
    Disk,
    Extent,
    MemoryDisk,
    ahead,
    intersect,
    split,
    without_zeros,
)
from kvm_clone.agent.disks.file import SECTOR, FileDisk
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK

from .tools import (
    KIB,
    MIB,
    Write,
    arriving,
    device,
    exported,
    filled,
    make_overlay,
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
    """How a kind is opened: `open` gives a disk of a size and content; `stored` is what another reader finds.

    `unit`: what the disk's size in bytes is rounded up to.
    """

    open: Callable[[Path, int, Sequence[Write]], AbstractContextManager[Disk]]
    stored: Callable[[Path, Disk], bytes] | None = None
    unit: int = SECTOR

    def size(self, asked: int) -> int:
        """The disk's size in bytes when `asked` were asked for."""
        return -(-asked // self.unit) * self.unit


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
def block_device(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    """A device of whole sectors."""
    file = make_raw(directory / "disk", -(-size // SECTOR) * SECTOR)
    with device(file) as path, closing(FileDisk(str(path), writable=True)) as disk:
        yield put(disk, writes)


@contextmanager
def qcow2_on_device(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    """An image on a device that is larger than it."""
    file = make_qcow2(directory / "disk", size, writes)
    os.truncate(file, file.stat().st_size + MIB)
    with device(file) as path, closing(image.MappedDisk(str(path), "qcow2")) as disk:
        yield disk


@contextmanager
def raw_nbd(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    need("qemu-nbd")
    disk = qemu.open_nbd([Node(str(make_raw(directory / "disk", size)), "raw")], writable=True)
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


def halves(size: int, writes: Sequence[Write]) -> tuple[int, list[Write], list[Write]]:
    """A base's size, the writes that it holds, and those that an overlay has over it."""
    base = min(size, max(1, size * 2 // 3))
    below = [(offset, data[: base - offset]) for offset, data in writes[::2] if offset < base]
    over = [(max(base, offset), data[max(0, base - offset) :]) for offset, data in writes[::2]]
    return base, below, [*((offset, data) for offset, data in over if data), *writes[1::2]]


def overlaid(directory: Path, size: int, writes: Sequence[Write], how: str) -> Path:
    """An overlay on a shorter base, with the content parted between them; where both have some, the base's is old."""
    base, below, over = halves(size, writes)
    old = [(offset, noise(min(len(data), base - offset), 77)) for offset, data in over if offset < base]
    if how == "raw":
        path = make_raw(directory / "base", base, [*old, *below])
    else:
        clusters = {"cluster_size": "4096"} if how == "compressed" else None
        path = make_qcow2(directory / "base", base, [*old, *below], clusters, compress=how == "compressed")
    again = [*below, *over] if any(touch(one, other) for one in below for other in old) else over
    return make_overlay(directory / "disk", path, "raw" if how == "raw" else "qcow2", size, again)


def touch(one: Write, other: Write) -> bool:
    return one[0] < other[0] + len(other[1]) and other[0] < one[0] + len(one[1])


@contextmanager
def mapped_overlay(how: str, directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    with closing(image.MappedDisk(str(overlaid(directory, size, writes, how)), "qcow2")) as disk:
        yield disk


@contextmanager
def overlay(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    """An overlay that is being filled, on a shorter base full of something else."""
    base = make_raw(directory / "base", max(1, size // 2), [(0, noise(max(1, size // 2), 99))])
    disk = image.StagedImage(str(make_overlay(directory / "disk", base, "raw", size)))
    with closing(disk):
        disk.zero(0, disk.size)
        yield put(disk, writes)


@contextmanager
def nbd_uri(directory: Path, size: int, writes: Sequence[Write]) -> Iterator[Disk]:
    make_raw(directory / "disk", size)
    with (
        exported(directory / "disk", "raw", "v d/a&?", "--discard=unmap") as listening,
        closing(nbd.connect(nbd.uri(listening, "v d/a&?"))) as disk,
    ):
        yield put(disk, writes)


def file_content(directory: Path, disk: Disk) -> bytes:
    """What QEMU finds, which reads zeros behind the file's end."""
    content = (directory / "disk").read_bytes()
    assert disk.size - len(content) < SECTOR
    return content.ljust(disk.size, b"\0")


def image_content(directory: Path, _disk: Disk) -> bytes:
    return qcow2_content(directory / "disk")


KINDS = {
    "memory": Kind(memory, lambda _directory, disk: read(disk), unit=1),
    "file": Kind(file, file_content),
    "device": Kind(block_device, file_content),
    "qcow2-device": Kind(qcow2_on_device),
    "raw-nbd": Kind(raw_nbd, file_content),
    "raw-nbdkit": Kind(raw_nbdkit, file_content, unit=1),
    "qcow2": Kind(qcow2, image_content),
    "mapped": Kind(mapped),
    "mapped-compressed": Kind(mapped_compressed),
    "mapped-overlay-raw": Kind(partial(mapped_overlay, "raw")),
    "mapped-overlay-qcow2": Kind(partial(mapped_overlay, "qcow2")),
    "mapped-overlay-compressed": Kind(partial(mapped_overlay, "compressed")),
    "overlay": Kind(overlay, image_content),
    "nbd-uri": Kind(nbd_uri, file_content),
}
WRITABLE = [name for name, kind in KINDS.items() if kind.stored]

ORDINARY = 2 * MIB
SIZES = [1, 7, 511, 512, 513, 4097, MIB - 1, MIB + 512, 2 * MIB + 64 * KIB + 513]

CASES: dict[str, Callable[[int], list[Write]]] = {
    "all zero": lambda _size: [],
    "zero except the last byte of a block, of a cluster and of the disk": lambda size: [
        (end - 1, b"\x01") for end in (4 * KIB, 128 * KIB, size) if end <= size
    ],
    "holes at both ends": lambda size: [(size // 3, noise(size // 3))],
    "holes in the middle": lambda size: [(0, noise(size // 4)), (size - size // 4, noise(size // 4, 1))],
    "data everywhere": lambda size: [(0, noise(size))],
    "written zeros": lambda size: [(0, noise(size // 2)), (size // 4, bytes(size // 4))],
    "unaligned, over the borders of blocks, clusters and chunks": lambda size: [
        (border * count - 3, noise(7, border))
        for border, count in ((512, 1), (4 * KIB, 1), (64 * KIB, 3), (MIB, 1))
        if border * count + 4 <= size
    ],
}  # fmt: skip


def sizes_of(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, size) for name in names for size in SIZES]


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
    assert read_ahead(disk) == expected


def read_ahead(disk: Disk) -> bytes:
    """The content as a sender and a digest ask for it: pieces of a chunk, the next ones begun meanwhile."""
    found = bytearray(disk.size)
    pieces = ([piece] for extent in disk.extents() for piece in split(extent, CHUNK))
    for (piece,) in ahead(disk, pieces):
        if piece.kind == DATA:
            found[piece.offset : piece.end] = disk.content(piece)
    return bytes(found)


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
        check(disk, filled(KINDS[name].size(size), writes))


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


WITHIN: list[list[list[int]]] = [
    [],
    [[0, ORDINARY]],
    [[ORDINARY - 512, ORDINARY]],
    [[0, 512], [64 * KIB - 512, 64 * KIB + 512], [MIB - 1, MIB + 1], [MIB + 1, MIB + 2], [ORDINARY - 1, ORDINARY]],
    [[start, start + 4096] for start in range(0, ORDINARY, 96 * KIB)],
]


@pytest.mark.parametrize("name", KINDS)
def test_extents_within_ranges(name: str, tmp_path: Path) -> None:
    writes = [(64 * KIB, noise(64 * KIB)), (MIB - 5, noise(300 * KIB))]
    expected = filled(ORDINARY, writes)
    with KINDS[name].open(tmp_path, ORDINARY, writes) as disk:
        for ranges in WITHIN:
            extents = list(disk.within(ranges))
            for start, end in ranges:
                assert_covers([extent for extent in extents if start <= extent.offset < end], start, end)
            assert sum(extent.length for extent in extents) == sum(end - start for start, end in ranges)
            for extent in extents:
                content = bytearray(extent.length)
                disk.read_extent(extent, memoryview(content))
                assert content == expected[extent.offset : extent.end]
                assert extent.kind == DATA or not any(content)


@pytest.mark.parametrize("name", KINDS)
def test_untouched_space_is_not_called_data(name: str, tmp_path: Path) -> None:
    """Of a disk that does not know its zeros reading finds them."""
    with KINDS[name].open(tmp_path, ORDINARY, [(MIB, b"\x01")]) as disk:
        extents = list(disk.extents())
        if not disk.knows_zeros:
            assert [(one.offset, one.end, one.kind) for one in extents] == [(0, ORDINARY, DATA)]
            pieces = [piece for extent in extents for piece in split(extent, CHUNK)]
            extents = [part for piece in pieces for part in without_zeros(disk, piece)]
            assert_covers(extents, 0, disk.size)
        data = sum(extent.length for extent in extents if extent.kind == DATA)
    assert 0 < data <= 64 * KIB


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", [0, 1, 512, 64 * KIB, 100_000])
def test_zeros_that_reading_finds(case: str, start: int) -> None:
    content = filled(ORDINARY, CASES[case](ORDINARY))
    disk = put(MemoryDisk(ORDINARY), [(0, content)])
    for length in (1, 511, 64 * KIB, 64 * KIB + 1, CHUNK):
        parts = list(without_zeros(disk, Extent(start, length, DATA, host=start)))
        assert_covers(parts, start, start + length)
        for part in parts:
            if part.kind == DATA:
                assert part.host == part.offset
                blocks = split(part, 64 * KIB)
                assert all(any(content[one.offset : one.end]) for one in blocks)
            else:
                assert not any(content[part.offset : part.end])
        assert all(one.kind != other.kind for one, other in itertools.pairwise(parts))


@pytest.mark.parametrize("name", KINDS)
def test_pieces_of_an_extent(name: str, tmp_path: Path) -> None:
    content = noise(ORDINARY)
    with KINDS[name].open(tmp_path, ORDINARY, [(0, content)]) as disk:
        extent = next(disk.extents())
        for start, end in ((0, 1), (1, 513), (4095, 4097), (65_535, 65_537), (100_000, extent.end)):
            piece = extent.cut(start, min(end, start + CHUNK))
            assert through_pipe(partial(disk.send, piece)) == content[piece.offset : piece.end]


@pytest.mark.parametrize("name", KINDS)
def test_what_was_begun_may_be_asked_for_in_any_order_or_not_at_all(name: str, tmp_path: Path) -> None:
    content = noise(ORDINARY)
    with KINDS[name].open(tmp_path, ORDINARY, [(0, content)]) as disk:
        data = [extent for extent in disk.extents() if extent.kind == DATA]
        pieces = [piece for extent in data for piece in split(extent, 64 * KIB)]
        assert len(pieces) > 2 * READS_AHEAD
        for piece in (*pieces, *pieces):
            disk.begin(piece)
        for piece in pieces[READS_AHEAD * 3 // 2 : 2 : -1]:
            assert disk.content(piece) == content[piece.offset : piece.end]
        assert_covers(list(disk.extents()), 0, ORDINARY)
        assert read(disk) == content


@pytest.mark.parametrize("name", WRITABLE)
def test_what_was_begun_before_a_write_is_not_what_was_there_before(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, [(0, noise(ORDINARY))]) as disk:
        whole = Extent(0, CHUNK, DATA)
        disk.begin(whole)
        disk.write(4096, memoryview(b"new"))
        disk.begin(whole)
        assert bytes(disk.content(whole)[4096:4099]) == b"new"
        disk.begin(whole)
        disk.zero(4096, 3)
        assert bytes(disk.content(whole)[4096:4099]) == bytes(3)


@pytest.mark.parametrize("name", KINDS)
def test_close_twice(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, 4096, [(0, b"x")]) as disk:
        read(disk)
        disk.close()
        disk.close()


@pytest.mark.parametrize(("name", "size"), sizes_of(WRITABLE))
def test_flush_shows_everything_to_another_reader(name: str, size: int, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.stored
    with kind.open(tmp_path, size, []) as disk:
        end = disk.size
        expected = noise(end)
        disk.write(0, memoryview(expected))
        disk.flush()
        assert kind.stored(tmp_path, disk) == expected
        disk.zero(0, end // 2)
        disk.write(end - 1, memoryview(b"\x00"))
        disk.flush()
        assert kind.stored(tmp_path, disk) == bytes(end // 2) + expected[end // 2 : -1] + b"\x00"


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
        assert not [extent for extent in inner if extent.kind == DATA and disk.knows_zeros]
        disk.write(512 * KIB, memoryview(b"again"))
        disk.flush()
        assert read(disk, 512 * KIB - 1, 7) == b"\0again\0"


@pytest.mark.parametrize("name", ["file", "raw-nbd", "raw-nbdkit", "qcow2", "nbd-uri"])
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


@pytest.mark.parametrize("name", ["mapped", "mapped-overlay-raw"])
def test_what_is_for_reading_refuses_to_write(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, 4096, []) as disk:
        with pytest.raises(AgentError, match="open for reading"):
            disk.write(0, memoryview(b"x"))
        with pytest.raises(AgentError, match="open for reading"):
            disk.zero(0, 1)


@pytest.mark.parametrize("name", ["file", "raw-nbdkit", "qcow2", "mapped", "mapped-overlay-raw", "nbd-uri"])
def test_a_range_outside_is_refused(name: str, tmp_path: Path) -> None:
    with KINDS[name].open(tmp_path, ORDINARY, []) as disk:
        for start, end in ((-1, 0), (0, ORDINARY + 1), (ORDINARY + 1, None), (2, 1)):
            with pytest.raises(ValueError, match="not within"):
                list(disk.extents(start, end))


MODEL_SIZE = 192 * KIB + 512
"""Bytes; what is opened is shorter by a few, which a raw image's file lacks."""

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
    with KINDS[name].open(tmp_path, MODEL_SIZE - 3 if KINDS[name].unit == SECTOR else MODEL_SIZE, []) as disk:

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


@pytest.mark.parametrize("size", [1, 7, 511, 513, 4097, MIB - 1, MIB + 1])
def test_only_what_qemu_adds_to_a_raw_file_is_made_up(size: int, tmp_path: Path) -> None:
    """Zeros behind the file's end; what is cut off from a file that is open was data, and is an error."""
    path = make_raw(tmp_path / "disk", size, [(0, noise(size))])
    with closing(FileDisk(str(path))) as disk:
        assert disk.size == qemu.info(str(path), "raw")["virtual-size"]
        start = max(0, disk.size - CHUNK)
        whole = Extent(start, disk.size - start, DATA, host=start)
        tail = Extent(size, disk.size - size, DATA, host=size)
        assert through_pipe(partial(disk.send, tail)) == bytes(disk.size - size)
        os.truncate(path, size - 1)
        for piece in (whole, tail._replace(offset=size - 1, length=1, host=size - 1)):
            with pytest.raises(OSError, match="the file ends at"):
                read(disk, piece.offset, piece.length)
            with pytest.raises(OSError, match="the file ends at"):
                through_pipe(partial(disk.send, piece))
        with pytest.raises(OSError, match="the file ends at"):
            list(disk.extents())
        with pytest.raises(OSError, match="the file ends at"):
            disk.readinto(size, memoryview(bytearray(SECTOR)))


def test_a_file_that_grew_is_no_longer_disk(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", 1000, [(0, noise(1000))])
    with closing(FileDisk(str(path))) as disk:
        os.truncate(path, 4096)
        check(disk, noise(1000) + bytes(24))


def test_holes_are_told_from_explicit_zeros(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", MIB)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -z 64k 64k", "-c", "write 256k 64k", str(path)],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    disk = image.MappedDisk(str(path), "qcow2")
    kinds = [(extent.offset, extent.kind) for extent in disk.extents()]
    disk.close()
    assert kinds == [(0, HOLE), (64 * KIB, ZERO), (128 * KIB, HOLE), (256 * KIB, DATA), (320 * KIB, HOLE)]


MOST = 60
PARTS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([DATA, ZERO, HOLE]), st.booleans()), max_size=10)
CUTS = st.lists(st.integers(0, MOST), max_size=12).map(sorted)


@settings(max_examples=200, deadline=None)
@given(PARTS, CUTS, st.booleans())
def test_intersect_against_the_definition(parts: list[tuple[int, str, bool]], cuts: list[int], touching: bool) -> None:
    """Every byte of the ranges is in one extent, of the kind and at the place that it had before."""
    extents, position = [], 0
    for length, kind, stored in parts:
        if length:
            extents.append(Extent(position, length, kind, host=1000 + position if stored else None))
        position += length
    ranges = [list(pair) for pair in itertools.pairwise(cuts)][:: 1 if touching else 2]
    found = list(intersect(iter(extents), ranges))

    def each(extent: Extent) -> Iterator[tuple[int, str, int | None]]:
        for at in range(extent.offset, extent.end):
            yield at, extent.kind, None if extent.host is None else extent.host + at - extent.offset

    wanted = {at for start, end in ranges for at in range(start, end)}
    assert [one for extent in found for one in each(extent)] == [
        one for extent in extents for one in each(extent) if one[0] in wanted
    ]
    assert all(extent.length for extent in found)


@pytest.mark.parametrize("how", ["raw", "qcow2", "compressed"])
def test_an_overlay_says_in_which_file_its_content_lies(how: str, tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base", MIB, [(0, b"y" * 128 * KIB)])
    if how != "raw":
        base = make_qcow2(tmp_path / "base.qcow2", MIB, [(0, b"y" * 128 * KIB)], compress=how == "compressed")
    path = make_overlay(tmp_path / "disk", base, "raw" if how == "raw" else "qcow2", 2 * MIB, [(0, b"x" * 64 * KIB)])
    with closing(image.MappedDisk(str(path), "qcow2")) as disk:
        data = [extent for extent in disk.extents() if extent.kind == DATA]
        assert [(extent.offset, extent.length, extent.layer) for extent in data] == [
            (0, 64 * KIB, 0),
            (64 * KIB, 64 * KIB, 1),
        ]
        assert data[1].compressed == (how == "compressed")
        assert disk.size == 2 * MIB
        assert sent(disk) == b"x" * 64 * KIB + b"y" * 64 * KIB + bytes(2 * MIB - 128 * KIB)
        assert read(disk, MIB - 4, 8) == bytes(8), "beyond the base's end there are zeros"


def test_an_overlay_hides_data_below_by_zeros(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base", MIB, [(0, noise(MIB))])
    path = make_overlay(tmp_path / "disk", base, "raw", MIB)
    with closing(image.StagedImage(str(path))) as disk:
        disk.zero(128 * KIB, 256 * KIB)
        disk.flush()
    with closing(image.MappedDisk(str(path), "qcow2")) as disk:
        check(disk, noise(MIB)[: 128 * KIB] + bytes(256 * KIB) + noise(MIB)[384 * KIB :])
    assert base.read_bytes() == noise(MIB), "what is below is only read"
