"""What the agent says of images, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvm_clone.agent import facts, image, qemu

from .tools import KIB, MIB, make_overlay, make_qcow2, make_raw, noise

SIZE = 4 * MIB
BASE = [(0, noise(128 * KIB)), (2 * MIB, noise(64 * KIB))]
OWN = [(64 * KIB, noise(64 * KIB, 1)), (3 * MIB, noise(192 * KIB))]

DATA_IN: dict[str, tuple[Sequence[Sequence[int]] | None, bool, int]] = {
    "all of it": (None, False, 384),
    "the overlay's own": (None, True, 256),
    "a range of both": ([[0, MIB]], False, 128),
    "a range of both, the overlay's own": ([[0, MIB]], True, 64),
    "a part of an extent": ([[3 * MIB + 64 * KIB, 3 * MIB + 96 * KIB]], True, 32),
    "ranges with a gap": ([[0, 64 * KIB], [2 * MIB, 3 * MIB + 64 * KIB]], False, 192),
    "what the image below has": ([[2 * MIB, 3 * MIB]], True, 0),
    "a hole": ([[MIB, 2 * MIB]], False, 0),
    "nothing": ([], False, 0),
}


@pytest.mark.parametrize("what", DATA_IN)
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_data_in_an_overlay(tmp_path: Path, base_format: str, what: str) -> None:
    ranges, own, kib = DATA_IN[what]
    base = tmp_path / "base"
    if base_format == "raw":
        make_raw(base, SIZE, BASE)
    else:
        make_qcow2(base, SIZE, BASE)
    over = make_overlay(tmp_path / "over", base, base_format, SIZE, OWN)
    asked = None if ranges is None else [list(pair) for pair in ranges]
    assert facts.data_in(str(over), "qcow2", asked, own) == kib * KIB


def test_data_in_an_image_that_rests_on_none(tmp_path: Path) -> None:
    for path, format_ in (
        (make_raw(tmp_path / "a", SIZE, BASE), "raw"),
        (make_qcow2(tmp_path / "b", SIZE, BASE), "qcow2"),
    ):
        for own in (False, True):
            assert facts.data_in(str(path), format_, None, own) == 192 * KIB


@pytest.mark.parametrize("size", [0, 1, 7, 511, 512, 513, 1_000_001, MIB])
def test_a_raw_disks_size_is_what_qemu_says(tmp_path: Path, size: int) -> None:
    path = make_raw(tmp_path / "disk", size, [(0, noise(size))])
    said = facts.disk(str(path), "raw")
    assert said["virtual_size"] == qemu.info(str(path), "raw")["virtual-size"]
    assert said["data"] == pytest.approx(size, abs=511)


# How much an image holds, and what a copy of it takes.


def compressed(path: Path, cluster: str = "65536") -> Path:
    """An image of 1 MiB of content that compresses well."""
    return make_qcow2(path, SIZE, [(0, b"x" * MIB)], {"cluster_size": cluster}, compress=True)


def test_what_stays_compressed_takes_less_than_its_content(tmp_path: Path) -> None:
    said = facts.disk(str(compressed(tmp_path / "a")), "qcow2")
    assert said["data"] == MIB
    assert 0 < said["stored"] <= 512 * KIB
    said = facts.disk(str(compressed(tmp_path / "b", "2097152")), "qcow2")
    assert (said["data"], said["stored"]) == (2 * MIB, 0), "clusters of this size are stored uncompressed"
    for path, format_ in (
        (make_raw(tmp_path / "c", SIZE, BASE), "raw"),
        (make_qcow2(tmp_path / "d", SIZE, BASE), "qcow2"),
    ):
        said = facts.disk(str(path), format_)
        assert (said["data"], said["stored"]) == (192 * KIB, 0)


def test_a_part_that_is_compressed(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a")
    disk = image.StagedImage(str(path))
    disk.write(2 * MIB, memoryview(noise(MIB)))
    disk.flush()
    disk.close()
    said = facts.disk(str(path), "qcow2")
    assert said["data"] == 2 * MIB
    assert MIB < said["stored"] < 2 * MIB - 256 * KIB


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_what_an_image_holds_while_it_is_written(tmp_path: Path, format_: str) -> None:
    make = make_raw if format_ == "raw" else make_qcow2
    path = make(tmp_path / "disk", SIZE, BASE)
    writer = qemu.open_nbd(str(path), format_, writable=True)
    try:
        said = facts.disk(str(path), format_, live=True)
    finally:
        writer.close()
    assert (said["data"], said["stored"]) == (192 * KIB, 0)


def test_what_is_compressed_is_counted_whole_while_it_is_written(tmp_path: Path) -> None:
    """A backup job offers it uncompressed."""
    said = facts.disk(str(compressed(tmp_path / "a")), "qcow2", live=True)
    assert (said["data"], said["stored"]) == (MIB, 0)


def test_tables_that_cannot_be_read_while_they_are_written(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", SIZE, BASE)
    with path.open("r+b") as file:
        file.seek(40)  # l1_table_offset, docs/interop/qcow2.txt
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write((1 << 63 | 0x12345).to_bytes(8, "big"))
    said = facts.disk(str(path), "qcow2", live=True)
    assert said["data"] >= 192 * KIB, "what the file holds"
    assert "error" in facts.disk(str(path), "qcow2")


def test_what_is_staged_holds_nothing_that_could_be_told_while_it_is_written(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", SIZE, BASE)
    assert facts.data_held(str(path), "qcow2") == 192 * KIB
    writer = qemu.open_nbd(str(path), "qcow2", writable=True)
    try:
        assert facts.data_held(str(path), "qcow2") == 0
    finally:
        writer.close()
    assert facts.data_held(str(tmp_path / "missing"), "raw") == 0
