"""Disks that rest on other images, and VMs with snapshots: their current state is copied, and written flat."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
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
    remove,
    succeeded,
    wipe,
    written_by_another,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

LONG = pytest.mark.faults

NAME = "layered"

CHAIN = r"""
set -eu
cd "$(dirname "$1")"
top=$(basename "$1")
qemu-img convert -f qcow2 -O raw "$top" five.raw
qemu-img create -q -f qcow2 -b five.raw -F raw plain.qcow2
qemu-io -f qcow2 -c "write -P 4 1M 300k" plain.qcow2 >/dev/null
qemu-img convert -f qcow2 -c -O qcow2 -B five.raw -F raw plain.qcow2 four.qcow2
rm plain.qcow2
qemu-img create -q -f qcow2 -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"'"$PWD"'/four.qcow2"}}' \
  -F qcow2 three.qcow2
qemu-io -f qcow2 -c "write -P 3 2M 64k" -c "write -z 3M 128k" three.qcow2 >/dev/null
qemu-img create -q -f qcow2 -b "$PWD/three.qcow2" -F qcow2 -o extended_l2=on two.qcow2
qemu-io -f qcow2 -c "write -P 2 2080k 6k" two.qcow2 >/dev/null
rm "$top"
qemu-img create -q -f qcow2 -b two.qcow2 -F qcow2 "$top"
qemu-img resize -q "$top" +3M
qemu-io -f qcow2 -c "write -P 1 4M 100k" "$top" >/dev/null
"""
"""Makes a chain of five of one image: relative, absolute and json: names, a raw base, compressed clusters, subclusters,
and a disk that is larger than what it rests on."""

LAYERS = ("two.qcow2", "three.qcow2", "four.qcow2", "five.raw")


def content(lab: Lab, host: str, path: str, format_: str = "qcow2") -> str:
    """A digest of what the guest sees."""
    script = 'qemu-img convert -U -f "$2" -O raw "$1" /run/flat.raw; sha256sum </run/flat.raw; rm /run/flat.raw'
    return lab.run(host, "sh", "-ec", script, "content", path, format_).stdout


def files(lab: Lab, host: str) -> str:
    """Everything in the host's pool: content and times."""
    script = f'cd {IMAGES}; for f in *; do stat -c \'%n %i %s %y %z\' "$f"; sha256sum "$f"; done'
    return lab.run(host, "sh", "-c", script).stdout


def layered(lab: Lab, name: str = NAME, **how: Any) -> Vm:
    """A VM whose last disk is a chain of five."""
    vm = lab.vm("kc-a", name, ["qcow2:8M:5M"], **how)
    lab.run("kc-a", "bash", "-c", CHAIN, "chain", vm.disks[max(vm.disks)])
    return vm


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    yield
    assert_nothing_left(lab)
    wipe(lab)
    names = lab.run("kc-a", "virsh", "list", "--all", "--name").stdout.split()
    remove(lab, "kc-a", *(name for name in names if name.startswith(NAME)))
    lab.run("kc-a", "sh", "-c", f"cd {IMAGES}; rm -f {NAME}* {' '.join(LAYERS)} base.qcow2")


def cloned(lab: Lab, *argv: str, command: str = "clone", name: str = NAME) -> Any:
    return succeeded(lab, command, name, *argv)


def warned(result: Any) -> str:
    return " ".join(finding["text"] for finding in result["findings"] if finding["severity"] == "warning")


def assert_flat(lab: Lab, name: str = NAME) -> None:
    """No disk of the clone rests on another image, by its header or by the definition."""
    root = definition(lab, "kc-b", name)
    assert root.findall("devices/disk/backingStore/source") == []
    for path, format_ in disks_of(lab, "kc-b", name).values():
        about = lab.run("kc-b", "qemu-img", "info", "-U", "--output=json", "-f", format_, path).stdout
        assert "backing-filename" not in json.loads(about)


def test_a_chain_of_five_is_written_flat(lab: Lab) -> None:
    vm = layered(lab, boot=False)
    before = files(lab, "kc-a")
    result = cloned(lab)
    assert files(lab, "kc-a") == before
    (disk,) = result["disks"]
    assert content(lab, "kc-b", disk["destination"]) == content(lab, "kc-a", vm.disks["vda"])
    assert_flat(lab)


def test_a_definition_that_names_the_chain(lab: Lab) -> None:
    vm = layered(lab, boot=False)
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
    base = f"<backingStore type='file'><format type='qcow2'/><source file='{IMAGES}/%s'/>%s</backingStore>"
    store = base % ("two.qcow2", base % ("three.qcow2", ""))
    source = f"<source file='{vm.disks['vda']}'/>"
    assert source in xml
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(source, source + store))
    cloned(lab)
    assert_flat(lab)
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(source, f"{source}<backingStore/>"))
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--new-name", "other")
    assert done.code == 3
    assert "rests on nothing by the definition" in done.err


@pytest.mark.parametrize("start", [False, pytest.param(True, marks=LONG)], ids=["stopped", "running"])
def test_the_clone_of_a_vm_on_a_shared_base_boots(start: bool, lab: Lab) -> None:
    """Another VM runs on the same base all the while."""
    other = lab.vm("kc-a", f"{NAME}-other", ["raw:8M:1M"])
    base, top = f"{IMAGES}/base.qcow2", other.disks["vda"]
    lab.run("kc-a", "sh", "-ec", f"mv {top} {base}; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 {top}")
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"])
    lab.run(
        "kc-a", "sh", "-ec", f"rm {vm.disks['vda']}; qemu-img create -q -f qcow2 -b {base} -F qcow2 {vm.disks['vda']}"
    )
    lab.run("kc-a", "virsh", "start", other.name)
    lab.wait_for_guest("kc-a", other.serial)
    if start:
        lab.run("kc-a", "virsh", "start", NAME)
        lab.wait_for_guest("kc-a", vm.serial)
    cloned(lab)
    assert_flat(lab)
    lab.run("kc-b", "virsh", "start", NAME)
    assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"


def test_a_base_that_is_written_is_in_use(lab: Lab) -> None:
    layered(lab, boot=False)
    before = picture(lab, "kc-b")
    with written_by_another(lab, f"{IMAGES}/five.raw", "raw"):
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
    assert done.code == 3
    assert "five.raw" in done.err
    assert "in use" in done.err
    assert picture(lab, "kc-b") == before


def test_a_base_that_is_gone_is_named(lab: Lab) -> None:
    layered(lab, boot=False)
    lab.run("kc-a", "mv", f"{IMAGES}/three.qcow2", f"{IMAGES}/{NAME}-elsewhere")
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
    assert done.code == 3
    assert f"{IMAGES}/three.qcow2" in done.err


def test_a_base_that_changes_during_the_copy_is_noticed(lab: Lab) -> None:
    """Whoever writes to it is no QEMU, and heeds no lock."""
    layered(lab, boot=False)
    with held(lab, "create", "kc-a", "kc-b", NAME, "--retries", "0") as child:
        lab.run("kc-a", "sh", "-c", f"printf x | dd of={IMAGES}/five.raw bs=1 seek=100 conv=notrunc 2>/dev/null")
        child.send_signal(signal.SIGCONT)
        done = ended(child)
    assert done.code == 6
    assert "was changed while it was being copied" in done.err
    cloned(lab, "--force")


def test_a_replica_of_a_chain_follows_its_base_and_its_snapshots(lab: Lab) -> None:
    """It gets an external snapshot, loses it, gets an internal one, and its base becomes another file."""
    vm = layered(lab, boot=False)
    top = vm.disks["vda"]

    def synced(*argv: str, changed: bool = True) -> Any:
        result = cloned(lab, *argv, command="sync")
        assert result["changed"] is changed
        (path, format_) = disks_of(lab, "kc-b", NAME)["vda"]
        (ours, ours_format) = disks_of(lab, "kc-a", NAME)["vda"]
        assert content(lab, "kc-b", path, format_) == content(lab, "kc-a", ours, ours_format)
        assert_flat(lab)
        return result

    synced("--create")
    synced(changed=False)
    lab.run("kc-a", "virsh", "snapshot-create-as", NAME, "outside", "--disk-only")
    (snapshot, _) = disks_of(lab, "kc-a", NAME)["vda"]
    assert snapshot != top
    lab.run("kc-a", "qemu-io", "-f", "qcow2", "-c", "write -P 9 5M 64k", snapshot)
    result = synced()
    assert "snapshots (outside)" in warned(result)
    lab.run(
        "kc-a", "sh", "-ec", f"qemu-img commit -q -f qcow2 {snapshot}; virsh snapshot-delete {NAME} outside --metadata"
    )
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(snapshot, top))
    synced()
    lab.run("kc-a", "qemu-img", "snapshot", "-c", "inside", top)
    lab.run("kc-a", "qemu-io", "-f", "qcow2", "-c", "write -P 8 6M 64k", top)
    result = synced()
    assert "internal snapshots (inside)" in warned(result)
    lab.run("kc-a", "qemu-img", "snapshot", "-a", "inside", top)
    lab.run("kc-a", "qemu-img", "snapshot", "-d", "inside", top)
    synced()
    lab.run("kc-a", "sh", "-c", f"printf x | dd of={IMAGES}/five.raw bs=1 seek=100 conv=notrunc 2>/dev/null")
    synced()


def test_a_managed_save_is_left_behind_by_word(lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], start=True)
    lab.wait_for_guest("kc-a", vm.serial)
    lab.run("kc-a", "virsh", "managedsave", NAME)
    refused = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
    assert refused.code == 3
    assert "--without-saved-state" in refused.err
    result = cloned(lab, "--without-saved-state")
    assert result["consistency"] == "crash"
    assert "managed save" in warned(result)
    for target, (path, format_) in disks_of(lab, "kc-b", NAME).items():
        assert content(lab, "kc-b", path, format_) == content(lab, "kc-a", vm.disks[target], format_)
    assert NAME in lab.run("kc-a", "virsh", "list", "--all", "--with-managed-save", "--name").stdout
    lab.run("kc-b", "virsh", "start", NAME)
    assert lab.wait_for_guest("kc-b", vm.serial) == f"marker of {NAME} vdb"
