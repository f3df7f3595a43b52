"""Find where two images on two hosts differ: the segments that differ first, then the blocks of these.

The images are compared a window at a time. Memory and traffic are bounded for images of any size, and the agents still
have the blocks of a window when they are asked for them: everything is read once.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvm_clone.agent.digests.digest import BLOCK, SEGMENT
from kvm_clone.agent.digests.hashing import KEY_BYTES, SHA256, SIZE
from kvm_clone.agent.disks.disk import joined, thinned
from kvm_clone.gather import together
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image

Ranges = tuple[tuple[int, int], ...]
"""[start, end) pairs in bytes, in ascending order and without overlap."""

_WINDOW = 256 * SEGMENT
"""Bytes compared at a time: 16 GiB, whose blocks' digests take 4 MiB at each end."""

_ASKED = 64
"""Segments whose blocks one call asks for: the answer takes less than 2 MiB."""

OnDone = Callable[[int], None]
"""Receives how many bytes have been compared on both hosts."""


_Method = tuple[str, str]
"""The digest function that both hosts use, and its key in hexadecimal."""


@dataclass(frozen=True)
class Side:
    """An image at one of the two hosts, and what the host's agent finds out about its content.

    Each call raises TransferError and its kinds.
    """

    host: Host
    image: Image

    async def digest(
        self, method: _Method, ranges: Ranges, progress: Callable[[dict[str, Any]], None]
    ) -> dict[int, str]:
        """The digests of the ranges, by segment."""
        return await self.host.agent.digest(self.image.path, self.image.format, method, ranges, progress)

    async def blocks(self, method: _Method, ranges: Ranges) -> dict[int, str]:
        """The digests of the ranges' blocks, by segment."""
        return await self.host.agent.blocks(self.image.path, self.image.format, method, ranges)

    async def data_in(self, ranges: Ranges, *, own: bool = False) -> int:
        """Bytes of content that the image has in the ranges; with `own` those of images below are not counted."""
        path, format_ = self.image.path, self.image.format
        return await self.host.agent.data_in(path, format_, ranges, own=own)

    async def ranges_of(self, *, data: bool) -> Ranges:
        """Where the image has data, or without `data` where it is known to be zero."""
        path, format_ = self.image.path, self.image.format
        return tuple(await self.host.agent.ranges_of(path, format_, data=data))


def _pairs(ranges: Ranges) -> list[list[int]]:
    """The ranges as a message can have them."""
    return [list(pair) for pair in ranges]


async def differing(one: Side, other: Side, ranges: Ranges, on_done: OnDone) -> Ranges:
    """Return the parts of the ranges whose content differs, as whole blocks. Raises TransferError and its kinds."""
    found: list[tuple[int, int]] = []
    done = 0
    method = await _agreed(one, other) if ranges else ("", "")
    for window in windows(ranges):
        more = await _in_window(one, other, method, window, lambda count, before=done: on_done(before + count))  # type: ignore[misc]
        for start, end in more:
            add(found, start, end)
        done += total(window)
        on_done(done)
        found = thinned(found, BLOCK)
    return tuple(found)


async def _agreed(one: Side, other: Side) -> _Method:
    """Return the fastest digest function that both hosts have, and a new key that no content was chosen for."""
    ours, theirs = await together(one.host.agent.digests(), other.host.agent.digests())
    return next((name for name in ours if name in theirs), SHA256), secrets.token_hex(KEY_BYTES)


async def _in_window(one: Side, other: Side, method: _Method, window: Ranges, on_done: OnDone) -> list[tuple[int, int]]:
    state = [0, 0]

    def progress_of(end: int) -> Callable[[dict[str, Any]], None]:
        def progress(answer: dict[str, Any]) -> None:
            state[end] = answer["done"]
            on_done(min(state))

        return progress

    ours, theirs = await together(
        one.digest(method, window, progress_of(0)), other.digest(method, window, progress_of(1))
    )
    segments = sorted(at for at in ours.keys() | theirs.keys() if ours.get(at) != theirs.get(at))
    found: list[tuple[int, int]] = []
    for first in range(0, len(segments), _ASKED):
        wanted = within_segments(window, set(segments[first : first + _ASKED]))
        ours, theirs = await together(one.blocks(method, wanted), other.blocks(method, wanted))
        for start, end in differing_blocks(wanted, ours, theirs):
            add(found, start, end)
    return found


def differing_blocks(ranges: Ranges, ours: dict[int, str], theirs: dict[int, str]) -> Iterator[tuple[int, int]]:
    """Yield the blocks whose digests differ, of ranges that each lie in one segment.

    `ours`, `theirs`: by segment, the digests of the blocks that the ranges have in it, joined, in base64.
    """
    used: dict[int, int] = {}
    mine = {at: base64.b64decode(text) for at, text in ours.items()}
    other = {at: base64.b64decode(text) for at, text in theirs.items()}
    for start, end in ranges:
        segment = start - start % SEGMENT
        for block in range(start, end, BLOCK):
            at = used.get(segment, 0)
            used[segment] = at + SIZE
            if mine[segment][at : at + SIZE] != other[segment][at : at + SIZE]:
                yield block, min(block + BLOCK, end)


def windows(ranges: Ranges) -> Iterator[Ranges]:
    """Yield the ranges in lists that each span at most a window, cut at the borders of segments."""
    window: list[tuple[int, int]] = []
    for start, end in ranges:
        while start < end:
            if window and start >= window[0][0] - window[0][0] % SEGMENT + _WINDOW:
                yield tuple(window)
                window = []
            first = window[0][0] if window else start
            stop = min(end, first - first % SEGMENT + _WINDOW)
            window.append((start, stop))
            start = stop
    if window:
        yield tuple(window)


def within_segments(ranges: Ranges, segments: set[int]) -> Ranges:
    """Return the parts of the ranges that lie in these segments, cut at the borders of segments."""
    return tuple(
        (max(at, start), min(at + SEGMENT, end))
        for start, end in ranges
        for at in range(start - start % SEGMENT, end, SEGMENT)
        if at in segments
    )


def add(found: list[tuple[int, int]], start: int, end: int) -> None:
    """Append a range that comes after all others, joined to the last one if they touch."""
    if found and found[-1][1] == start:
        found[-1] = (found[-1][0], end)
    else:
        found.append((start, end))


def aligned(ranges: Sequence[Sequence[int]], size: int) -> Ranges:
    """Return the ranges widened to whole blocks of a disk of `size` bytes, joined where they touch."""
    widened = ((start - start % BLOCK, min(size, -(-end // BLOCK) * BLOCK)) for start, end in ranges)
    return tuple(thinned(joined((low, high) for low, high in widened if low < high), BLOCK))


def total(ranges: Sequence[Sequence[int]]) -> int:
    """Return how many bytes the ranges have."""
    return sum(end - start for start, end in ranges)


def union(one: Ranges, other: Ranges) -> Ranges:
    """Return the ranges of both, joined where they touch."""
    return tuple(joined(sorted((*one, *other))))


def complement(ranges: Ranges, size: int) -> Ranges:
    """What the ranges, which are in order and apart, leave out of [0, size)."""
    ends = [0, *(end for pair in ranges for end in pair), size]
    return tuple((start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end)


def whole_blocks(ranges: Ranges, size: int) -> Ranges:
    """The ranges without the parts of blocks at their ends; the disk's last block may be short."""
    cut = ((-(-start // BLOCK) * BLOCK, end if end == size else end - end % BLOCK) for start, end in ranges)
    return tuple((start, end) for start, end in cut if start < end)


def common(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Ranges:
    """Return the parts that both have."""
    found: list[tuple[int, int]] = []
    ours, theirs = iter(one), iter(other)
    a, b = next(ours, None), next(theirs, None)
    while a is not None and b is not None:
        start, end = max(a[0], b[0]), min(a[1], b[1])
        if start < end:
            found.append((start, end))
        if a[1] <= b[1]:
            a = next(ours, None)
        else:
            b = next(theirs, None)
    return tuple(found)
