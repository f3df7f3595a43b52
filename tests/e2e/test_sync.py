"""A replica that is brought to the state of its source, which is shut off; and what may come in between."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from clonekit import (
    IMAGES,
    Done,
    assert_nothing_left,
    definition,
    disks_of,
    ended,
    held,
    interrupt,
    kvm_clone,
    leftovers,
    parts,
    picture,
    remove,
    running,
    wait_for_durable,
    wait_until,
    wipe,
    written_by_another,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
LONG = pytest.mark.faults
"""A variant of what another test has shown already."""

SLOW = ("--bandwidth-limit", "2M", "--route", "relay")
NAME = "replicated"


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


@pytest.fixture
def source(lab: Lab) -> Vm:
    """A VM that has a replica."""
    return replicated(lab, "qcow2:16M:4M", "raw:16M:4M")


def replicated(lab: Lab, *disks: str, name: str = NAME, boot: bool = False) -> Vm:
    vm = lab.vm("kc-a", name, list(disks), boot=boot)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", name)
    assert done.code == 0, done.err
    return vm


def sync(lab: Lab, *argv: str, name: str = NAME) -> Done:
    return kvm_clone(lab, "sync", "kc-a", "kc-b", name, "--output", "json", *argv)


def synced(lab: Lab, *argv: str, name: str = NAME) -> dict[str, Any]:
    """The result of a sync that went well."""
    done = sync(lab, *argv, name=name)
    assert done.code == 0, done.err
    result: dict[str, Any] = done.document
    assert result["warnings"] == []
    return result


def image_of(lab: Lab, host: str, name: str, target: str) -> tuple[Path, str]:
    """Where a disk's image lies on this machine, and its format."""
    path, format_ = disks_of(lab, host, name)[target]
    return lab.outside(host, path), format_


def qemu_io(image: tuple[Path, str], *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", image[1], *words, str(image[0])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def change(lab: Lab, target: str, *commands: str, name: str = NAME) -> None:
    """Write the source's disk."""
    qemu_io(image_of(lab, "kc-a", name, target), *commands)


def change_both(lab: Lab) -> None:
    """Three blocks of one disk and one of the other."""
    change(lab, "vda", "write -P 0xa1 1M 4k", "write -P 0xa2 9M 128k")
    change(lab, "vdb", "write -P 0xb1 16773120 4k")


def is_equal(lab: Lab, name: str = NAME, replica: str | None = None) -> bool:
    """Whether the replica's disks have the content that the source's have, as its own definition names them."""
    ours, theirs = disks_of(lab, "kc-a", name), disks_of(lab, "kc-b", replica or name)
    return ours.keys() == theirs.keys() and all(
        _same(image_of(lab, "kc-a", name, target), _reachable(lab, *theirs[target])) for target in ours
    )


def _same(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    argv = ["qemu-img", "compare", "-f", one[1], "-F", other[1], str(one[0]), str(other[0])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "size" not in done.stdout + done.stderr


FLAT = ".flat"


def _reachable(lab: Lab, path: str, format_: str) -> tuple[Path, str]:
    """The image as this machine can open it: one that rests on another is flattened on its own host."""
    if "/kvm-clone-" not in path:
        return lab.outside("kc-b", path), format_
    lab.run("kc-b", "qemu-img", "convert", "-f", format_, "-O", "raw", path, f"{IMAGES}/{FLAT}")
    return lab.outside("kc-b", f"{IMAGES}/{FLAT}"), "raw"


def contents(lab: Lab) -> dict[str, tuple[int, int, int, bytes]]:
    """Every file of the destination's pool that is not staged: inode, mtime, size taken, and content."""
    found = {}
    for path in sorted(lab.outside("kc-b", IMAGES).iterdir()):
        if not path.name.startswith(".kvm-clone-"):
            about = path.stat()
            found[path.name] = (about.st_ino, about.st_mtime_ns, about.st_blocks, path.read_bytes())
    return found


def everything(lab: Lab) -> tuple[object, ...]:
    """Both hosts, with what is in the replica's files and definition."""
    xml = lab.run("kc-b", "sh", "-c", "cat /etc/libvirt/qemu/*.xml; ls /var/lib/libvirt/qemu/save").stdout
    return picture(lab, "kc-a"), picture(lab, "kc-b"), contents(lab), xml


def names(lab: Lab) -> list[str]:
    return sorted(path.name for path in lab.outside("kc-b", IMAGES).iterdir() if path.name != FLAT)


def refused(lab: Lab, code: int, *argv: str, name: str = NAME, says: str = "") -> Done:
    """A sync that ends with this code and changes nothing."""
    before = everything(lab)
    done = sync(lab, *argv, name=name)
    assert done.code == code, done.out + done.err
    assert says in done.err + done.out
    assert done.document["error"]["remedy"]
    assert everything(lab) == before
    return done


def virsh(lab: Lab, host: str, *argv: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
    return lab.run(host, "virsh", "-q", *argv, input=input, check=check).stdout


# What a sync does.


def test_what_has_changed_is_sent_and_nothing_else_changes(lab: Lab, source: Vm) -> None:
    before, files = definition(lab, "kc-b", NAME), names(lab)
    virsh(lab, "kc-b", "autostart", NAME)
    change_both(lab)
    result = synced(lab)
    assert result["changed"] is True
    assert result["verified"] is True
    assert result["proof"] == "full"
    assert result["bytes_sent"] == 4 * BLOCK
    assert result["bytes_compared"] == 32 * MIB
    assert [(disk["sent"], disk["method"]) for disk in result["disks"]] == [
        (3 * BLOCK, "digests"),
        (BLOCK, "digests"),
    ]
    assert is_equal(lab)
    assert names(lab) == files
    after = definition(lab, "kc-b", NAME)
    for what in ("uuid", "name"):
        assert after.findtext(what) == before.findtext(what)
    assert after.findtext("uuid") != source.uuid
    macs = [[mac.get("address") for mac in one.iterfind(".//interface/mac")] for one in (before, after)]
    assert macs[0] == macs[1] != []
    assert "enable" in virsh(lab, "kc-b", "dominfo", NAME).partition("Autostart:")[2].splitlines()[0]
    assert not after.findall("devices/disk/backingStore/format")
    assert_nothing_left(lab)
    assert synced(lab)["changed"] is False


@LONG
def test_verify_full_and_none(lab: Lab, source: Vm) -> None:
    change_both(lab)
    assert synced(lab, "--verify", "full")["proof"] == "full"
    assert is_equal(lab)
    change(lab, "vdb", "write -P 0xc1 8M 64k")
    result = synced(lab, "--no-verify")
    assert (result["proof"], result["verified"], result["bytes_sent"]) == ("off", False, BLOCK)
    assert is_equal(lab)


def test_nothing_changed_sends_nothing_and_touches_nothing(lab: Lab, source: Vm) -> None:
    for argv in ((), ("--idempotent",), ("--create",)):
        before = everything(lab)
        result = synced(lab, *argv)
        assert (result["changed"], result["bytes_sent"], result["bytes_compared"]) == (False, 0, 0)
        assert everything(lab) == before


@LONG
def test_a_source_that_was_only_started_changes_nothing_in_the_replica(lab: Lab, source: Vm) -> None:
    virsh(lab, "kc-a", "start", NAME)
    virsh(lab, "kc-a", "destroy", NAME)
    before = contents(lab)
    result = synced(lab)
    assert result["bytes_sent"] == 0
    assert {name: one[3] for name, one in contents(lab).items()} == {name: one[3] for name, one in before.items()}
    assert synced(lab)["changed"] is False


RNG = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"


def test_the_definition_follows_the_source(lab: Lab, source: Vm) -> None:
    virsh(lab, "kc-a", "setmaxmem", NAME, "77824", "--config")
    virsh(lab, "kc-a", "attach-device", NAME, "/dev/stdin", "--config", input=RNG)
    mac = "52:54:00:12:34:56"
    virsh(lab, "kc-a", "attach-interface", NAME, "network", "default", "--mac", mac, "--config")
    before = definition(lab, "kc-b", NAME)
    result = synced(lab)
    assert (result["changed"], result["bytes_sent"]) == (True, 0)
    after = definition(lab, "kc-b", NAME)
    assert after.findtext("memory") == "77824"
    assert after.find("devices/rng") is not None
    old, new = ([one.get("address") for one in xml.iterfind(".//interface/mac")] for xml in (before, after))
    assert new[: len(old)] == old
    assert len(new) == len(old) + 1
    assert mac not in new
    assert is_equal(lab)
    assert synced(lab)["changed"] is False
    change_both(lab)
    synced(lab)
    assert [one.get("address") for one in definition(lab, "kc-b", NAME).iterfind(".//interface/mac")] == new


@pytest.mark.parametrize("disk", ["raw:32M:16M", pytest.param("qcow2:32M:16M", marks=LONG)])
def test_what_became_zero_is_zero_and_takes_no_room(lab: Lab, disk: str) -> None:
    replicated(lab, disk)
    path, _ = image_of(lab, "kc-b", NAME, "vda")
    before = path.stat().st_blocks
    change(lab, "vda", "write -z 2M 4M", "write -z -u 8M 4M", "write -P 0 14M 1M", "write -P 0 4k 4k")
    synced(lab)
    assert is_equal(lab)
    assert path.stat().st_blocks <= before - 3 * MIB // 512
    change(lab, "vda", "write -P 0xee 3M 64k")
    synced(lab)
    assert is_equal(lab)


def convert(lab: Lab, target: str, format_: str, cluster: str = "", name: str = NAME) -> None:
    """Give the replica's disk another format, as its administrator may."""
    path, old = disks_of(lab, "kc-b", name)[target]
    options = ("-o", f"cluster_size={cluster}") if cluster else ()
    new = f"{path}.{format_}"
    lab.run("kc-b", "qemu-img", "convert", "-f", old, "-O", format_, *options, path, new)
    lab.run("kc-b", "rm", path)
    xml = virsh(lab, "kc-b", "dumpxml", "--inactive", name)
    head, _, tail = xml.partition(f"<source file='{path}'")
    start = head.rindex("<driver")
    head = head[:start] + head[start:].replace(f"type='{old}'", f"type='{format_}'")
    virsh(lab, "kc-b", "define", "/dev/stdin", input=f"{head}<source file='{new}'{tail}")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("target", "format_", "cluster"),
    [
        ("vda", "raw", ""),
        pytest.param("vdb", "qcow2", "4k", marks=LONG),
        pytest.param("vdb", "qcow2", "2M", marks=LONG),
        pytest.param("vda", "qcow2", "4k", marks=LONG),
    ],
)
def test_a_replica_keeps_its_own_format(lab: Lab, source: Vm, target: str, format_: str, cluster: str) -> None:
    convert(lab, target, format_, cluster)
    change_both(lab)
    refused(lab, 4, says="--force")
    files = names(lab)
    result = synced(lab, "--force")
    assert result["bytes_sent"] == 4 * BLOCK
    assert is_equal(lab)
    assert names(lab) == files
    assert disks_of(lab, "kc-b", NAME)[target][1] == format_
    assert {disk["target"]: disk["format"] for disk in result["disks"]}[target] == format_
    change_both(lab)
    change(lab, target, "write -z 0 3M", "write -P 0x31 5M 1k")
    synced(lab)
    assert is_equal(lab)


# Disks that come, go, grow and shrink.


def test_a_grown_disk_grows(lab: Lab, source: Vm) -> None:
    for target in ("vda", "vdb"):
        path, format_ = image_of(lab, "kc-a", NAME, target)
        subprocess.run(["qemu-img", "resize", "-q", "-f", format_, str(path), "24M"], check=True)
        change(lab, target, "write -P 0x19 20M 64k", "write -P 0x18 0 64k")
    files = names(lab)
    result = synced(lab)
    assert result["bytes_sent"] == 4 * BLOCK
    assert {disk["virtual_size"] for disk in result["disks"]} == {24 * MIB}
    assert is_equal(lab)
    assert names(lab) == files
    assert synced(lab)["changed"] is False


@LONG
def test_a_size_that_is_no_multiple_of_anything(lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False)
    path = lab.outside("kc-a", vm.disks["vda"])
    os.truncate(path, 8 * MIB + 5 * 512)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", NAME).code == 0
    change(lab, "vda", f"write -P 0x21 {8 * MIB + 4 * 512} 512", "write -P 0x22 0 64k")
    result = synced(lab)
    assert result["bytes_sent"] == BLOCK + 5 * 512
    assert is_equal(lab)
    assert image_of(lab, "kc-b", NAME, "vda")[0].stat().st_size == 8 * MIB + 5 * 512


@LONG
@pytest.mark.parametrize("disk", ["raw:16M:4M", "qcow2:16M:4M"])
def test_a_shrunk_disk_is_refused_and_replaced_by_force(lab: Lab, disk: str) -> None:
    replicated(lab, disk, "raw:8M:1M")
    path, format_ = image_of(lab, "kc-a", NAME, "vda")
    subprocess.run(["qemu-img", "resize", "-q", "-f", format_, "--shrink", str(path), "12M"], check=True)
    refused(lab, 3, says="larger")
    result = synced(lab, "--force")
    assert [one["method"] for one in result["disks"]] == ["whole", "digests"]
    assert is_equal(lab)
    assert len(names(lab)) == 2
    assert_nothing_left(lab)


def test_disks_come_and_go_with_the_source(lab: Lab, source: Vm) -> None:
    added = f"{IMAGES}/added.raw"
    lab.run("kc-a", "sh", "-c", f"head -c 2097152 /dev/urandom >{added}; truncate -s 8M {added}")
    virsh(lab, "kc-a", "attach-disk", NAME, added, "vdc", "--subdriver", "raw", "--config")
    change_both(lab)
    result = synced(lab)
    assert [one["method"] for one in result["disks"]] == ["digests", "digests", "whole"]
    assert result["bytes_sent"] == 4 * BLOCK + 2 * MIB
    assert is_equal(lab)
    gone = disks_of(lab, "kc-b", NAME)["vdb"][0]
    virsh(lab, "kc-a", "detach-disk", NAME, "vdb", "--config")
    result = synced(lab)
    assert gone in result["removed"]
    assert is_equal(lab)
    assert len(names(lab)) == 2
    lab.run("kc-a", "rm", added, source.disks["vdb"])


@LONG
def test_a_vm_without_disks(lab: Lab) -> None:
    lab.vm("kc-a", "bare", [], boot=False)
    for target in disks_of(lab, "kc-a", "bare"):
        virsh(lab, "kc-a", "detach-disk", "bare", target, "--config")
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "bare").code == 0
    assert synced(lab, name="bare")["changed"] is False
    virsh(lab, "kc-a", "setmaxmem", "bare", "77824", "--config")
    assert synced(lab, name="bare")["changed"] is True
    assert definition(lab, "kc-b", "bare").findtext("memory") == "77824"
    assert_nothing_left(lab)


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    [
        'it\'s "odd" & <new>',
        pytest.param("ünïcode 虚拟机", marks=LONG),
        pytest.param("-dash $(id) %s;", marks=LONG),
    ],
)
def test_names_that_hold_anything(lab: Lab, name: str) -> None:
    lab.vm("kc-a", name, ["qcow2:8M:1M", "raw:8M:1M"], boot=False)
    replica = f"{name} & 'copy'"
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "--new-name", replica, "--", name)
    assert done.code == 0, done.err
    change(lab, "vda", "write -P 9 1M 1M", name=name)
    done = kvm_clone(lab, "sync", "--output", "json", "kc-a", "kc-b", "--target-name", replica, "--", name)
    assert done.code == 0, done.err
    assert (done.document["changed"], done.document["warnings"]) == (True, [])
    assert is_equal(lab, name, replica)
    assert_nothing_left(lab)
    remove(lab, "kc-a", name)


@LONG
def test_a_directory_whose_name_holds_what_xml_and_qemu_take_for_their_own(lab: Lab) -> None:
    odd = f"{IMAGES}/a & 'b', \"c\"=1:2"
    pool = f"<pool type='dir'><name>odd</name><target><path>{escape(odd)}</path></target></pool>"
    vm = lab.vm("kc-a", NAME, ["qcow2:8M:1M", "raw:8M:1M"], boot=False)
    for host in ("kc-a", "kc-b"):
        lab.run(host, "mkdir", "-p", odd)
        virsh(lab, host, "pool-define", "/dev/stdin", input=pool)
        virsh(lab, host, "pool-start", "odd")
    try:
        assert kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--pool", "odd").code == 0
        change_both_small(lab)
        assert synced(lab)["bytes_sent"] == 2 * BLOCK
        assert {path.rpartition("/")[0] for path, _ in disks_of(lab, "kc-b", NAME).values()} == {odd}
        assert is_equal(lab)
        left = [path.name for path in lab.outside("kc-b", odd).iterdir()]
        assert sorted(left) == sorted(Path(path).name for path in vm.disks.values())
        assert_nothing_left(lab)
    finally:
        for host in ("kc-a", "kc-b"):
            virsh(lab, host, "pool-destroy", "odd")
            virsh(lab, host, "pool-undefine", "odd")
            lab.run(host, "rm", "-rf", odd)


def change_both_small(lab: Lab) -> None:
    change(lab, "vda", "write -P 0xa1 1M 4k")
    change(lab, "vdb", "write -P 0xb1 2M 64k")


# What is no replica, or not any more.


def test_without_a_replica_there_is_create(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["qcow2:8M:1M"], boot=False)
    refused(lab, 3, says="kvm-clone clone")
    refused(lab, 3, "--target-name", "other", says="kvm-clone clone")
    result = synced(lab, "--create", "--target-name", "other")
    assert (result["name"], result["changed"], result["disks"][0]["method"]) == ("other", True, "whole")
    assert is_equal(lab, NAME, "other")
    refused(lab, 3, says="kvm-clone clone")
    change(lab, "vda", "write -P 4 4M 64k")
    result = synced(lab, "--create", "--target-name", "other")
    assert (result["bytes_sent"], result["disks"][0]["method"]) == (BLOCK, "digests")
    assert is_equal(lab, NAME, "other")


def test_a_vm_that_is_no_replica_is_left_alone(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False)
    lab.vm("kc-a", "another", ["raw:8M:1M"], boot=False)
    lab.vm("kc-b", NAME, ["raw:8M:1M"], boot=False)
    for argv in ((), ("--idempotent", "--create"), ("--force",)):
        refused(lab, 4, *argv, says="no replica")
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "another").code == 0
    refused(lab, 4, "--target-name", "another", "--force", says="no replica")
    remove(lab, "kc-a", "another")


DEVICE = "/machine/peripheral/virtio-disk1/virtio-backend"


def write_from_within(lab: Lab) -> None:
    """Write the replica's vdb as its running guest would; see `has_what_was_written`."""
    for command in ("write -P 0x77 3M 64k", "flush"):
        said = virsh(lab, "kc-b", "qemu-monitor-command", NAME, "--hmp", f'qemu-io -d {DEVICE} "{command}"')
        assert not said.strip(), said


def guest_writes(lab: Lab) -> None:
    """Start the replica, let its guest write, and end it."""
    virsh(lab, "kc-b", "start", NAME)
    write_from_within(lab)
    virsh(lab, "kc-b", "destroy", NAME)


def written_by_hand(lab: Lab) -> None:
    qemu_io(image_of(lab, "kc-b", NAME, "vda"), "write -P 0x77 3M 64k")


def written_raw(lab: Lab) -> None:
    with image_of(lab, "kc-b", NAME, "vdb")[0].open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"w" * 512)


def edited(lab: Lab) -> None:
    virsh(lab, "kc-b", "attach-device", NAME, "/dev/stdin", "--config", input=RNG)


def saved(lab: Lab) -> None:
    virsh(lab, "kc-b", "start", NAME)
    virsh(lab, "kc-b", "managedsave", NAME)


@pytest.mark.parametrize(
    "use",
    [
        guest_writes,
        *(pytest.param(one, marks=LONG) for one in (written_by_hand, written_raw, edited)),
        saved,
    ],
)
def test_a_replica_that_was_used_is_overwritten_by_force_alone(
    lab: Lab, source: Vm, use: Callable[[Lab], None]
) -> None:
    use(lab)
    refused(lab, 4, says="--force")
    change_both(lab)
    refused(lab, 4, "--idempotent", "--create", says="--force")
    synced(lab, "--force")
    assert is_equal(lab)
    assert definition(lab, "kc-b", NAME).find("devices/rng") is None
    assert virsh(lab, "kc-b", "list", "--all", "--with-managed-save", "--name").strip() == ""
    assert len(names(lab)) == 2
    assert_nothing_left(lab)
    assert synced(lab)["changed"] is False


@LONG
def test_a_replica_that_was_only_started_may_have_been_written(lab: Lab, source: Vm) -> None:
    """libvirt gives the images to QEMU and back, which their ctimes show, as a write whose mtime was set back does."""
    virsh(lab, "kc-b", "start", NAME)
    virsh(lab, "kc-b", "destroy", NAME)
    change_both(lab)
    refused(lab, 4, says="--force")
    assert synced(lab, "--force")["changed"] is True
    assert is_equal(lab)


def test_a_running_replica_is_stopped_by_force_alone(lab: Lab, source: Vm) -> None:
    virsh(lab, "kc-b", "start", NAME)
    change_both(lab)
    before = lab.run("kc-b", "virsh", "domid", NAME).stdout
    for argv in ((), ("--idempotent", "--create")):
        done = sync(lab, *argv)
        assert done.code == 4, done.err
        assert "running" in done.err + done.out
    shown = sync(lab, "--force", "--dry-run")
    assert (shown.code, shown.document["action"]) == (0, "stop the replica"), shown.err
    image, format_ = disks_of(lab, "kc-a", NAME)["vda"]
    with written_by_another(lab, image, format_):
        assert sync(lab, "--force").code == 3
    assert lab.run("kc-b", "virsh", "domid", NAME).stdout == before
    synced(lab, "--force")
    assert virsh(lab, "kc-b", "domstate", NAME).strip() == "shut off"
    assert is_equal(lab)
    assert_nothing_left(lab)


def test_an_image_that_another_vm_rests_on_is_never_written(lab: Lab, source: Vm) -> None:
    base = disks_of(lab, "kc-b", NAME)["vdb"][0]
    linked = f"{IMAGES}/linked.qcow2"
    lab.run("kc-b", "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", linked)
    other = lab.vm("kc-b", "linked", ["raw:1M"], boot=False)
    virsh(lab, "kc-b", "attach-disk", "linked", linked, "vdx", "--subdriver", "qcow2", "--config")
    before = lab.outside("kc-b", base).read_bytes()
    change_both(lab)
    refused(lab, 3, says=base)
    assert synced(lab, "--force")["disks"][1]["method"] == "whole"
    assert lab.outside("kc-b", base).read_bytes() == before
    assert is_equal(lab)
    remove(lab, "kc-b", other.name)


# Plans.


def test_dry_run_says_how_much_and_changes_nothing(lab: Lab, source: Vm) -> None:
    change_both(lab)
    before = everything(lab)
    done = sync(lab, "--dry-run")
    assert done.code == 0, done.err
    assert [disk["to_send"] for disk in done.document["disks"]] == [3 * BLOCK, BLOCK]
    assert done.document["action"] == "sync"
    text = kvm_clone(lab, "sync", "kc-a", "kc-b", NAME, "--dry-run")
    assert text.code == 0
    assert "vda" in text.out
    assert everything(lab) == before
    synced(lab)
    before = everything(lab)
    assert sync(lab, "--dry-run").document["action"] == "nothing to do"
    assert everything(lab) == before


@pytest.mark.faults
def test_a_saved_plan_runs_unless_the_facts_have_changed(lab: Lab, source: Vm, tmp_path: Path) -> None:
    change_both(lab)
    plan = str(tmp_path / "plan")
    before = everything(lab)
    assert sync(lab, "--plan-out", plan).code == 0
    assert everything(lab) == before
    change(lab, "vda", "write -P 1 0 64k")
    before = everything(lab)
    assert kvm_clone(lab, "apply", plan).code == 3
    assert everything(lab) == before
    assert sync(lab, "--plan-out", plan).code == 0
    written_raw(lab)
    assert kvm_clone(lab, "apply", plan).code in (3, 4)
    assert sync(lab, "--force", "--plan-out", plan).code == 0
    done = kvm_clone(lab, "apply", plan, "--output", "json")
    assert done.code == 0, done.err
    assert is_equal(lab)
    assert kvm_clone(lab, "apply", plan).code == 3


# Interrupted.


def big_change(lab: Lab) -> None:
    """A change of 8 MiB, too much to be sent in an instant by SLOW."""
    change(lab, "vdb", "write -P 0x5a 4M 8M")


def interrupted(lab: Lab, kill: bool = False) -> None:
    """A sync that ended in the midst of its copy; the replica is as before."""
    before = contents(lab)
    argv = ("kc-a", "kc-b", NAME, *SLOW)
    if kill:
        with running(lab, *argv, command="sync") as child:
            wait_for_durable(lab, "vdb", 4 * MIB + 1)
            child.kill()
            ended(child)
        wait_until("the agents have ended", lambda: not leftovers(lab, "kc-b").keys() - {"staged"})
    else:
        interrupt(lab, *argv, disk="vdb", at=4 * MIB + 1, command="sync")
    assert contents(lab) == before
    assert parts(lab)


@pytest.mark.parametrize(("kill", "flag"), [pytest.param(False, "--resume", marks=LONG), (True, "--idempotent")])
def test_an_interrupted_sync_goes_on(lab: Lab, source: Vm, kill: bool, flag: str) -> None:
    big_change(lab)
    change(lab, "vda", "write -P 0x41 1M 64k")
    old = picture(lab, "kc-b").domains
    interrupted(lab, kill=kill)
    refused(lab, 4, says="--resume")
    shown = sync(lab, flag, "--dry-run").document
    result = synced(lab, flag)
    assert sum(disk["to_send"] for disk in shown["disks"]) == result["bytes_sent"]
    assert 0 < result["bytes_sent"] <= 6 * MIB
    assert result["bytes_reused"] + result["bytes_sent"] == 8 * MIB + 64 * KIB
    assert is_equal(lab)
    assert picture(lab, "kc-b").domains == old
    assert len(names(lab)) == 2
    assert_nothing_left(lab)
    assert synced(lab)["changed"] is False


@LONG
def test_a_source_that_changes_between_two_attempts(lab: Lab, source: Vm) -> None:
    big_change(lab)
    interrupted(lab)
    change(lab, "vdb", "write -z 5M 1M", "write -P 1 15M 64k", "write -P 2 0 4k")
    assert synced(lab, "--resume")["bytes_sent"] < 7 * MIB
    assert is_equal(lab)


@pytest.mark.faults
def test_a_replica_that_was_used_after_an_interruption_is_not_mixed(lab: Lab, source: Vm) -> None:
    big_change(lab)
    interrupted(lab)
    virsh(lab, "kc-b", "start", NAME)
    refused(lab, 4, "--idempotent", says="shut it down")
    virsh(lab, "kc-b", "destroy", NAME)
    qemu_io(image_of(lab, "kc-b", NAME, "vdb"), "write -P 0x66 2M 64k")
    for flag in ("--resume", "--idempotent"):
        refused(lab, 4, flag, says="--force")
    synced(lab, "--force")
    assert is_equal(lab)
    assert_nothing_left(lab)


@LONG
def test_force_starts_over(lab: Lab, source: Vm) -> None:
    big_change(lab)
    interrupted(lab)
    assert synced(lab, "--force")["bytes_sent"] == 8 * MIB
    assert is_equal(lab)
    assert_nothing_left(lab)


@LONG
def test_cleanup_leaves_the_replica(lab: Lab, source: Vm) -> None:
    big_change(lab)
    before, domains = contents(lab), picture(lab, "kc-b").domains
    interrupted(lab)
    done = kvm_clone(lab, "cleanup", "kc-b")
    assert done.code == 0, done.err
    assert contents(lab) == before
    assert picture(lab, "kc-b").domains == domains
    assert_nothing_left(lab)
    refused(lab, 3, "--resume", says="no interrupted sync")
    synced(lab)
    assert is_equal(lab)


@LONG
def test_no_keep_partial_keeps_nothing(lab: Lab, source: Vm) -> None:
    big_change(lab)
    before = contents(lab)
    with running(lab, "kc-a", "kc-b", NAME, *SLOW, "--no-keep-partial", command="sync") as child:
        wait_for_durable(lab, "vdb", 4 * MIB + 1)
        child.terminate()
        assert ended(child).code == 6
    assert contents(lab) == before
    assert_nothing_left(lab)


@LONG
def test_another_kind_of_attempt_is_told_apart(lab: Lab, source: Vm) -> None:
    big_change(lab)
    interrupted(lab)
    before = everything(lab)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--idempotent", "--output", "json")
    assert done.code == 3, done.err
    assert "kvm-clone sync" in done.document["error"]["remedy"]
    assert everything(lab) == before


# Between the commit and the end.


def killed_at(lab: Lab, record: str) -> None:
    with held(lab, record, "kc-a", "kc-b", NAME, command="sync") as child:
        child.kill()
        ended(child)
    wait_until("the agents have ended", lambda: not leftovers(lab, "kc-b").keys() - {"staged"})


@pytest.mark.faults
@pytest.mark.parametrize(
    ("record", "by"),
    [
        ("committed", "cleanup"),
        *(pytest.param(record, "cleanup", marks=LONG) for record in ("define", "merged")),
        *(pytest.param(record, "sync", marks=LONG) for record in ("define", "committed", "merged")),
    ],
)
def test_what_has_committed_is_merged_by_whoever_comes_next(lab: Lab, source: Vm, record: str, by: str) -> None:
    change_both(lab)
    killed_at(lab, record)
    if by == "cleanup":
        done = kvm_clone(lab, "cleanup", "kc-b")
        assert done.code == 0, done.err
        assert is_equal(lab) is (record != "define")
    result = synced(lab, "--idempotent")
    assert result["changed"] is (record == "define")
    assert is_equal(lab)
    assert len(names(lab)) == 2
    assert_nothing_left(lab)
    assert synced(lab)["changed"] is False


def has_what_was_written(lab: Lab, name: str = NAME) -> bool:
    """Whether what `guest_writes` wrote is on the replica's last disk."""
    _, (path, format_) = max(disks_of(lab, "kc-b", name).items())
    file, kind = _reachable(lab, path, format_)
    done = subprocess.run(
        ["qemu-io", "-r", "-f", kind, "-c", "read -P 0x77 3M 64k", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "verification failed" not in done.stdout and done.returncode == 0


@pytest.mark.parametrize(
    ("record", "by"),
    [
        ("merged", "sync"),
        pytest.param("merged", "cleanup", marks=LONG),
        *(pytest.param("committed", by, marks=LONG) for by in ("sync", "cleanup")),
    ],
)
def test_what_a_guest_wrote_before_the_merge_is_kept(lab: Lab, source: Vm, record: str, by: str) -> None:
    change_both(lab)
    change(lab, "vda", "write -P 0x11 3M 64k")
    change(lab, "vdb", "write -P 0x11 3M 64k")
    killed_at(lab, record)
    guest_writes(lab)
    if by == "cleanup":
        assert kvm_clone(lab, "cleanup", "kc-b").code == 0
    done = sync(lab)
    assert done.code == 4, done.out + done.err
    assert has_what_was_written(lab)
    assert len(names(lab)) == 2
    assert_nothing_left(lab)
    refused(lab, 4)
    synced(lab, "--force")
    assert is_equal(lab)


@pytest.mark.faults
@pytest.mark.parametrize("by", ["sync", pytest.param("cleanup", marks=LONG)])
def test_what_is_merged_is_not_merged_again(lab: Lab, source: Vm, by: str) -> None:
    """The replica is defined onto its images again, and used, when the overlays are still there."""
    change(lab, "vda", "write -P 0x11 3M 64k")
    change(lab, "vdb", "write -P 0x11 3M 64k")
    killed_at(lab, "before merged")
    assert is_equal(lab)
    guest_writes(lab)
    if by == "cleanup":
        assert kvm_clone(lab, "cleanup", "kc-b").code == 0
    assert sync(lab).code == 4
    assert has_what_was_written(lab)
    assert len(names(lab)) == 2
    refused(lab, 4)


@LONG
def test_a_guest_boots_from_what_is_not_merged_yet(lab: Lab) -> None:
    vm = replicated(lab, "raw:8M:1M", boot=True)
    change(lab, "vdb", "write -P 0x11 4M 64k")
    killed_at(lab, "committed")
    assert all("/kvm-clone-" in path for path, _ in disks_of(lab, "kc-b", NAME).values())
    assert is_equal(lab)
    virsh(lab, "kc-b", "start", NAME)
    lab.wait_for_guest("kc-b", vm.serial)
    before = virsh(lab, "kc-b", "domid", NAME)
    for argv in ((), ("--idempotent",), ("--resume",)):
        assert sync(lab, *argv).code == 4
    assert kvm_clone(lab, "cleanup", "kc-b").code != 0
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", NAME, "--idempotent").code in (3, 4, 6)
    assert virsh(lab, "kc-b", "domid", NAME) == before
    virsh(lab, "kc-b", "destroy", NAME)
    assert sync(lab).code == 4
    assert not [path for path, _ in disks_of(lab, "kc-b", NAME).values() if "/kvm-clone-" in path]
    assert_nothing_left(lab)
    synced(lab, "--force")
    assert is_equal(lab)


@pytest.mark.parametrize("record", [*(pytest.param(one, marks=LONG) for one in ("begin", "proven")), "merged"])
def test_no_replica_starts_on_what_is_being_written(lab: Lab, source: Vm, record: str) -> None:
    change_both(lab)
    with held(lab, record, "kc-a", "kc-b", NAME, "--output", "json", command="sync") as child:
        assert lab.run("kc-b", "virsh", "start", NAME, check=False).returncode != 0
        child.send_signal(signal.SIGCONT)
        done = ended(child)
    assert (done.code, done.document["warnings"]) == (0, []), done.err
    assert is_equal(lab)
    virsh(lab, "kc-b", "start", NAME)


@LONG
def test_a_replica_that_is_started_before_the_merge_keeps_what_it_writes(lab: Lab, source: Vm) -> None:
    change_both(lab)
    with held(lab, "committed", "kc-a", "kc-b", NAME, "--output", "json", command="sync") as child:
        virsh(lab, "kc-b", "start", NAME)
        write_from_within(lab)
        child.send_signal(signal.SIGCONT)
        done = ended(child)
    assert done.code == 0, done.err
    assert "merged" in done.document["warnings"][0]
    assert virsh(lab, "kc-b", "domstate", NAME).strip() == "running"
    assert sync(lab).code == 4
    virsh(lab, "kc-b", "destroy", NAME)
    assert sync(lab).code == 4
    assert has_what_was_written(lab)
    assert_nothing_left(lab)


def test_a_merge_waits_for_who_looks_at_the_images(lab: Lab, source: Vm) -> None:
    """Such as another sync that waits for this one: its agent has the images open for a moment."""
    change_both(lab)
    path, _ = disks_of(lab, "kc-b", NAME)["vda"]
    with held(lab, "committed", "kc-a", "kc-b", NAME, "--output", "json", command="sync") as child:
        looks = f"exec 3<{path}; (sleep 3) >/dev/null 2>&1 &"
        lab.run("kc-b", "sh", "-c", looks)
        child.send_signal(signal.SIGCONT)
        done = ended(child)
    assert (done.code, done.document["warnings"]) == (0, []), done.err
    assert is_equal(lab)
    assert_nothing_left(lab)


def snapshot_outside(lab: Lab) -> None:
    virsh(lab, "kc-b", "snapshot-create-as", NAME, "one", "--disk-only")


def snapshot_inside(lab: Lab) -> None:
    virsh(lab, "kc-b", "snapshot-create-as", NAME, "one")


def linked(lab: Lab) -> None:
    path, _ = disks_of(lab, "kc-b", NAME)["vdb"]
    image = f"{IMAGES}/linked.qcow2"
    lab.run("kc-b", "qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", image)
    lab.vm("kc-b", "linked", ["raw:1M"], boot=False)
    virsh(lab, "kc-b", "attach-disk", "linked", image, "vdx", "--subdriver", "qcow2", "--config")


def renamed(lab: Lab) -> None:
    virsh(lab, "kc-b", "domrename", NAME, "renamed")


def undefined(lab: Lab) -> None:
    virsh(lab, "kc-b", "undefine", NAME)


@pytest.mark.faults
@pytest.mark.parametrize(
    "use",
    [
        *(pytest.param(one, marks=LONG) for one in (snapshot_outside, snapshot_inside, linked, saved, undefined)),
        renamed,
    ],
)
def test_overlays_that_somebody_builds_on_are_kept(lab: Lab, source: Vm, use: Callable[[Lab], None]) -> None:
    change_both(lab)
    killed_at(lab, "committed")
    use(lab)
    before, domains = contents(lab), picture(lab, "kc-b").domains
    there = virsh(lab, "kc-b", "list", "--all", "--name").split()
    for argv in ((), ("--idempotent",)):
        assert sync(lab, *argv).code != 0
    assert kvm_clone(lab, "cleanup", "kc-b").code != 0
    now = contents(lab)
    assert now.keys() == before.keys()
    assert picture(lab, "kc-b").domains == domains
    for name in there:
        for path, format_ in disks_of(lab, "kc-b", name).values():
            lab.run("kc-b", "qemu-img", "info", "--backing-chain", "-f", format_, path)
    for name in there:
        virsh(lab, "kc-b", "start", name)
        virsh(lab, "kc-b", "destroy", name)


@pytest.mark.parametrize("wait", [pytest.param(False, marks=LONG), True])
def test_two_syncs_at_once(lab: Lab, source: Vm, wait: bool) -> None:
    change(lab, "vdb", "write -P 0x5a 4M 4M")
    argv = ["kc-a", "kc-b", NAME, "--output", "json", *SLOW, *(["--wait"] if wait else [])]
    with running(lab, *argv, command="sync") as one, running(lab, *argv, command="sync") as other:
        both = [ended(one), ended(other)]
    assert sorted(done.code for done in both) == ([0, 0] if wait else [0, 8]), [done.err for done in both]
    documents = [done.document for done in both if done.code == 0]
    assert [document["warnings"] for document in documents] == [[]] * len(documents)
    if wait:
        assert sorted(document["changed"] for document in documents) == [False, True]
    assert is_equal(lab)
    assert_nothing_left(lab)
