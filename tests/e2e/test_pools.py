"""Disks that a definition names by pool and volume: resolved at the source, named so again at the destination."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from clonekit import (
    IMAGES,
    assert_nothing_left,
    disks_of,
    held,
    kvm_clone,
    picture,
    remove,
    succeeded,
    wipe,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

NAME = "pooled"


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    yield
    assert_nothing_left(lab)
    wipe(lab)
    remove(lab, "kc-a", NAME)


@contextmanager
def pool(lab: Lab, host: str, name: str) -> Iterator[str]:
    """A second pool of files on the host; its directory."""
    directory = f"{IMAGES}/{name}"
    lab.run(host, "sh", "-ec", f"mkdir {directory}; virsh pool-create-as {name} dir --target {directory}")
    try:
        yield directory
    finally:
        wipe(lab)
        lab.run(host, "sh", "-c", f"virsh pool-destroy {name}; rm -rf {directory}")


def content(lab: Lab, host: str, pool_: str, volume: str, format_: str) -> str:
    """The digest of what the guest sees of a volume, which is found as a VM finds it: by libvirt."""
    script = 'qemu-img convert -U -f "$3" -O raw "$(virsh vol-path --pool "$1" "$2")" /run/x; sha256sum </run/x'
    return lab.run(host, "sh", "-ec", f"{script}; rm /run/x", "content", pool_, volume, format_).stdout


def assert_same(lab: Lab, vm: Vm, pool_: str = "default") -> None:
    """Each disk of the clone is a volume of that pool, with the content of the source's."""
    theirs = disks_of(lab, "kc-b", NAME)
    assert theirs.keys() == vm.disks.keys()
    for target, path in vm.disks.items():
        named, format_ = theirs[target]
        there, volume = named.split("/")
        assert there == pool_
        mine = content(lab, "kc-a", "default", path.rpartition("/")[2], format_)
        assert content(lab, "kc-b", there, volume, format_) == mine


def test_a_vm_of_volumes_is_cloned_and_boots(lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], pool=True)
    before = picture(lab, "kc-a")
    result = succeeded(lab, "clone", NAME)
    assert picture(lab, "kc-a") == before
    assert [disk["destination"] for disk in result["disks"]] == list(vm.disks.values())
    assert_same(lab, vm)
    lab.run("kc-b", "virsh", "start", NAME)
    assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"


def test_a_replica_of_volumes_that_run(lab: Lab) -> None:
    """The overlay is a volume too, until it is merged; nothing of it is left in the definition."""
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], pool=True, start=True)
    lab.wait_for_guest("kc-a", vm.serial)
    succeeded(lab, "sync", NAME, "--create", "--track")
    succeeded(lab, "sync", NAME, "--track")
    lab.run("kc-a", "virsh", "destroy", NAME)
    succeeded(lab, "sync", NAME)
    assert succeeded(lab, "sync", NAME)["changed"] is False
    assert_same(lab, vm)
    lab.run("kc-b", "virsh", "start", NAME)
    assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"


def test_a_killed_sync_of_volumes_boots_from_its_overlays_and_is_finished(lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["qcow2:8M:1M"], pool=True)
    succeeded(lab, "sync", NAME, "--create")
    lab.run("kc-a", "qemu-io", "-f", "qcow2", "-c", "write -P 7 2M 1M", vm.disks["vdb"])
    with held(lab, "committed", "kc-a", "kc-b", NAME, command="sync") as child:
        child.kill()
    overlays = [named for named, _ in disks_of(lab, "kc-b", NAME).values()]
    assert all(named.startswith("default/kvm-clone-") for named in overlays)
    lab.run("kc-b", "virsh", "start", NAME)
    assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"
    lab.run("kc-b", "virsh", "destroy", NAME)
    lab.run("kc-a", "qemu-io", "-f", "qcow2", "-c", "write -P 8 3M 1M", vm.disks["vdb"])
    succeeded(lab, "sync", NAME, "--force")
    assert_same(lab, vm)


def test_a_pool_of_the_same_name_takes_the_volumes(lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], pool=True)
    with pool(lab, "kc-a", "ssd") as here, pool(lab, "kc-b", "ssd"):
        for path in vm.disks.values():
            lab.run("kc-a", "mv", path, here)
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout.replace("pool='default'", "pool='ssd'")
        lab.run("kc-a", "sh", "-ec", "virsh pool-refresh ssd; virsh define /dev/stdin", input=xml)
        succeeded(lab, "clone", NAME, "--new-name", "other")
        assert {named.split("/")[0] for named, _ in disks_of(lab, "kc-b", "other").values()} == {"ssd"}
        refused = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--pool", "none")
        assert refused.code == 3
        lab.run("kc-b", "virsh", "start", "other")
        lab.run("kc-b", "virsh", "destroy", "other")
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--new-name", "other", "--force")
        assert done.code == 0, done.err
        for path in vm.disks.values():
            lab.run("kc-a", "sh", "-c", f"mv {here}/{path.rpartition('/')[2]} {path}")


def test_a_volume_that_is_gone_is_named(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False, pool=True)
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout.replace("pool='default'", "pool='lost'")
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
    before = picture(lab, "kc-b")
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
    assert done.code == 3
    assert f"lost/{NAME}-vda.raw" in done.err
    assert "cannot find" in done.err
    assert picture(lab, "kc-b") == before


def test_a_replaced_vm_loses_its_volumes(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["qcow2:8M:1M"], boot=False, pool=True)
    old = lab.vm("kc-b", NAME, ["qcow2:8M:1M", "raw:8M"], boot=False, pool=True)
    succeeded(lab, "clone", NAME, "--force")
    there = lab.run("kc-b", "ls", IMAGES).stdout.split()
    assert [name for name in there if name.startswith(NAME)] == [disks_of(lab, "kc-b", NAME)["vda"][0].split("/")[1]]
    assert old.disks["vdb"].rpartition("/")[2] not in there
