"""A replica on a filesystem whose files can share blocks: a sync writes into a copy, and nothing is to be merged."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clonekit import definition, disks_of, ended, held, kvm_clone, wait_until, wipe
from labclient import Lab, Vm
from pools import MIB, OWN, device, digest, in_pool, pool_on

pytestmark = pytest.mark.e2e

NAME = "sharing"
LONG = pytest.mark.faults
"""A variant of what another test has shown already."""
SYNC = ("kc-a", "kc-b", NAME, "--idempotent", "--output", "json")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


@pytest.fixture
def source(lab: Lab) -> Iterator[Vm]:
    """A VM whose replica lies on Btrfs and lacks a change of each disk."""
    if "btrfs" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no Btrfs")
    with device(320 * MIB) as disk:
        disk.format_btrfs()
        with pool_on(lab, disk):
            made = lab.vm("kc-a", NAME, ["qcow2:64M:32M", "raw:64M:32M"], boot=False)
            done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--pool", "own")
            assert done.code == 0, done.err
            for path in made.disks.values():
                file = lab.outside("kc-a", path)
                argv = [
                    "qemu-io",
                    "-f",
                    file.suffix[1:],
                    "-c",
                    "write -P 0x5a 3M 192k",
                    "-c",
                    "write -z 9M 1M",
                    str(file),
                ]
                subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            yield made


def replica(lab: Lab) -> dict[str, str]:
    """The replica's images, and the digests of what a guest sees of them."""
    return {path: digest(lab, "kc-b", path) for path, _ in disks_of(lab, "kc-b", NAME).values()}


def wanted(lab: Lab, source: Vm) -> list[str]:
    return [digest(lab, "kc-a", path) for path in source.disks.values()]


def used(lab: Lab) -> int:
    """Bytes that the pool's filesystem holds."""
    lab.run("kc-b", "sync", "-f", OWN)
    free, total, unit = map(int, lab.run("kc-b", "stat", "-f", "-c", "%f %b %S", OWN).stdout.split())
    return (total - free) * unit


def assert_synced(lab: Lab, source: Vm, before: dict[str, str]) -> None:
    """The replica is as its source, on new images, and the old ones and everything staged are gone."""
    after = replica(lab)
    assert list(after.values()) == wanted(lab, source)
    assert not after.keys() & before.keys()
    assert sorted(f"{OWN}/{name}" for name in in_pool(lab)) == sorted(after)
    assert definition(lab, "kc-b", NAME).find("devices/disk/backingStore/source") is None


def test_a_sync_writes_into_a_copy_that_shares_its_blocks(lab: Lab, source: Vm) -> None:
    before, room = replica(lab), used(lab)
    with held(lab, "copied", *SYNC, command="sync") as child:
        assert replica(lab) == before, "the replica is as it was"
        staged = [name for name in in_pool(lab) if name.endswith(".part")]
        assert len(staged) == 2
        sizes = [int(lab.run("kc-b", "stat", "-c", "%s", f"{OWN}/{name}").stdout) for name in staged]
        assert min(sizes) >= 32 * MIB, "whole images, no overlays"
        assert used(lab) - room < 8 * MIB, "which share what did not change"
        child.send_signal(signal.SIGCONT)
        done = ended(child)
    assert done.code == 0, done.err
    result = done.document
    assert result["verified"] is True
    assert result["bytes_sent"] == 2 * 192 * 1024, "zeros are named, not sent"
    assert_synced(lab, source, before)
    again = kvm_clone(lab, "sync", *SYNC)
    assert again.document["changed"] is False
    assert used(lab) - room < 8 * MIB


@pytest.mark.faults
@pytest.mark.parametrize(
    "record", ["define", pytest.param("durable", marks=LONG), pytest.param("committed", marks=LONG)]
)
def test_a_killed_sync_is_ended_by_the_next(lab: Lab, source: Vm, record: str) -> None:
    before = replica(lab)
    with held(lab, record, *SYNC, "--bandwidth-limit", "1M", command="sync") as child:
        child.kill()
        child.wait()
    now = replica(lab)
    assert now == before or list(now.values()) == wanted(lab, source)
    assert (now == before) == (record != "committed")
    done = kvm_clone(lab, "sync", *SYNC, "--wait")
    assert done.code == 0, done.err
    assert_synced(lab, source, before)


@LONG
def test_the_replica_of_a_sync_that_is_given_up_is_as_before(lab: Lab, source: Vm) -> None:
    before = replica(lab)
    with held(lab, "proven", *SYNC, command="sync") as child:
        child.kill()
        child.wait()
    wait_until("the lock is free", lambda: kvm_clone(lab, "cleanup", "kc-b").code == 0)
    assert replica(lab) == before
    assert sorted(f"{OWN}/{name}" for name in in_pool(lab)) == sorted(before)
