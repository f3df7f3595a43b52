"""Source and destination may be one host, one filesystem, or one VM: nothing of the source is ever touched for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from clonekit import IMAGES, Done, assert_equal, disks_of, kvm_clone, picture, remove, running, wait_until, wipe
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

SERIAL = "/var/log/libvirt/qemu/ha-serial.log"
"""What the VM that both hosts have prints on its serial port."""

FLAGS = ((), ("--idempotent",), ("--force",), ("--cleanup-existing",), ("--resume",), ("--force", "--preserve-uuid"))


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    yield
    wipe(lab)


def content(lab: Lab, vm: Vm) -> dict[str, str]:
    """The digests of the source's files."""
    return {
        path: hashlib.sha256(lab.outside(vm.host, path).read_bytes()).hexdigest() for path in sorted(vm.disks.values())
    }


def address(lab: Lab, host: str) -> str:
    return next(line.split()[1] for line in lab.command("status").stdout.splitlines() if line.startswith(f"{host} "))


def test_a_host_is_known_under_another_address(lab: Lab) -> None:
    vm = lab.vm("kc-a", "self", ["qcow2:8M:2M", "raw:4M:1M"], boot=False)
    before, definitions = content(lab, vm), picture(lab, "kc-a").domains
    for there, kinds in (("kc-a", FLAGS), (f"root@{address(lab, 'kc-a')}", FLAGS[:3])):
        for flags in kinds:
            done = kvm_clone(lab, "clone", "kc-a", there, "self", *flags)
            assert done.code in (3, 4), done.err
            assert done.code == 3 or not flags
            assert "the source itself" in done.err
        for flags in ((), ("--force",), ("--create",)):
            done = kvm_clone(lab, "sync", "kc-a", there, "self", *flags)
            assert done.code in (3, 4), done.err
    assert content(lab, vm) == before
    assert picture(lab, "kc-a").domains == definitions


def test_a_copy_beside_its_source_on_one_host(lab: Lab) -> None:
    vm = lab.vm("kc-a", "beside", ["qcow2:8M:2M", "raw:4M:1M"], boot=False)
    before = content(lab, vm)
    try:
        for flags in ((), ("--idempotent",), ("--force",)):
            done = kvm_clone(lab, "clone", "kc-a", "kc-a", "beside", "--new-name", "twin", *flags)
            assert done.code == 0, done.err
        theirs = {path for path, _ in disks_of(lab, "kc-a", "twin").values()}
        assert not theirs & set(vm.disks.values())
        assert content(lab, vm) == before
    finally:
        remove(lab, "kc-a", "twin")


def test_hosts_that_were_installed_from_one_image_are_two(lab: Lab) -> None:
    """Equal machine-ids and equal host UUIDs are common, and no reason to refuse."""
    vm = lab.vm("kc-a", "imaged", ["raw:4M:1M"], boot=False)
    machine = lab.run("kc-b", "cat", "/etc/machine-id").stdout
    theirs = lab.run("kc-a", "cat", "/etc/machine-id").stdout
    lab.outside("kc-b", "/etc/machine-id").write_text(theirs)
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "imaged")
    finally:
        lab.outside("kc-b", "/etc/machine-id").write_text(machine)
    assert done.code == 0, done.err
    assert_equal(lab, vm)


# One directory that both hosts see


@pytest.fixture
def shared(lab: Lab) -> Iterator[Path]:
    """A directory outside of the hosts' own, as a network filesystem would be."""
    directory = lab.root / "shared"
    directory.mkdir()
    try:
        yield directory
    finally:
        remove(lab, "kc-b", "ha", "twin")
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def on_both(lab: Lab, directory: Path, name: str = "ha", *, start: bool = False) -> Path:
    """A VM that is defined on both hosts onto one image, as after a migration or in a cluster."""
    guest, disks = ("counter", ["raw:16M:4M", "raw:4M"]) if start else ("tick", ["raw:16M:4M"])
    vm = lab.vm("kc-a", name, disks, boot=start, guest=guest)
    disk = directory / f"{name}.raw"
    target = "vdb" if start else "vda"
    lab.run("kc-a", "mv", vm.disks[target], str(disk))
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", name).stdout.replace(vm.disks[target], str(disk))
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml)
    if start:
        lab.run("kc-a", "virsh", "start", name)
    return disk


def refused(done: Done) -> None:
    assert done.code in (3, 4), done.err
    assert "Traceback" not in done.err


def test_one_vm_on_two_hosts_keeps_its_disk(lab: Lab, shared: Path) -> None:
    disk = on_both(lab, shared)
    before = disk.read_bytes()
    for pool in ((), ("--pool", "default")):
        for flags in FLAGS[1:4]:
            done = kvm_clone(lab, "clone", "kc-a", "kc-b", "ha", *flags, *pool)
            refused(done)
            assert "the source's own disk" in done.err
    refused(kvm_clone(lab, "sync", "kc-a", "kc-b", "ha", "--force"))
    assert disk.read_bytes() == before
    assert [path.name for path in shared.iterdir()] == [disk.name]
    lab.run("kc-a", "virsh", "start", "ha")
    lab.run("kc-a", "virsh", "destroy", "ha")


@pytest.mark.faults
def test_one_vm_that_writes_is_known_by_a_mark(lab: Lab, shared: Path) -> None:
    """Its times change between two looks, so that only a file that one host makes tells what the other sees."""
    disk = on_both(lab, shared, start=True)
    try:
        lab.wait_for_guest("kc-a", SERIAL)
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "ha", "--force", "--quiesce", "off")
        refused(done)
        assert "both see one directory" in done.err or "the source's own disk" in done.err
        assert disk.exists()
        assert [path.name for path in shared.iterdir()] == [disk.name]
        assert lab.run("kc-a", "virsh", "domstate", "ha").stdout.strip() == "running"
    finally:
        lab.run("kc-a", "virsh", "destroy", "ha", check=False)


def _pool(lab: Lab, host: str, directory: Path) -> None:
    lab.run(host, "virsh", "pool-create-as", "shared", "dir", "--target", str(directory))


@pytest.fixture
def pools(lab: Lab, shared: Path) -> Iterator[Path]:
    """A pool on the directory, on both hosts."""
    for host in ("kc-a", "kc-b"):
        _pool(lab, host, shared)
    try:
        yield shared
    finally:
        remove(lab, "kc-b", "ha", "twin", "pooled")
        for host in ("kc-a", "kc-b"):
            lab.run(host, "virsh", "pool-destroy", "shared", check=False)


def same(lab: Lab, vm: Vm, pool: Path) -> None:
    """The clone's disk in the shared pool holds what the source's does."""
    ((path, _),) = disks_of(lab, "kc-b", "twin").values()
    assert Path(path).parent == pool
    assert Path(path).read_bytes() == lab.outside("kc-a", vm.disks["vda"]).read_bytes()


@pytest.mark.faults
def test_an_operation_of_another_host_in_the_same_pool_is_left_alone(lab: Lab, pools: Path) -> None:
    vm = lab.vm("kc-a", "pooled", ["raw:16M:12M"], boot=False)
    lab.vm("kc-b", "other", ["raw:4M:1M"], boot=False)
    argv = ("kc-a", "kc-b", "pooled", "--new-name", "twin", "--pool", "shared", "--bandwidth-limit", "400K")
    with running(lab, *argv) as child:
        wait_until("the copy is under way", lambda: any(path.suffix == ".part" for path in pools.iterdir()), 30)
        done = kvm_clone(lab, "cleanup", "kc-a")
        assert done.code == 0, done.err
        for flags in ((), ("--force",), ("--resume",), ("--idempotent",)):
            second = kvm_clone(lab, "clone", "kc-b", "kc-a", "other", "--new-name", "twin", "--pool", "shared", *flags)
            assert second.code == 8, second.err
        out, err = child.communicate(timeout=90)
        assert child.returncode == 0, out + err
    same(lab, vm, pools)


def test_an_interrupted_operation_of_another_host_is_left_to_it(lab: Lab, pools: Path) -> None:
    vm = lab.vm("kc-a", "pooled", ["raw:16M:12M"], boot=False)
    lab.vm("kc-b", "other", ["raw:4M:1M"], boot=False)
    argv = ("kc-a", "kc-b", "pooled", "--new-name", "twin", "--pool", "shared")
    with running(lab, *argv, "--bandwidth-limit", "2M") as child:
        wait_until("the copy is under way", lambda: any(path.suffix == ".part" for path in pools.iterdir()), 30)
        child.terminate()
        child.communicate(timeout=60)
    before = {path.name: path.stat().st_ino for path in pools.iterdir()}
    assert before
    told = kvm_clone(lab, "status", "--host", "kc-a").out
    assert "which both hosts see; it is left to kc-b" in told
    assert "would be left to kc-b" in kvm_clone(lab, "cleanup", "kc-a", "--dry-run").out
    done = kvm_clone(lab, "cleanup", "kc-a")
    assert done.code == 0, done.err
    for flags in ((), ("--force",), ("--resume",), ("--idempotent",)):
        second = kvm_clone(lab, "clone", "kc-b", "kc-a", "other", "--new-name", "twin", "--pool", "shared", *flags)
        assert second.code in (3, 8), second.err
    assert {path.name: path.stat().st_ino for path in pools.iterdir()} == before
    again = kvm_clone(lab, "clone", *argv, "--resume")
    assert again.code == 0, again.err
    same(lab, vm, pools)
    assert not [path for path in pools.iterdir() if path.name.startswith(".kvm-clone")]


def test_disks_that_are_links_to_one_file_are_refused(lab: Lab) -> None:
    vm = lab.vm("kc-a", "linked", ["raw:4M:1M"], boot=False)
    path = vm.disks["vda"]
    for number, link in enumerate(("ln", "ln -s"), 1):
        lab.run("kc-a", "sh", "-c", f"{link} {path} {IMAGES}/linked-{number}.raw")
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", "linked").stdout
        source = f"<source file='{IMAGES}/linked-{number}.raw'/><target dev='vdb' bus='virtio'/>"
        disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>{source}</disk>"
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace("</devices>", f"{disk}</devices>"))
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "linked")
        assert done.code == 3, done.err
        assert "are one file" in done.err
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
        lab.run("kc-a", "rm", f"{IMAGES}/linked-{number}.raw")
