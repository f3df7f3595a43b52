"""Disks that are block devices at the source: their copies are files, equal to what the guest sees."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from clonekit import (
    IMAGES,
    assert_nothing_left,
    definition,
    disks_of,
    ended,
    held,
    kvm_clone,
    picture,
    succeeded,
    wipe,
    written_by_another,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

NAME = "onblock"


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    yield
    assert_nothing_left(lab)
    wipe(lab)
    lab.run(
        "kc-a",
        "sh",
        "-c",
        f"virsh destroy {NAME}; virsh undefine --checkpoints-metadata {NAME}; rm -f {IMAGES}/{NAME}*",
    )


@contextmanager
def device(lab: Lab, path: str) -> Iterator[str]:
    """A block device on kc-a that has the content of a file, which goes by another name meanwhile.

    The kernel, which the hosts share, says of a loop device only the path of its file: no file of kc-b may have it.
    """
    lab.run("kc-a", "mv", path, backing(path))
    made = lab.run("kc-a", "losetup", "--find", "--show", "--nooverlap", backing(path)).stdout.strip()
    try:
        yield made
    finally:
        lab.run("kc-a", "sh", "-c", f"virsh destroy {NAME}; losetup --detach {made}")


def backing(path: str) -> str:
    """Where the content of the device lies."""
    return f"{path}.device"


@contextmanager
def on_devices(
    lab: Lab, *targets: str, disks: tuple[str, ...] = ("raw:8M:1M",), **how: Any
) -> Iterator[tuple[Vm, Mapping[str, str]]]:
    """A VM some of whose disks are devices, and the devices by target. `how`: see Lab.vm."""
    start = how.pop("start", False)
    vm = lab.vm("kc-a", NAME, disks, **how)
    with ExitStack() as held_:
        devices = {target: held_.enter_context(device(lab, vm.disks[target])) for target in targets}
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
        for target, path in devices.items():
            disk, source = "<disk type='file'", f"<source file='{vm.disks[target]}'/>"
            before, found, after = xml.partition(source)
            assert found
            head, _, middle = before.rpartition(disk)
            xml = f"{head}<disk type='block'{middle}<source dev='{path}'/>{after}"
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
        if start:
            lab.run("kc-a", "virsh", "start", NAME)
            lab.wait_for_guest("kc-a", vm.serial)
        yield vm, devices


def content(lab: Lab, host: str, path: str, format_: str) -> str:
    """A digest of what the guest sees."""
    script = 'qemu-img convert -U -f "$2" -O raw "$1" /run/flat.raw; sha256sum </run/flat.raw; rm /run/flat.raw'
    return lab.run(host, "sh", "-ec", script, "content", path, format_).stdout


def assert_same(lab: Lab, vm: Vm, devices: Mapping[str, str]) -> None:
    """Every disk of the clone is a file in the default pool with the content of the source's."""
    root = definition(lab, "kc-b", NAME)
    assert {disk.get("type") for disk in root.findall("devices/disk[@device='disk']")} == {"file"}
    theirs = disks_of(lab, "kc-b", NAME)
    assert theirs.keys() == vm.disks.keys()
    for target, (path, format_) in theirs.items():
        assert path.startswith(f"{IMAGES}/")
        assert content(lab, "kc-b", path, format_) == content(
            lab, "kc-a", devices.get(target, vm.disks[target]), format_
        )


def allocated(lab: Lab, path: str) -> int:
    """Bytes that a file at the destination takes."""
    return int(lab.run("kc-b", "stat", "-c", "%b", path).stdout) * 512


def sectors_written(lab: Lab, path: str) -> str:
    """What the kernel has counted for a device on kc-a."""
    return lab.run("kc-a", "cat", f"/sys/block/{path.removeprefix('/dev/')}/stat").stdout.split()[6]


def test_a_vm_at_rest_is_cloned_and_boots(lab: Lab) -> None:
    """Raw and qcow2 on devices, and a file beside them. Nothing at the source is written."""
    with on_devices(lab, "vda", "vdb", disks=("raw:8M:1M", "qcow2:8M:1M")) as (vm, devices):
        before = picture(lab, "kc-a")
        counted = {path: sectors_written(lab, path) for path in devices.values()}
        result = succeeded(lab, "clone", NAME)
        assert picture(lab, "kc-a") == before
        assert {path: sectors_written(lab, path) for path in devices.values()} == counted
        finals = [disk["destination"].rpartition("/")[2] for disk in result["disks"]]
        assert finals == [f"{NAME}-vda.qcow2", f"{NAME}-vdb.raw", f"{NAME}-vdc.qcow2"]
        assert_same(lab, vm, devices)
        assert allocated(lab, f"{IMAGES}/{NAME}-vdb.raw") < 2 << 20
        lab.run("kc-b", "virsh", "start", NAME)
        assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"


def test_a_running_vm_and_its_replica(lab: Lab) -> None:
    with on_devices(lab, "vda", "vdb", start=True) as (vm, devices):
        succeeded(lab, "sync", NAME, "--create", "--track")
        second = succeeded(lab, "sync", NAME, "--track")
        assert second["changed"] is True
        lab.run("kc-a", "virsh", "destroy", NAME)
        succeeded(lab, "sync", NAME)
        assert succeeded(lab, "sync", NAME)["changed"] is False
        assert_same(lab, vm, devices)
        lab.run("kc-b", "virsh", "start", NAME)
        lab.wait_for_guest("kc-b", vm.serial)


def written(lab: Lab, path: str, text: str, at: int) -> None:
    """Write to the device, past the page cache or not as the kernel likes."""
    lab.run("kc-a", "sh", "-ec", f"printf {text} | dd of={path} bs=1 seek={at} conv=notrunc status=none")


def test_a_replica_follows_what_is_written_to_a_device(lab: Lab) -> None:
    """Whether it was reaches the device, or is still in the kernel's memory."""
    with on_devices(lab, "vda", disks=("raw:8M:1M",), boot=False) as (vm, devices):
        succeeded(lab, "sync", NAME, "--create")
        assert succeeded(lab, "sync", NAME)["changed"] is False
        written(lab, devices["vda"], "new", 5 << 20)
        result = succeeded(lab, "sync", NAME)
        assert result["changed"] is True
        assert result["bytes_sent"] < 4 << 20
        assert_same(lab, vm, devices)
        assert succeeded(lab, "clone", NAME, "--idempotent")["changed"] is False


def test_another_device_under_the_same_name_is_no_unchanged_source(lab: Lab) -> None:
    """Loop devices come and go with their numbers, and nothing was written to either."""
    with on_devices(lab, "vda", disks=("raw:8M:1M",), boot=False) as (vm, devices):
        succeeded(lab, "sync", NAME, "--create")
        path = devices["vda"]
        lab.run(
            "kc-a",
            "sh",
            "-ec",
            f"losetup -d {path}; printf other | dd of={backing(vm.disks['vda'])} conv=notrunc status=none",
        )
        lab.run("kc-a", "losetup", path, backing(vm.disks["vda"]))
        assert succeeded(lab, "sync", NAME)["changed"] is True
        assert_same(lab, vm, devices)


def test_a_device_that_is_written_while_it_is_copied(lab: Lab) -> None:
    with on_devices(lab, "vda", disks=("raw:16M:8M",), boot=False) as (vm, devices):
        before = picture(lab, "kc-b")
        argv = ("kc-a", "kc-b", NAME, "--bandwidth-limit", "2M", "--retries", "0", "--output", "json")
        with held(lab, "durable", *argv) as child:
            written(lab, devices["vda"], "new", 15 << 20)
            child.send_signal(signal.SIGCONT)
            done = ended(child, 120)
        assert done.code != 0
        assert "was changed while it was being copied" in done.err
        assert picture(lab, "kc-b").domains == before.domains
        succeeded(lab, "clone", NAME, "--resume", "--wait")
        assert_same(lab, vm, devices)


def test_an_interrupted_copy_of_a_device_is_resumed(lab: Lab) -> None:
    with on_devices(lab, "vda", disks=("raw:32M:16M",), boot=False) as (vm, devices):
        argv = ("kc-a", "kc-b", NAME, "--bandwidth-limit", "4M", "--output", "json")
        with held(lab, "durable", *argv) as child:
            child.kill()
        result = succeeded(lab, "clone", NAME, "--resume", "--wait")
        assert result["bytes_reused"] > 0
        assert_same(lab, vm, devices)


@contextmanager
def mounted(lab: Lab, path: str) -> Iterator[str]:
    lab.run("kc-a", "sh", "-ec", f"mkfs.ext4 -q -F {path}; mkdir -p /run/m; mount {path} /run/m")
    try:
        yield "is mounted, or part of another device"
    finally:
        lab.run("kc-a", "umount", "/run/m")


@contextmanager
def exported(lab: Lab, path: str) -> Iterator[str]:
    with written_by_another(lab, path, "raw"):
        yield "open for writing"


BUSY = {"mounted": mounted, "exported by another process": exported}


@pytest.mark.parametrize("how", BUSY)
def test_a_device_that_somebody_else_uses(lab: Lab, how: str) -> None:
    with on_devices(lab, "vda", disks=("raw:16M:1M",), boot=False) as (_, devices):
        before = picture(lab, "kc-b")
        with BUSY[how](lab, devices["vda"]) as said:
            done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--output", "json")
        assert done.code == 3, done.err
        [finding] = done.document["error"]["findings"]
        assert (finding["code"], finding["subject"]) == ("disk-in-use", "vda")
        assert said in finding["text"]
        assert picture(lab, "kc-b") == before
        succeeded(lab, "clone", NAME)


def test_a_device_below_an_overlay(lab: Lab) -> None:
    """A chain that ends on a device, as of a golden volume with an overlay for each VM."""
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False)
    top = f"{IMAGES}/{NAME}-top.qcow2"
    with device(lab, vm.disks["vda"]) as path:
        script = f"qemu-img create -q -f qcow2 -b {path} -F raw {top}; qemu-io -f qcow2 -c 'write -P 7 2M 64k' {top}"
        lab.run("kc-a", "sh", "-ec", script)
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
        xml = xml.replace(f"<source file='{vm.disks['vda']}'", f"<source file='{top}'").replace("'raw'", "'qcow2'", 1)
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
        (disk,) = succeeded(lab, "sync", NAME, "--create")["disks"]
        assert content(lab, "kc-b", disk["destination"], "qcow2") == content(lab, "kc-a", top, "qcow2")
        assert succeeded(lab, "sync", NAME)["changed"] is False
        written(lab, path, "new", 4 << 20)
        assert succeeded(lab, "sync", NAME)["changed"] is True
        assert content(lab, "kc-b", disk["destination"], "qcow2") == content(lab, "kc-a", top, "qcow2")


def test_a_device_that_is_not_there(lab: Lab) -> None:
    with on_devices(lab, "vda", disks=("raw:8M:1M",), boot=False) as (vm, devices):
        lab.run("kc-a", "losetup", "-d", devices["vda"])
        try:
            done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--output", "json")
        finally:
            lab.run("kc-a", "losetup", devices["vda"], backing(vm.disks["vda"]))
        assert done.code == 3, done.err
        assert devices["vda"] in done.document["error"]["findings"][0]["text"]
