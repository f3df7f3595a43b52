"""Storage at the destination that fills up, turns read-only or breaks in the midst of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from clonekit import (
    Done,
    assert_becomes,
    ended,
    kvm_clone,
    picture,
    remove,
    running,
    wait_until,
    wipe,
)
from labclient import Lab, Vm
from pools import MIB, OWN, device, digest, in_pool, own_pool, pool_on

pytestmark = pytest.mark.e2e

SLOW = ("--pool", "own", "--bandwidth-limit", "5M", "--output", "json")
"""Keeps the copy going for a few seconds."""


@pytest.fixture(params=[pytest.param("raw", marks=pytest.mark.faults), "qcow2"])
def source(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A VM with one disk of each format in turn, so that the receiver or qemu-nbd meets the failure."""
    yield lab.vm("kc-a", "stored", [f"{request.param}:32M:16M"], boot=False)
    remove(lab, "kc-a", "stored")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


def clone(lab: Lab, *argv: str) -> Done:
    return kvm_clone(lab, "clone", "kc-a", "kc-b", "stored", "--idempotent", "--output", "json", *argv)


def hit_in_the_copy(lab: Lab, hit: Callable[[], object]) -> Done:
    """Clone into the pool, and let something happen to it when a part of the disk is durable there."""

    def under_way() -> bool:
        return "durable" in lab.run("kc-b", "sh", "-c", f"cat {OWN}/.kvm-clone-*.journal", check=False).stdout

    with running(lab, "kc-a", "kc-b", "stored", *SLOW) as child:
        wait_until("the copy is under way", under_way, 30)
        hit()
        done = ended(child)
    assert done.code == 6, done.err
    assert "Traceback" not in done.err
    return done


def assert_cloned(lab: Lab, source: Vm, done: Done) -> None:
    """The clone is whole, and there is nothing beside it."""
    assert done.code == 0, done.err
    assert done.document["verified"] is True
    [disk] = done.document["disks"]
    assert digest(lab, "kc-b", disk["destination"]) == digest(lab, "kc-a", source.disks["vda"])
    assert not [name for name, _, _ in picture(lab, "kc-b").files if "kvm-clone" in name]
    assert not [name for name in in_pool(lab) if "kvm-clone" in name]


def test_a_full_filesystem(lab: Lab, source: Vm) -> None:
    with own_pool(lab, "mount -t tmpfs -o size=28m none"):
        before = picture(lab, "kc-b")
        done = hit_in_the_copy(lab, lambda: lab.run("kc-b", "sh", "-c", f"head -c 28M /dev/zero > {OWN}/filler; true"))
        lab.run("kc-b", "rm", f"{OWN}/filler")
        assert "No space left on device" in done.err
        assert "--pool" in done.document["error"]["remedy"]
        assert_becomes(lab, "kc-b", before)
        assert in_pool(lab) == []


def test_a_directory_that_turns_read_only(lab: Lab, source: Vm) -> None:
    with own_pool(lab, "true"):
        try:
            done = hit_in_the_copy(lab, lambda: lab.run("kc-b", "chattr", "+i", OWN))
        finally:
            lab.run("kc-b", "chattr", "-i", OWN)
        assert "not permitted" in done.err
        assert "stored" not in picture(lab, "kc-b").domains.split()
        assert_cloned(lab, source, clone(lab, "--pool", "own"))


# A device that breaks.


def assert_told(done: Done) -> None:
    """The error names the host, the file and what to do."""
    error = done.document["error"]
    assert error["message"].startswith(f"kc-b: writing {OWN}/.kvm-clone-"), error
    assert "-vda.part: Input/output error" in error["message"]
    assert "--pool" in error["remedy"]


def test_a_device_that_breaks_in_part_is_left_without_a_trace(lab: Lab, source: Vm) -> None:
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    content = lab.outside("kc-a", source.disks["vda"]).read_bytes()
    with device() as disk:
        disk.format("-O", "^has_journal")
        with pool_on(lab, disk):
            done = hit_in_the_copy(lab, lambda: disk.fail_after(MIB))
            assert_told(done)
            assert "not undone" not in done.err
            assert in_pool(lab) == []
    assert_becomes(lab, "kc-b", before["kc-b"])
    assert_becomes(lab, "kc-a", before["kc-a"])
    assert lab.outside("kc-a", source.disks["vda"]).read_bytes() == content
    assert_cloned(lab, source, clone(lab))


def test_what_a_broken_device_kept_is_used_once_it_is_mended(lab: Lab, source: Vm) -> None:
    """Nothing can be removed durably from storage that takes no writes: the journal stays, for the next run."""
    with device() as broken, device() as mended:
        broken.format()
        with pool_on(lab, broken):
            done = hit_in_the_copy(lab, broken.fail)
            assert_told(done)
            part = done.document["error"]["message"].split()[2].rstrip(":")
            assert f"not undone: removing {part}: " in done.document["error"]["remedy"]
            assert "the next run of this command sees to it" in done.err
            assert "stored" not in picture(lab, "kc-b").domains.split()
        mended.file.write_bytes(broken.file.read_bytes())
        with pool_on(lab, mended):
            assert part.rpartition("/")[2] in in_pool(lab)
            done = clone(lab, "--pool", "own")
            assert_cloned(lab, source, done)
            assert done.document["bytes_reused"] > 0
