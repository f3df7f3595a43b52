"""The digests that two hosts compare: segments, and the blocks of those that differ, from one reading."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent.digests import digest, service
from kvm_clone.agent.digests.hashing import SHA256, How
from kvm_clone.agent.digests.service import DigestService
from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import MemoryDisk
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .naive_hash import BY_SHA256, naive_hash
from .tools import KIB, MIB, make_overlay, make_qcow2, make_raw, noise

BLOCK, SEGMENT = 16, 256

HOW = [BY_SHA256.method, BY_SHA256.key.hex()]

Ranges = list[list[int]]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 bytes and segments of 256, so that little content has many."""
    for name, size in (("BLOCK", BLOCK), ("CHUNK", 64), ("SEGMENT", SEGMENT)):
        monkeypatch.setattr(digest, name, size)
    monkeypatch.setattr(MemoryDisk, "BLOCK", BLOCK)


def naive(content: bytes, ranges: Ranges, block: int = BLOCK, segment: int = SEGMENT) -> dict[int, bytes]:
    """By segment, the digests of the blocks that the ranges have in it, joined: the definition, word for word."""
    found: dict[int, bytes] = {}
    for start, end in ranges:
        for at in range(start, end, block):
            first = at - at % segment
            found[first] = found.get(first, b"") + naive_hash(BY_SHA256, content[at : min(at + block, end)])
    return found


def segments_of(blocks: dict[int, bytes]) -> list[list[Any]]:
    return [[at, hashlib.sha256(one).hexdigest()] for at, one in sorted(blocks.items())]


def blocks_of(blocks: dict[int, bytes]) -> list[list[Any]]:
    return [[at, base64.b64encode(one).decode()] for at, one in sorted(blocks.items())]


@st.composite
def disks(draw: st.DrawFn) -> tuple[bytes, Ranges]:
    """Content with holes and zeros, and ranges with gaps, cut at blocks or the disk's end."""
    size = draw(st.integers(1, 1500))
    content = bytearray(size)
    for at in draw(st.sets(st.integers(0, size // BLOCK), max_size=20)):
        content[at * BLOCK : (at + 1) * BLOCK] = noise(BLOCK, at)[: max(0, size - at * BLOCK)]
    blocks = sorted(draw(st.sets(st.integers(0, (size - 1) // BLOCK))))
    ranges: Ranges = []
    for at in blocks:
        if ranges and ranges[-1][1] == at * BLOCK:
            ranges[-1][1] = min(size, (at + 1) * BLOCK)
        else:
            ranges.append([at * BLOCK, min(size, (at + 1) * BLOCK)])
    return bytes(content), draw(st.sampled_from([ranges, [[0, size]]]))


@pytest.mark.usefixtures("small_units")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(disks())
def test_segments_and_blocks_against_the_definition(tmp_path: Path, given_disk: tuple[bytes, Ranges]) -> None:
    content, ranges = given_disk
    expected = naive(content, ranges)
    path = tmp_path / "disk"
    path.write_bytes(content)
    heard: list[int] = []
    answering = DigestService()
    found = answering.segments(str(path), "raw", HOW, ranges, lambda state: heard.append(state["done"]))
    assert found == segments_of(expected)
    assert heard == sorted(heard)
    assert not ranges or heard[-1] == sum(end - start for start, end in ranges)
    assert answering.blocks(str(path), "raw", HOW, ranges) == blocks_of(expected)
    assert DigestService().blocks(str(path), "raw", HOW, ranges) == blocks_of(expected), (
        "and without having heard of them"
    )
    memory = MemoryDisk(len(content))
    for at in range(0, len(content), BLOCK):
        if any(content[at : at + BLOCK]):
            memory.write(at, memoryview(content[at : at + BLOCK]))
    assert {one.offset: one.blocks for one in digest.segments(memory, BY_SHA256, ranges)} == expected, "holes or zeros"


SIZE = digest.SEGMENT + 3 * MIB + 512
WRITES = [(0, noise(70_000)), (MIB - 1, noise(2)), (digest.SEGMENT - 5, noise(10)), (SIZE - 1, b"\x01")]
GAPS = [
    [0, 128 * KIB],
    [MIB, MIB + 64 * KIB],
    [digest.SEGMENT - 64 * KIB, digest.SEGMENT + 64 * KIB],
    [SIZE - SIZE % (64 * KIB), SIZE],
]


def test_every_kind_of_image_has_the_same_answers(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", SIZE, WRITES)
    expected = naive(raw.read_bytes(), GAPS, digest.BLOCK, digest.SEGMENT)
    base = make_raw(tmp_path / "base", MIB, [(0, noise(MIB, 5))])
    over = make_overlay(tmp_path / "over", base, "raw", SIZE, [(0, raw.read_bytes()[:MIB]), *WRITES])
    plain = make_qcow2(tmp_path / "plain", SIZE, WRITES)
    for path, format_ in ((raw, "raw"), (plain, "qcow2"), (over, "qcow2")):
        answering = DigestService()
        assert answering.segments(str(path), format_, HOW, GAPS, lambda _: None) == segments_of(expected)
        assert answering.blocks(str(path), format_, HOW, GAPS) == blocks_of(expected)
        with closing(image.open_for_reading(str(path), format_)) as disk:
            assert [one.length for one in digest.segments(disk, BY_SHA256, GAPS)] == [
                sum(min(end, stop) - max(start, low) for start, end in GAPS if start < stop and end > low)
                for low, stop in ((0, digest.SEGMENT), (digest.SEGMENT, 2 * digest.SEGMENT))
            ]


@pytest.mark.usefixtures("small_units")
def test_blocks_are_remembered_until_others_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMEMBERED", 3)
    path = make_raw(tmp_path / "disk", 8 * SEGMENT, [(0, noise(8 * SEGMENT))])
    content = path.read_bytes()
    read: list[Ranges] = []
    real = digest.segments

    def counted(disk: Any, how: How, ranges: Any) -> Iterator[digest.Segment]:
        read.append([list(pair) for pair in ranges])
        return real(disk, how, ranges)

    monkeypatch.setattr(digest, "segments", counted)
    answering = DigestService()
    answering.segments(str(path), "raw", HOW, [[0, 8 * SEGMENT]], lambda _: None)
    assert len(answering._blocks) == 3
    read.clear()
    late = [[5 * SEGMENT, 8 * SEGMENT]]
    assert answering.blocks(str(path), "raw", HOW, late) == blocks_of(naive(content, late))
    assert read == []
    mixed = [[0, SEGMENT], [7 * SEGMENT, 8 * SEGMENT]]
    assert answering.blocks(str(path), "raw", HOW, mixed) == blocks_of(naive(content, mixed))
    assert read == [[[0, SEGMENT]]], "only what was forgotten is read again"


@pytest.mark.usefixtures("small_units")
def test_what_is_remembered_is_of_the_same_parts_and_the_same_image(tmp_path: Path) -> None:
    one = make_raw(tmp_path / "one", SEGMENT, [(0, noise(SEGMENT))])
    other = make_raw(tmp_path / "other", SEGMENT, [(0, noise(SEGMENT, 1))])
    answering = DigestService()
    answering.segments(str(one), "raw", HOW, [[0, SEGMENT]], lambda _: None)
    part = [[BLOCK, 3 * BLOCK]]
    assert answering.blocks(str(one), "raw", HOW, part) == blocks_of(naive(one.read_bytes(), part))
    assert answering.blocks(str(other), "raw", HOW, [[0, SEGMENT]]) == blocks_of(
        naive(other.read_bytes(), [[0, SEGMENT]])
    )


@pytest.mark.usefixtures("small_units")
def test_what_is_remembered_is_of_the_same_key(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", SEGMENT, [(0, noise(SEGMENT))])
    answering, whole = DigestService(), [[0, SEGMENT]]
    before = answering.segments(str(path), "raw", HOW, whole, lambda _: None)
    other = [SHA256, bytes(32).hex()]
    assert answering.blocks(str(path), "raw", other, whole) != answering.blocks(str(path), "raw", HOW, whole)
    assert answering.segments(str(path), "raw", other, whole, lambda _: None) != before


@pytest.mark.usefixtures("small_units")
def test_segments_are_always_read_anew(tmp_path: Path) -> None:
    """A proof that came from memory would be none."""
    path = make_raw(tmp_path / "disk", SEGMENT)
    answering, whole = DigestService(), [[0, SEGMENT]]
    before = answering.segments(str(path), "raw", HOW, whole, lambda _: None)
    path.write_bytes(noise(SEGMENT))
    assert answering.segments(str(path), "raw", HOW, whole, lambda _: None) != before
    assert answering.blocks(str(path), "raw", HOW, whole) == blocks_of(naive(noise(SEGMENT), whole))


def test_nothing_asked_for_opens_nothing(tmp_path: Path) -> None:
    answering = DigestService()
    assert answering.segments(str(tmp_path / "missing"), "raw", HOW, [], lambda _: None) == []
    assert answering.blocks(str(tmp_path / "missing"), "raw", HOW, []) == []


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    acts: list[Callable[[], object]] = [
        lambda: DigestService().segments(missing, "raw", HOW, [[0, 1]], lambda _: None),
        lambda: DigestService().blocks(missing, "raw", HOW, [[0, 1]]),
    ]
    for act in acts:
        with pytest.raises(AgentError, match=missing) as caught:
            act()
        assert caught.value.kind == errors.MISSING
