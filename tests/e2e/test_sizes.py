"""Disks whose files have any size: what the guest sees of them is what a copy has, and no byte more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clonekit import disks_of, interrupt, kvm_clone, remove, wipe
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

MIB = 1 << 20
NAME = "sized"


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)
    remove(lab, "kc-a", NAME)


def sized(lab: Lab, size: int) -> tuple[Vm, Path]:
    """A VM with a raw disk of random content in a file of `size` bytes, and that file."""
    vm = lab.vm("kc-a", NAME, ["raw:1M"], boot=False)
    path = lab.outside("kc-a", vm.disks["vda"])
    path.write_bytes(os.urandom(size))
    return vm, path


def copied(lab: Lab, command: str, *argv: str) -> dict[str, Any]:
    done = kvm_clone(lab, command, "kc-a", "kc-b", NAME, "--output", "json", *argv)
    assert done.code == 0, done.err
    document: dict[str, Any] = done.document
    return document


def seen(path: Path, format_: str = "raw") -> bytes:
    """The whole of what a guest reads, its size included."""
    argv = ["qemu-img", "convert", "-U", "-f", format_, "-O", "raw", str(path), f"{path}.seen"]
    subprocess.run(argv, check=True)
    try:
        return Path(f"{path}.seen").read_bytes()
    finally:
        Path(f"{path}.seen").unlink()


def replica(lab: Lab) -> bytes:
    path, format_ = disks_of(lab, "kc-b", NAME)["vda"]
    return seen(lab.outside("kc-b", path), format_)


@pytest.mark.parametrize("size", [7, pytest.param(1_000_001, marks=pytest.mark.faults)])
def test_a_raw_disk_that_is_no_multiple_of_a_sector(lab: Lab, size: int) -> None:
    vm, path = sized(lab, size)
    result = copied(lab, "clone")
    assert result["verified"] is True
    content = path.read_bytes()
    assert seen(path) == replica(lab) == content.ljust(-(-size // 512) * 512, b"\0")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    assert copied(lab, "sync")["changed"] is True
    assert seen(path) == replica(lab)
    assert path.stat().st_size == size, "the source's file is as it was"
    lab.run("kc-a", "virsh", "-q", "start", vm.name)
    assert copied(lab, "sync", "--verify", "full")["consistency"] == "crash"
    assert seen(path) == replica(lab)
    lab.run("kc-b", "virsh", "-q", "undefine", vm.name, "--remove-all-storage")
    assert copied(lab, "clone", "--quiesce", "off")["verified"] is True
    lab.run("kc-a", "virsh", "-q", "destroy", vm.name)
    assert seen(path) == replica(lab)


def test_a_replica_that_is_no_multiple_of_a_sector(lab: Lab) -> None:
    """Its overlay is merged into a file that is shorter than the disk."""
    _, path = sized(lab, MIB + 3)
    copied(lab, "clone")
    there = lab.outside("kc-b", disks_of(lab, "kc-b", NAME)["vda"][0])
    os.truncate(there, MIB + 3)
    path.write_bytes(os.urandom(MIB + 3))
    copied(lab, "sync", "--force")
    assert seen(path) == replica(lab)
    with path.open("r+b") as file:
        file.truncate(2 * MIB + 5)
    copied(lab, "sync")
    assert seen(path) == replica(lab)


def test_an_interrupted_copy_of_one_goes_on(lab: Lab) -> None:
    _, path = sized(lab, 24 * MIB + 5)
    slow = ("--bandwidth-limit", "6M", "--route", "relay")
    interrupt(lab, "kc-a", "kc-b", NAME, *slow, disk="vda", at=8 * MIB)
    result = copied(lab, "clone", "--resume")
    assert result["bytes_reused"] >= 8 * MIB
    assert seen(path) == replica(lab)


def test_holes_smaller_than_a_block_stay_holes_in_a_sync(lab: Lab) -> None:
    """The overlay that the sync is merged from may have nothing but whole blocks."""
    count, apart, piece = 1000, 16 << 10, 4 << 10
    vm = lab.vm("kc-a", NAME, ["raw:16M"], boot=False)
    path = lab.outside("kc-a", vm.disks["vda"])

    def write(byte: bytes, step: int) -> None:
        with path.open("r+b") as file:
            for at in range(0, count, step):
                file.seek(at * apart)
                file.write(byte * piece)

    write(b"x", 1)
    copied(lab, "clone")
    there = lab.outside("kc-b", disks_of(lab, "kc-b", NAME)["vda"][0])
    write(b"y", 4)
    copied(lab, "sync")
    assert seen(path) == replica(lab)
    assert there.stat().st_blocks <= path.stat().st_blocks * 1.05
