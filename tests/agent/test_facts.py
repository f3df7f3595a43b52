"""What the agent says of images, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvm_clone.agent import facts, qemu

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
