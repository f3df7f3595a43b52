"""The one contract that everything which holds a disk's content keeps, and the disk in memory that tests use.

Content is what the guest sees. tests/agent/test_disk_contract.py holds every kind to this contract.
"""

from __future__ import annotations

import abc
import os
from collections import deque
from typing import Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK, write_all

DATA, ZERO, HOLE = "data", "zero", "hole"

Ranges = Sequence[Sequence[int]]
"""[start, end) pairs in bytes, in order and apart."""


class Extent(NamedTuple):
    """A range of a disk, in bytes, and what is known of it without reading.

    `kind`: DATA may hold anything; ZERO reads as zeros and takes space; HOLE reads as zeros and takes none.
    `host`: where the range lies in the disk's file, when it lies there as the guest sees it; `layer`: in which file of
    the backing chain, counted from the top.
    """

    offset: int
    length: int
    kind: str
    host: Optional[int] = None
    compressed: bool = False
    layer: int = 0

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.offset + self.length

    def cut(self, start: int, end: int) -> Extent:
        """The part of this extent within [start, end), which must overlap it."""
        low, high = max(self.offset, start), min(self.end, end)
        if high - low == self.length:
            return self
        host = None if self.host is None else self.host + low - self.offset
        return Extent(low, high - low, self.kind, host, self.compressed, self.layer)


class Disk(abc.ABC):
    """A disk of `size` bytes. Offsets and lengths are in bytes, of any alignment, within the size."""

    size: int
    knows_zeros: bool = True
    """Whether `extents` tells ranges of zeros from others as far as storage does; else all is data."""

    _buffer: Optional[bytearray] = None

    @abc.abstractmethod
    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """Extents in order that cover [start, end) (to the disk's end when None) without gap or overlap."""

    def within(self, ranges: Ranges) -> Iterator[Extent]:
        """Extents in order that cover the ranges without gap or overlap."""
        for start, end in ranges:
            yield from self.extents(start, end)

    @abc.abstractmethod
    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the content at `offset`. Raises OSError."""

    @abc.abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`. May return before it is done; `flush` reports what went wrong. Raises OSError."""

    @abc.abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without taking space where that can be had. Raises OSError."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Return when everything written is durable. Raises OSError for any write that failed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. Can be called again."""

    def read_extent(self, extent: Extent, view: memoryview) -> None:
        """Fill `view` with the extent's content; kinds that know a shorter way than `readinto` take it."""
        self.readinto(extent.offset, view)

    def begin(self, extent: Extent) -> None:  # noqa: B027 - most kinds have nothing to begin
        """Begin to read a data extent of at most CHUNK bytes of which the content is asked for later, as it is given.

        Kinds that cannot do several things at a time do nothing. See `ahead`.
        """

    def content(self, extent: Extent) -> memoryview:
        """The content of a data extent of at most CHUNK bytes, valid until the next call. Raises OSError."""
        if self._buffer is None:
            self._buffer = bytearray(CHUNK)
        view = memoryview(self._buffer)[: extent.length]
        self.read_extent(extent, view)
        return view

    def send(self, extent: Extent, out: int) -> None:
        """Write the content of a data extent of at most CHUNK bytes to the file descriptor `out`."""
        write_all(out, self.content(extent))

    def receive(self, offset: int, length: int, source: Incoming) -> None:
        """Write the next `length` (at most CHUNK) bytes of `source` at `offset`. Raises EOFError, OSError."""
        data = source.read(length)
        if len(data) != length:
            raise EOFError("the stream ended before a record's content")
        self.write(offset, memoryview(data))


READS_AHEAD = 8
"""Reads of a disk that are begun before the first is waited for: of CHUNK bytes each at most, which is 8 MiB."""


def ahead(disk: Disk, runs: Iterable[List[Extent]]) -> Iterator[List[Extent]]:
    """The runs, in order, when the reading of the next READS_AHEAD runs' data has begun too."""
    waiting: Deque[List[Extent]] = deque()
    for run in runs:
        for extent in run:
            if extent.kind == DATA:
                disk.begin(extent)
        waiting.append(run)
        if len(waiting) >= READS_AHEAD:
            yield waiting.popleft()
    yield from waiting


def zero_data(disk: Disk, start: int, end: int) -> None:
    """Make the range read as zeros; what does so already is left alone, so that an image does not grow by it."""
    for extent in list(disk.extents(start, end)):
        if extent.kind == DATA:
            disk.zero(extent.offset, extent.length)


ZERO_BLOCK = 1 << 16
"""Bytes in which zeros are looked for where `knows_zeros` is not so."""

_ZEROS = bytes(ZERO_BLOCK)


def without_zeros(disk: Disk, piece: Extent) -> Iterator[Extent]:
    """The data extent of at most CHUNK bytes in parts that have data, and parts of whole blocks that read as zeros."""
    content = disk.content(piece)
    blocks = list(split(piece, ZERO_BLOCK))
    kinds = [
        HOLE if _ZEROS.startswith(content[one.offset - piece.offset : one.end - piece.offset]) else DATA
        for one in blocks
    ]
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or kinds[end] != kinds[start]:
            part = piece.cut(blocks[start].offset, blocks[end - 1].end)
            yield part if kinds[start] == DATA else part._replace(kind=HOLE, host=None)
            start = end


def split(extent: Extent, unit: int) -> Iterator[Extent]:
    """The extent in pieces of at most `unit` bytes that end at multiples of it."""
    position = extent.offset
    while position < extent.end:
        end = min(extent.end, position - position % unit + unit)
        yield extent.cut(position, end)
        position = end


def intersect(extents: Iterable[Extent], ranges: Ranges) -> Iterator[Extent]:
    """The parts of the extents, which are in order, that lie within the ranges."""
    remaining = (pair for pair in ranges if pair[0] < pair[1])
    start, end = next(remaining, (0, 0))
    for extent in extents:
        while start < end and start < extent.end:
            if end > extent.offset:
                yield extent.cut(start, end)
            if end > extent.end:
                break
            start, end = next(remaining, (0, 0))


MOST_RANGES = 100_000
"""More ranges than this are reported less finely: a list of them has to fit into one message."""


def joined(ranges: Iterable[Tuple[int, int]], gap: int = 0) -> List[Tuple[int, int]]:
    """The ranges, which come in order, joined where they overlap, touch, or are at most `gap` bytes apart."""
    found: List[Tuple[int, int]] = []
    for start, end in ranges:
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def union(one: Ranges, other: Ranges) -> List[Tuple[int, int]]:
    """What lies in either, in order and apart."""
    return joined(sorted((start, end) for start, end in (*one, *other) if start < end))


def thinned(ranges: Iterable[Tuple[int, int]], gap: int) -> List[Tuple[int, int]]:
    """The same ranges; if there are too many, those joined that are at most `gap` bytes apart, or more if need be.

    Never holds more than twice as many as are reported.
    """
    found: List[Tuple[int, int]] = []
    reach = 0
    for one in ranges:
        found.append(one)
        if len(found) > 2 * MOST_RANGES:
            found, reach = _fewer(found, reach, gap)
    return _fewer(found, reach, gap)[0]


def _fewer(ranges: List[Tuple[int, int]], reach: int, gap: int) -> Tuple[List[Tuple[int, int]], int]:
    """At most MOST_RANGES, and how far apart may be what is joined next; at first only what touches is joined."""
    while len(ranges) > MOST_RANGES:
        ranges, reach = joined(ranges, reach), 2 * reach or gap
    return ranges, reach


class MemoryDisk(Disk):
    """A disk in memory, with holes of BLOCK bytes. For tests."""

    BLOCK = 4096

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: Dict[int, bytearray] = {}

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk."""
        end = self.size if end is None else end
        position = start
        while position < end:
            held = position // self.BLOCK in self._blocks
            stop = position
            while stop < end and (stop // self.BLOCK in self._blocks) == held:
                stop = min(end, stop - stop % self.BLOCK + self.BLOCK)
            yield Extent(position, stop - position, DATA if held else HOLE)
            position = stop

    def _pieces(self, offset: int, length: int) -> Iterator[Tuple[int, int, int]]:
        """(block, start in block, length) for each block that the range touches."""
        position = offset
        while position < offset + length:
            start = position % self.BLOCK
            count = min(self.BLOCK - start, offset + length - position)
            yield position // self.BLOCK, start, count
            position += count

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        done = 0
        for block, start, count in self._pieces(offset, len(view)):
            held = self._blocks.get(block)
            view[done : done + count] = held[start : start + count] if held else bytes(count)
            done += count

    def write(self, offset: int, data: memoryview) -> None:
        """See Disk."""
        done = 0
        for block, start, count in self._pieces(offset, len(data)):
            held = self._blocks.setdefault(block, bytearray(self.BLOCK))
            held[start : start + count] = data[done : done + count]
            done += count

    def zero(self, offset: int, length: int) -> None:
        """See Disk."""
        for block, start, count in self._pieces(offset, length):
            if count == self.BLOCK:
                self._blocks.pop(block, None)
            elif block in self._blocks:
                self._blocks[block][start : start + count] = bytes(count)

    def flush(self) -> None:
        """See Disk."""

    def close(self) -> None:
        """See Disk."""


def bounded(disk: Disk, start: int, end: Optional[int]) -> Tuple[int, int]:
    """The range [start, end) with None meaning the disk's end; raises ValueError when it is not within the disk."""
    stop = disk.size if end is None else end
    if not 0 <= start <= stop <= disk.size:
        raise ValueError(f"the range {start}..{stop} is not within a disk of {disk.size} bytes")
    return start, stop


def open_flags(writable: bool) -> int:
    """How image files are opened: never inherited by a child, never through a link when written.

    O_NONBLOCK: a path may have become a FIFO's, which would be waited for.
    """
    return (os.O_RDWR | os.O_NOFOLLOW if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
