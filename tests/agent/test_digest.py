"""Digests depend on nothing but the content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent.digests import digest, hashing
from kvm_clone.agent.digests.hashing import How
from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import DATA, Disk, MemoryDisk
from kvm_clone.agent.disks.file import FileDisk
from kvm_clone.agent.protocol.wire import CHUNK

from .naive_hash import BY_POLY1305, BY_SHA256, naive_hash
from .tools import KIB, MIB, Write, filled, make_qcow2, make_raw, noise


def naive(content: bytes, block: int = digest.BLOCK, how: How = BY_SHA256) -> list[bytes]:
    """The definition, word for word."""
    answer = []
    for start in range(0, len(content), digest.SEGMENT):
        segment = content[start : start + digest.SEGMENT]
        blocks = [segment[at : at + block] for at in range(0, len(segment), block)]
        answer.append(hashlib.sha256(b"".join(naive_hash(how, part) for part in blocks)).digest())
    return answer


def of(disk: Disk, how: How = BY_SHA256) -> list[bytes]:
    with closing(disk):
        return digests(disk, how)


def digests(disk: Disk, how: How = BY_SHA256) -> list[bytes]:
    return [segment.digest for segment in digest.segments(disk, how)]


def memory(size: int, writes: Sequence[Write]) -> MemoryDisk:
    disk = MemoryDisk(size)
    for offset, data in writes:
        disk.write(offset, memoryview(data))
    return disk


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 bytes, chunks of 64 and segments of 256, so that little content has many."""
    monkeypatch.setattr(digest, "BLOCK", 16)
    monkeypatch.setattr(digest, "CHUNK", 64)
    monkeypatch.setattr(digest, "SEGMENT", 256)
    monkeypatch.setattr(MemoryDisk, "BLOCK", 16)


SIZE = 3 * MIB + 512
WRITES = [(0, noise(70_000)), (MIB - 1, noise(2)), (2 * MIB + 12_345, noise(40_000)), (SIZE - 1, b"\x01")]


def test_every_kind_of_disk_has_the_same_digests(tmp_path: Path) -> None:
    expected = naive(filled(SIZE, WRITES))
    assert of(memory(SIZE, WRITES)) == expected
    assert of(FileDisk(str(make_raw(tmp_path / "sparse", SIZE, WRITES)))) == expected
    assert of(FileDisk(str(make_raw(tmp_path / "full", SIZE, [(0, bytes(SIZE)), *WRITES])))) == expected
    for cluster_size in ("512", "65536", "2097152"):
        for compress in (False, True):
            path = tmp_path / f"{cluster_size}-{compress}"
            make_qcow2(path, SIZE, WRITES, {"cluster_size": cluster_size}, compress=compress)
            assert of(image.open_for_reading(str(path), "qcow2")) == expected


SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, digest.SEGMENT - 1, digest.SEGMENT, digest.SEGMENT + 1,
         2 * digest.SEGMENT + CHUNK + 1]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_the_units(size: int) -> None:
    writes = [(offset, b"\x01") for offset in (0, CHUNK - 1, CHUNK, digest.SEGMENT, size - 1) if 0 <= offset < size]
    assert of(memory(size, [])) == naive(bytes(size))
    assert of(memory(size, writes)) == naive(filled(size, writes))


def test_a_flipped_byte_changes_its_segment_and_no_other() -> None:
    size = 2 * digest.SEGMENT + CHUNK + 777
    disk = memory(size, [(5 * CHUNK, noise(4 * KIB))])
    before = digests(disk)
    borders = [0, CHUNK, digest.SEGMENT, 2 * digest.SEGMENT, 2 * digest.SEGMENT + CHUNK, size]
    for border in borders:
        for offset in (offset for offset in (border - 1, border) if 0 <= offset < size):
            disk.write(offset, memoryview(b"\x10"))
            after = digests(disk)
            changed = [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
            assert changed == [offset // digest.SEGMENT]
            disk.write(offset, memoryview(b"\x00"))
            assert digests(disk) == before


@pytest.mark.parametrize("offset", [0, 1, CHUNK, 3 * CHUNK - 1, digest.SEGMENT - CHUNK])
def test_zeros_that_are_stored_equal_a_hole(offset: int) -> None:
    size = digest.SEGMENT + 100
    disk = memory(size, [(offset, bytes(CHUNK))])
    assert any(extent.kind == DATA for extent in disk.extents())
    assert of(disk) == of(memory(size, []))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("size", range(1, 600, 37))
def test_every_single_byte_counts(size: int) -> None:
    disk = memory(size, [])
    before = digests(disk)
    for offset in range(size):
        disk.write(offset, memoryview(b"\x01"))
        after = digests(disk)
        changed = [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        assert changed == [offset // digest.SEGMENT]
        disk.zero(offset, 1)


@pytest.mark.usefixtures("small_units")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([BY_POLY1305, BY_SHA256]),
    st.integers(0, 15),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12), st.booleans()), max_size=12),
)
def test_against_the_definition(how: How, tail: int, runs: list[tuple[int, int, bool]]) -> None:
    """Runs of (8 bytes of hole, 8 bytes of data or zeros), and a tail of holes."""
    writes: list[Write] = []
    position = 0
    for hole, length, data in runs:
        position += 8 * hole
        writes.append((position, noise(8 * length, position) if data else bytes(8 * length)))
        position += 8 * length
    size = position + tail
    assert of(memory(size, writes), how) == naive(filled(size, writes), 16, how)


def test_zeros_between_data_are_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk with one block of data costs one block."""
    hashed: list[int] = []
    real = hashing._sha256

    def counted(keyed: Any, view: memoryview) -> bytes:
        hashed.append(len(view))
        return real(keyed, view)

    monkeypatch.setattr(hashing, "_sha256", counted)
    writes = [(5 * CHUNK + 3 * digest.BLOCK, noise(digest.BLOCK)), (7 * CHUNK + 100, noise(4 * KIB))]
    assert of(memory(8 * CHUNK, writes)) == naive(filled(8 * CHUNK, writes))
    assert sorted(hashed) == [digest.BLOCK] * 3, "the two with data, and zeros once"
