"""Digests of a disk's content that do not depend on its format or on where its holes are.

The disk is cut into segments of SEGMENT bytes, a segment into chunks of CHUNK bytes. A chunk's digest is SHA-256 of
what the guest reads there; a segment's digest is SHA-256 over its chunks' digests, in order. What is known to be zero
costs no reading: its digests are computed once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Iterator, List, Optional

from .disk import DATA, Disk, Extent, bounded, split
from .wire import CHUNK

SEGMENT = 64 * CHUNK
"""Bytes. A disk of 1 TiB has 16,384 digests of 32 bytes: small to compare, and a difference is named closely."""


@functools.lru_cache(maxsize=64)
def _zero_chunk(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


@functools.lru_cache(maxsize=4)
def _zero_segment(length: int) -> bytes:
    whole, rest = divmod(length, CHUNK)
    chunks = _zero_chunk(CHUNK) * whole + (_zero_chunk(rest) if rest else b"")
    return hashlib.sha256(chunks).digest()


def segments(disk: Disk, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
    """The digest of each segment of [start, end), in order; `start` is a segment's first byte.

    Raises OSError, AgentError.
    """
    buffer = memoryview(bytearray(CHUNK))
    start, stop = bounded(disk, start, end)
    for at, parts in zip(range(start, stop, SEGMENT), _grouped(disk, start, stop, SEGMENT)):
        length = min(SEGMENT, stop - at)
        if any(part.kind == DATA for part in parts):
            yield _segment(disk, at, length, parts, buffer)
        else:
            yield _zero_segment(length)


def _grouped(disk: Disk, start: int, stop: int, unit: int) -> Iterator[List[Extent]]:
    """The extents of [start, stop), cut at multiples of `unit`, in one list for each unit."""
    group: List[Extent] = []
    for extent in disk.extents(start, stop):
        for piece in split(extent, unit):
            group.append(piece)
            if piece.end % unit == 0:
                yield group
                group = []
    if group:
        yield group


def _segment(disk: Disk, start: int, length: int, parts: List[Extent], buffer: memoryview) -> bytes:
    whole = hashlib.sha256()
    data = [part for part in parts if part.kind == DATA]
    first = 0
    for at in range(start, start + length, CHUNK):
        end = min(at + CHUNK, start + length)
        while first < len(data) and data[first].end <= at:
            first += 1
        here = []
        for part in data[first:]:
            if part.offset >= end:
                break
            here.append(part.cut(at, end))
        whole.update(_chunk(disk, at, end - at, here, buffer) if here else _zero_chunk(end - at))
    return whole.digest()


def _chunk(disk: Disk, at: int, length: int, data: List[Extent], buffer: memoryview) -> bytes:
    view = buffer[:length]
    if sum(part.length for part in data) < length:
        view[:] = bytes(length)
    for part in data:
        disk.read_extent(part, view[part.offset - at : part.end - at])
    return hashlib.sha256(view).digest()
