"""Digests of a disk's content that do not depend on its format or on where its holes are.

The disk is cut into segments of SEGMENT bytes, a segment into blocks of BLOCK bytes. A block's digest is that of what
the guest reads there, by a keyed function (hashing.py); a segment's digest is SHA-256 over its blocks' digests, in
order. Two hosts compare the segments first, and the blocks of those that differ: what crosses the network stays small
for disks of any size. What is known to be zero costs no reading: its digests are computed once.
"""

from __future__ import annotations

import hashlib
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from kvm_clone.agent.digests import hashing
from kvm_clone.agent.digests.hashing import Digest, How
from kvm_clone.agent.disks.disk import DATA, Disk, Extent, Ranges, ahead, split
from kvm_clone.agent.protocol.wire import CHUNK

BLOCK = 64 * 1024
"""Bytes. The least that a difference is known by: qcow2's default cluster, so that a delta fills whole clusters."""

SEGMENT = 1024 * BLOCK
"""Bytes. A disk of 1 TiB has 16,384 digests of 32 bytes: small to compare, and few blocks to ask for in turn."""


class Segment(NamedTuple):
    """The digests of what was asked for of one segment.

    `offset`: the segment's first byte. `length`: the bytes digested. `blocks`: the digests of its blocks, joined.
    """

    offset: int
    length: int
    digest: bytes
    blocks: bytes


def segments(disk: Disk, how: How, ranges: Optional[Ranges] = None) -> Iterator[Segment]:
    """The digests of each segment that the ranges touch, in order.

    `ranges`: [start, end) pairs in order and apart, cut at blocks or at the disk's end; None is the whole disk.
    Raises OSError, AgentError.
    """
    with hashing.opened(how) as digest:
        digester = _Digester(disk, digest)
        for parts in _grouped(disk, [(0, disk.size)] if ranges is None else ranges):
            offset = parts[0].offset - parts[0].offset % SEGMENT
            length = sum(part.length for part in parts)
            yield Segment(offset, length, *digester.segment(parts))


def _grouped(disk: Disk, ranges: Ranges) -> Iterator[List[Extent]]:
    """The extents within the ranges, in one list for each segment."""
    group: List[Extent] = []
    for extent in disk.within(ranges):
        for piece in split(extent, SEGMENT):
            if group and piece.offset // SEGMENT != group[0].offset // SEGMENT:
                yield group
                group = []
            group.append(piece)
    if group:
        yield group


def _runs(parts: List[Extent]) -> Iterator[List[Extent]]:
    """The parts cut at chunks, in lists that lie within one chunk and have no gap."""
    run: List[Extent] = []
    for part in parts:
        for piece in split(part, CHUNK):
            if run and (piece.offset != run[-1].end or piece.offset % CHUNK == 0):
                yield run
                run = []
            run.append(piece)
    yield run


def _lengths(parts: List[Extent]) -> Iterator[int]:
    """The lengths of the stretches without a gap that the parts make up."""
    start = end = parts[0].offset
    for part in parts:
        if part.offset != end:
            yield end - start
            start = part.offset
        end = part.end
    yield end - start


class _Digester:
    """Digests one disk, with the buffer that it is read into and the digests of zeros."""

    def __init__(self, disk: Disk, digest: Digest) -> None:
        self._disk = disk
        self._digest = digest
        self._buffer = memoryview(bytearray(CHUNK))
        self._zeros: Dict[int, bytes] = {}
        self._zero_segments: Dict[Tuple[int, ...], Tuple[bytes, bytes]] = {}

    def segment(self, parts: List[Extent]) -> Tuple[bytes, bytes]:
        """The digest of what the parts, which lie in one segment, hold, and those of its blocks, joined."""
        if any(part.kind == DATA for part in parts):
            return _with_digest(b"".join(map(self._blocks, ahead(self._disk, _runs(parts)))))
        lengths = tuple(_lengths(parts))
        if lengths not in self._zero_segments:
            self._zero_segments[lengths] = _with_digest(b"".join(map(self._zero_blocks, lengths)))
        return self._zero_segments[lengths]

    def _blocks(self, run: List[Extent]) -> bytes:
        """The digests of the run's blocks, joined; it starts at a block and lies within a chunk."""
        start, length = run[0].offset, run[-1].end - run[0].offset
        data = [part for part in run if part.kind == DATA]
        if not data:
            return self._zero_blocks(length)
        if len(run) == 1:
            view = self._disk.content(run[0])
            return b"".join([self._digest(view[at : at + BLOCK]) for at in range(0, length, BLOCK)])
        view = self._buffer[:length]
        held = _held(data, start, length)
        for at, count in held.items():
            block = view[at : at + BLOCK]
            if count < len(block):
                block[:] = bytes(len(block))
        for part in data:
            self._disk.read_extent(part, view[part.offset - start : part.end - start])
        return b"".join(
            [
                self._digest(view[at : at + BLOCK]) if at in held else self._zero_block(min(BLOCK, length - at))
                for at in range(0, length, BLOCK)
            ]
        )

    def _zero_blocks(self, length: int) -> bytes:
        whole, rest = divmod(length, BLOCK)
        return (self._zero_block(BLOCK) * whole if whole else b"") + (self._zero_block(rest) if rest else b"")

    def _zero_block(self, length: int) -> bytes:
        if length not in self._zeros:
            self._zeros[length] = self._digest(memoryview(bytearray(length)))
        return self._zeros[length]


def _with_digest(blocks: bytes) -> Tuple[bytes, bytes]:
    return hashlib.sha256(blocks).digest(), blocks


def _held(data: List[Extent], start: int, length: int) -> Dict[int, int]:
    """How many bytes of data each block has that has any, by its first byte, counted from `start` as `length` is."""
    held: Dict[int, int] = {}
    for part in data:
        low, high = part.offset - start, min(part.end - start, length)
        for at in range(low - low % BLOCK, high, BLOCK):
            held[at] = held.get(at, 0) + min(high, at + BLOCK) - max(low, at)
    return held
