"""compare.py against naive definitions, byte by byte, over small disks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent.disks import disk as agent_disk
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image
from kvm_clone.transfer import compare
from kvm_clone.transfer.compare import Ranges

BLOCK, SEGMENT, WINDOW = 4, 16, 48
SIZE = 16
MOST = 150
"""Bytes of the largest disk here: nine segments and a part of one, three windows and a part of one."""

PROPERTY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "BLOCK", BLOCK)
        patched.setattr(compare, "SEGMENT", SEGMENT)
        patched.setattr(compare, "_WINDOW", WINDOW)
        patched.setattr(compare, "_ASKED", 2)
        yield


def bytes_in(ranges: Any) -> set[int]:
    return {at for start, end in ranges for at in range(start, end)}


def runs(wanted: set[int]) -> Ranges:
    """The bytes as ranges in order and apart."""
    found: list[tuple[int, int]] = []
    for at in sorted(wanted):
        compare.add(found, at, at + 1)
    return tuple(found)


def assert_in_order_and_apart(ranges: Any, least_gap: int = 1) -> None:
    position = -least_gap
    for start, end in ranges:
        assert position + least_gap <= start < end
        position = end


@st.composite
def block_ranges(draw: st.DrawFn, size: int) -> Ranges:
    """Ranges cut at blocks, or at the disk's end."""
    blocks = draw(st.sets(st.integers(0, max(0, (size - 1) // BLOCK)))) if size else set()
    return runs({at for block in blocks for at in range(block * BLOCK, min(size, block * BLOCK + BLOCK))})


sized_ranges = st.integers(0, MOST).flatmap(lambda size: st.tuples(st.just(size), block_ranges(size)))
any_ranges = st.lists(st.tuples(st.integers(0, MOST), st.integers(0, 20)), max_size=12).map(
    lambda pairs: tuple((start, start + length) for start, length in sorted(pairs))
)


@PROPERTY
@given(sized_ranges)
def test_windows(sized: tuple[int, Ranges]) -> None:
    _, ranges = sized
    found = list(compare.windows(ranges))
    assert [pair for window in found for pair in window if pair[0] >= pair[1]] == []
    assert sorted(at for window in found for pair in window for at in range(*pair)) == sorted(bytes_in(ranges))
    ends = []
    for window in found:
        assert window
        first = window[0][0] - window[0][0] % SEGMENT
        assert window[-1][1] <= first + WINDOW
        ends.append((first, window[-1][1]))
    segments = [{at // SEGMENT for at in bytes_in(window)} for window in found]
    for one, other in itertools.pairwise(segments):
        assert max(one) < min(other), "a segment is asked for once"


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ((), []),
        (((0, 48),), [((0, 48),)]),
        (((0, 49),), [((0, 48),), ((48, 49),)]),
        (((20, 100),), [((20, 64),), ((64, 100),)]),
        (((0, 4), (44, 52)), [((0, 4), (44, 48)), ((48, 52),)]),
        (((0, 4), (140, 144)), [((0, 4),), ((140, 144),)]),
        (((12, 16), (56, 60), (64, 68)), [((12, 16),), ((56, 60), (64, 68))]),
    ],
)
def test_windows_by_example(ranges: Ranges, expected: list[Ranges]) -> None:
    assert list(compare.windows(ranges)) == expected


@PROPERTY
@given(sized_ranges, st.sets(st.integers(0, MOST // SEGMENT)))
def test_within_segments(sized: tuple[int, Ranges], numbers: set[int]) -> None:
    _, ranges = sized
    found = compare.within_segments(ranges, {number * SEGMENT for number in numbers})
    assert bytes_in(found) == {at for at in bytes_in(ranges) if at // SEGMENT in numbers}
    assert_in_order_and_apart(found, least_gap=0)
    assert all(start // SEGMENT == (end - 1) // SEGMENT for start, end in found)


def blocks_of(content: bytes, ranges: Ranges, key: bytes = b"") -> dict[int, bytes]:
    """By segment, the digests of the blocks that the ranges have in it, joined."""
    found: dict[int, bytes] = {}
    for start, end in ranges:
        for at in range(start, end, BLOCK):
            segment = at - at % SEGMENT
            digest = hashlib.sha256(key + content[at : min(at + BLOCK, end)]).digest()[:SIZE]
            found[segment] = found.get(segment, b"") + digest
    return found


def segments_of(content: bytes, ranges: Ranges, key: bytes) -> dict[int, str]:
    return {at: hashlib.sha256(blocks).hexdigest() for at, blocks in blocks_of(content, ranges, key).items()}


def as_text(blocks: dict[int, bytes]) -> dict[int, str]:
    return {at: base64.b64encode(one).decode() for at, one in blocks.items()}


def unlike(one: bytes, other: bytes, ranges: Ranges) -> Ranges:
    """The definition: the blocks of the ranges that are not the same at both ends."""
    wanted: set[int] = set()
    for start, end in ranges:
        for at in range(start, end, BLOCK):
            stop = min(at + BLOCK, end)
            if one[at:stop] != other[at:stop]:
                wanted |= set(range(at, stop))
    return runs(wanted)


@st.composite
def two_disks(draw: st.DrawFn) -> tuple[bytes, bytes, Ranges]:
    size = draw(st.integers(0, MOST))
    one = draw(st.binary(min_size=size, max_size=size))
    other = bytearray(one)
    for at in draw(st.sets(st.integers(0, max(0, size - 1)), max_size=12)) if size else ():
        other[at] ^= 1
    ranges = draw(st.just(((0, size),)) | block_ranges(size)) if size else ()
    return one, bytes(other), ranges


@PROPERTY
@given(two_disks())
def test_differing_blocks(disks: tuple[bytes, bytes, Ranges]) -> None:
    one, other, ranges = disks
    cut = compare.within_segments(ranges, set(range(0, MOST, SEGMENT)))
    ours, theirs = as_text(blocks_of(one, cut)), as_text(blocks_of(other, cut))
    found = list(compare.differing_blocks(cut, ours, theirs))
    assert bytes_in(found) == bytes_in(unlike(one, other, ranges))


class Agent:
    """A host whose agent digests a disk in memory, and that counts what it is asked."""

    name = "a"

    def __init__(self, content: bytes, methods: tuple[str, ...] = ("fast", "sha256")) -> None:
        self.content = content
        self.methods = methods
        self.agent = AgentClient(self)
        self.heard: set[tuple[str, str]] = set()
        self.asked: dict[str, int] = {"digest": 0, "blocks": 0}

    async def call(
        self, call: str, progress: Callable[[dict[str, Any]], None] | None = None, /, **arguments: Any
    ) -> Any:
        await asyncio.sleep(0)
        if call == "digests":
            return list(self.methods)
        ranges = tuple((start, end) for start, end in arguments["ranges"])
        method, text = arguments["how"]
        assert method in self.methods
        self.heard.add((method, text))
        key = method.encode() + bytes.fromhex(text)
        assert_in_order_and_apart(ranges, least_gap=0)
        assert len({at // SEGMENT for at in bytes_in(ranges)}) <= (WINDOW // SEGMENT if call == "digest" else 2)
        self.asked[call] += compare.total(ranges)
        if progress is not None:
            progress({"done": compare.total(ranges)})
        if call == "digest":
            return [list(one) for one in segments_of(self.content, ranges, key).items()]
        return [list(one) for one in as_text(blocks_of(self.content, ranges, key)).items()]

    @property
    def side(self) -> compare.Side:
        return compare.Side(cast(Host, self), Image("/disk", "raw"))


def compared(one: Agent, other: Agent, ranges: Ranges) -> tuple[Ranges, list[int]]:
    """What differs, and the progress that was heard of."""
    heard: list[int] = []
    return asyncio.run(compare.differing(one.side, other.side, ranges, heard.append)), heard


@PROPERTY
@given(two_disks())
def test_differing_against_the_definition(disks: tuple[bytes, bytes, Ranges]) -> None:
    one, other = Agent(disks[0]), Agent(disks[1])
    ranges = disks[2]
    found, heard = compared(one, other, ranges)
    assert found == unlike(*disks)
    assert heard == sorted(heard)
    assert not ranges or heard[-1] == compare.total(ranges)
    assert one.asked == other.asked
    assert one.asked["digest"] == compare.total(ranges), "everything is digested once"
    if not found:
        assert one.asked["blocks"] == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        (("fast", "sha256"), ("fast", "sha256"), "fast"),
        (("fast", "sha256"), ("sha256",), "sha256"),
        (("sha256",), ("fast", "sha256"), "sha256"),
        (("other", "fast", "sha256"), ("fast", "other", "sha256"), "other"),
    ],
)
def test_both_ends_digest_by_what_both_have(ours: tuple[str, ...], theirs: tuple[str, ...], agreed: str) -> None:
    content = bytes(range(50))
    one, other = Agent(content, ours), Agent(content[:-1] + b"x", theirs)
    assert compared(one, other, ((0, 50),))[0] == ((48, 50),)
    assert one.heard == other.heard
    assert {method for method, _ in one.heard} == {agreed}


def test_each_comparison_has_a_key_of_its_own() -> None:
    one, other = Agent(bytes(50)), Agent(bytes(50))
    for count in (1, 2):
        compared(one, other, ((0, 50),))
        assert one.heard == other.heard
        assert len(one.heard) == count


@PROPERTY
@given(any_ranges, st.integers(0, MOST))
def test_aligned(ranges: Ranges, size: int) -> None:
    found = compare.aligned(ranges, size)
    blocks = {at // BLOCK for at in bytes_in(ranges) if at < size}
    whole = {at for block in blocks for at in range(block * BLOCK, min(size, block * BLOCK + BLOCK))}
    assert whole <= bytes_in(found)
    touched = {at // BLOCK for start, end in ranges for at in range(start, max(end, start + 1))}
    assert bytes_in(found) <= {at for at in range(size) if at // BLOCK in touched}, "no block that none touches"
    assert_in_order_and_apart(found)
    assert all(start % BLOCK == 0 and (end % BLOCK == 0 or end == size) for start, end in found)


@PROPERTY
@given(st.integers(0, MOST).flatmap(lambda size: st.tuples(block_ranges(size), block_ranges(size))))
def test_union(both: tuple[Ranges, Ranges]) -> None:
    found = compare.union(*both)
    assert found == runs(bytes_in(both[0]) | bytes_in(both[1]))
    assert found == compare.union(both[1], both[0])


@PROPERTY
@given(st.integers(0, MOST).flatmap(lambda size: st.tuples(block_ranges(size), block_ranges(size))))
def test_common(both: tuple[Ranges, Ranges]) -> None:
    found = compare.common(*both)
    assert bytes_in(found) == bytes_in(both[0]) & bytes_in(both[1])
    assert found == compare.common(both[1], both[0])
    assert all(start < end for start, end in found)


@PROPERTY
@given(sized_ranges, st.integers(1, 20))
def test_thinned(sized: tuple[int, Ranges], most: int) -> None:
    _, ranges = sized
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(agent_disk, "MOST_RANGES", most)
        found = agent_disk.thinned(list(ranges), BLOCK)
    assert len(found) <= most
    assert bytes_in(ranges) <= bytes_in(found)
    assert_in_order_and_apart(found)
    borders = {start for start, _ in ranges}, {end for _, end in ranges}
    assert all(start in borders[0] and end in borders[1] for start, end in found)
    if len(ranges) <= most:
        assert tuple(found) == ranges


def test_thinned_joins_the_closest_first() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(agent_disk, "MOST_RANGES", 2)
        assert agent_disk.thinned([(0, 4), (8, 12), (100, 104)], BLOCK) == [(0, 12), (100, 104)]


def test_a_great_many_differences_are_told_less_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_disk, "MOST_RANGES", 3)
    one = bytes(MOST)
    other = bytes(1 if at % 8 == 0 else 0 for at in range(MOST))
    found, _ = compared(Agent(one), Agent(other), ((0, MOST),))
    assert len(found) <= 3
    assert bytes_in(unlike(one, other, ((0, MOST),))) <= bytes_in(found)


@pytest.mark.parametrize(
    ("before", "new", "after"),
    [([], (0, 4), [(0, 4)]), ([(0, 4)], (4, 8), [(0, 8)]), ([(0, 4)], (8, 12), [(0, 4), (8, 12)])],
)
def test_add(before: list[tuple[int, int]], new: tuple[int, int], after: list[tuple[int, int]]) -> None:
    compare.add(before, *new)
    assert before == after


def test_total() -> None:
    assert compare.total([]) == 0
    assert compare.total([[0, 4], (10, 11)]) == 5


@pytest.mark.parametrize(
    "ranges, size, left",
    [
        ((), 10, ((0, 10),)),
        (((0, 10),), 10, ()),
        (((0, 4), (6, 8)), 10, ((4, 6), (8, 10))),
        (((2, 10),), 10, ((0, 2),)),
        ((), 0, ()),
    ],
)
def test_complement(ranges: Ranges, size: int, left: Ranges) -> None:
    assert compare.complement(ranges, size) == left


@pytest.mark.parametrize(
    "ranges, whole",
    [
        (((0, BLOCK + 1),), ((0, BLOCK),)),
        (((1, 2 * BLOCK),), ((BLOCK, 2 * BLOCK),)),
        (((1, BLOCK - 1),), ()),
        (((BLOCK, 3 * BLOCK + 5),), ((BLOCK, 3 * BLOCK + 5),)),
    ],
)
def test_whole_blocks(ranges: Ranges, whole: Ranges) -> None:
    assert compare.whole_blocks(ranges, 3 * BLOCK + 5) == whole
