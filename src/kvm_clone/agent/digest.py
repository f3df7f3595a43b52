"""Digests of a disk's content that do not depend on its format or on where its holes are.

The disk is cut into segments of SEGMENT bytes, a segment into blocks of BLOCK bytes. A block's digest is SHA-256 of
what the guest reads there; a segment's digest is SHA-256 over its blocks' digests, in order. Two hosts compare the
segments first, and the blocks of those that differ: what crosses the network stays small for disks of any size. What
is known to be zero costs no reading: its digests are computed once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Iterator, List, NamedTuple, Optional, Tuple

from .disk import DATA, Disk, Extent, Ranges, split
from .wire import CHUNK

BLOCK = 64 * 1024
"""Bytes. The least that a difference is known by: qcow2's default cluster, so that a delta fills whole clusters."""

SEGMENT = 1024 * BLOCK
"""Bytes. A disk of 1 TiB has 16,384 digests of 32 bytes: small to compare, and few blocks to ask for in turn."""

SIZE = hashlib.sha256().digest_size
"""Bytes of one digest."""


class Segment(NamedTuple):
    """The digests of what was asked for of one segment.

    `offset`: the segment's first byte. `length`: the bytes digested. `blocks`: the digests of its blocks, joined.
    """

    offset: int
    length: int
    digest: bytes
    blocks: bytes


def segments(disk: Disk, ranges: Optional[Ranges] = None) -> Iterator[Segment]:
    """The digests of each segment that the ranges touch, in order.

    `ranges`: [start, end) pairs in order and apart, cut at blocks or at the disk's end; None is the whole disk.
    Raises OSError, AgentError.
    """
    buffer = memoryview(bytearray(CHUNK))
    for parts in _grouped(disk, [(0, disk.size)] if ranges is None else ranges):
        offset = parts[0].offset - parts[0].offset % SEGMENT
        length = sum(part.length for part in parts)
        if any(part.kind == DATA for part in parts):
            blocks = b"".join(_blocks(disk, run, buffer) for run in _runs(parts))
            yield Segment(offset, length, hashlib.sha256(blocks).digest(), blocks)
        else:
            yield Segment(offset, length, *_zeros(tuple(_lengths(parts))))


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


def _blocks(disk: Disk, run: List[Extent], buffer: memoryview) -> bytes:
    """The digests of the run's blocks, joined; it starts at a block and lies within a chunk."""
    start, length = run[0].offset, run[-1].end - run[0].offset
    data = [part for part in run if part.kind == DATA]
    if not data:
        return _zero_blocks(length)
    view = buffer[:length]
    if sum(part.length for part in data) < length:
        view[:] = bytes(length)
    for part in data:
        disk.read_extent(part, view[part.offset - start : part.end - start])
    return b"".join(hashlib.sha256(view[at : at + BLOCK]).digest() for at in range(0, length, BLOCK))


@functools.lru_cache(maxsize=64)
def _zero_blocks(length: int) -> bytes:
    whole, rest = divmod(length, BLOCK)
    tail = hashlib.sha256(bytes(rest)).digest() if rest else b""
    return (hashlib.sha256(bytes(BLOCK)).digest() * whole if whole else b"") + tail


@functools.lru_cache(maxsize=64)
def _zeros(lengths: Tuple[int, ...]) -> Tuple[bytes, bytes]:
    """A segment's digest and its blocks', where stretches of these lengths are zero."""
    blocks = b"".join(_zero_blocks(length) for length in lengths)
    return hashlib.sha256(blocks).digest(), blocks
