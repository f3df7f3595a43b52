"""Filesystems at the destination that lack what ext4 has, or are too small: used as they are, or refused at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clonekit import (
    Done,
    assert_becomes,
    definition,
    disks_of,
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

NAME = "stored"
PLAINFS = Path(__file__).parent.with_name("plainfs.py")
FAT = ("no-links", "no-owners", "no-modes", "dense", "plain-names", "folds")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)
    remove(lab, "kc-a", NAME)


def lacking(*options: str) -> str:
    """The command that mounts a filesystem which lacks that."""
    return " ".join([sys.executable, str(PLAINFS), *(f"--{one}" for one in options)])


def run(lab: Lab, command: str, *argv: str) -> Done:
    return kvm_clone(lab, command, "kc-a", "kc-b", NAME, "--pool", "own", "--output", "json", *argv)


def copied(lab: Lab, command: str, *argv: str) -> dict[str, Any]:
    done = run(lab, command, *argv)
    assert done.code == 0, done.err
    document: dict[str, Any] = done.document
    return document


def refused(lab: Lab, command: str, *argv: str, says: str) -> Done:
    """It ends with exit code 3 and changes nothing."""
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    files = in_pool(lab)
    done = run(lab, command, *argv)
    assert done.code == 3, done.out + done.err
    assert says in done.err + done.out
    assert done.document["error"]["remedy"]
    assert in_pool(lab) == files
    for host, then in before.items():
        assert_becomes(lab, host, then)
    return done


def assert_equal(lab: Lab, source: Vm) -> None:
    for target, (path, format_) in disks_of(lab, "kc-b", source.name).items():
        assert path.startswith(OWN)
        assert digest(lab, "kc-b", path, format_) == digest(lab, "kc-a", source.disks[target], format_)


def write(lab: Lab, source: Vm, target: str, *commands: str) -> None:
    format_ = disks_of(lab, "kc-a", source.name)[target][1]
    words = [word for command in commands for word in ("-c", command)]
    lab.run("kc-a", "qemu-io", "-f", format_, *words, source.disks[target])


def test_a_filesystem_like_fat(lab: Lab) -> None:
    """No hard links, owners, modes, holes, nor names that hold anything."""
    source = lab.vm("kc-a", NAME, ["qcow2:8M:2M", "raw:8M:2M"], boot=False)
    with own_pool(lab, lacking(*FAT)):
        result = copied(lab, "clone")
        assert result["verified"] is True
        assert_equal(lab, source)
        write(lab, source, "vda", "write -P 1 1M 64k")
        write(lab, source, "vdb", "write -P 2 7M 64k", "write -z 0 64k")
        result = copied(lab, "sync")
        assert result["bytes_sent"] <= 3 * 64 << 10
        assert_equal(lab, source)
        assert copied(lab, "sync")["changed"] is False
        assert not [name for name in in_pool(lab) if "kvm-clone" in name]


def test_what_such_a_filesystem_lacks_is_told_before(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False)
    with own_pool(lab, lacking(*FAT, "no-direct")):
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace("type='raw'", "type='raw' cache='none'"))
        assert definition(lab, "kc-a", NAME).find("devices/disk/driver[@cache='none']") is not None
        plan = copied(lab, "clone", "--dry-run")
        codes = [finding["code"] for finding in plan["findings"] if finding["severity"] == "warning"]
        assert codes == ["owner", "mode", "direct"]
        assert in_pool(lab) == []


def durable(lab: Lab) -> int:
    """The byte before which the journal in the pool calls disk vda durable."""
    lines = lab.run("kc-b", "sh", "-c", f"cat {OWN}/.kvm-clone-*.journal", check=False).stdout.split("\n")[:-1]
    found = [json.loads(line.partition(" ")[2]) for line in lines]
    return max((one["end"] for one in found if one["record"] == "durable" and one["disk"] == "vda"), default=0)


@pytest.mark.faults
def test_an_interrupted_clone_goes_on_there(lab: Lab) -> None:
    source = lab.vm("kc-a", NAME, ["qcow2:24M:24M", "raw:24M:24M"], boot=False)
    slow = ("--bandwidth-limit", "8M", "--route", "relay", "--parallel", "1")
    with own_pool(lab, lacking(*FAT)):
        with running(lab, "kc-a", "kc-b", NAME, "--pool", "own", *slow) as child:
            wait_until("8 MiB are durable", lambda: durable(lab) >= 8 * MIB, 60)
            child.terminate()
            assert ended(child).code == 6
        result = copied(lab, "clone", "--resume")
        assert result["bytes_reused"] >= 8 * MIB
        assert_equal(lab, source)


def test_where_no_file_can_get_its_name_nothing_is_begun(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False)
    with own_pool(lab, lacking("no-links", "no-noreplace")):
        refused(lab, "clone", says="neither hard links nor a rename")


def test_a_file_that_is_too_large_is_refused(lab: Lab) -> None:
    """A sparse disk of 20 GiB, on a filesystem whose files end at 16 GiB."""
    source = lab.vm("kc-a", NAME, ["raw:1M"], boot=False)
    lab.run("kc-a", "truncate", "-s", "20G", source.disks["vda"])
    with device() as disk:
        disk.format("-t", "ext2", "-b", "1024")
        with pool_on(lab, disk):
            refused(lab, "clone", says="needs a file of 20.0 GiB")


def test_holes_that_take_room_are_counted(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:4T:1M"], boot=False)
    with own_pool(lab, lacking("dense")):
        refused(lab, "clone", says="4.6 TiB are needed")


@pytest.mark.faults
def test_what_the_source_compresses_is_counted_as_it_will_be_stored(lab: Lab) -> None:
    """As cloud images are: a clone of one at rest stays compressed, one of a VM that runs does not."""
    source = lab.vm("kc-a", NAME, ["qcow2:64M"], boot=False)
    plain, path = f"{source.disks['vda']}.plain", source.disks["vda"]
    script = (
        'mv "$2" "$1"; qemu-io -f qcow2 -c "write -P 7 0 64M" "$1"; '
        'qemu-img convert -c -f qcow2 -O qcow2 "$1" "$2"; rm "$1"'
    )
    lab.run("kc-a", "sh", "-e", "-c", script, "compress", plain, path)
    with own_pool(lab, "mount -t tmpfs -o size=32m none"):
        lab.run("kc-a", "virsh", "-q", "start", NAME)
        refused(lab, "clone", says="are needed")
        lab.run("kc-a", "virsh", "-q", "destroy", NAME)
        copied(lab, "clone")
        assert_equal(lab, source)


def test_a_sync_that_has_no_room_for_what_changed_leaves_the_replica(lab: Lab) -> None:
    source = lab.vm("kc-a", NAME, ["raw:16M:16M"], boot=False)
    with own_pool(lab, "mount -t tmpfs -o size=24m none"):
        copied(lab, "clone")
        before = digest(lab, "kc-b", f"{OWN}/{NAME}-vda.raw", "raw")
        write(lab, source, "vda", "write -P 3 0 14M")
        refused(lab, "sync", says="for what has changed")
        assert digest(lab, "kc-b", f"{OWN}/{NAME}-vda.raw", "raw") == before
        lab.run("kc-b", "mount", "-o", "remount,size=64m", OWN)
        copied(lab, "sync")
        assert_equal(lab, source)


def test_a_directory_with_more_names_than_are_told(lab: Lab) -> None:
    source = lab.vm("kc-a", NAME, ["raw:1M:1M"], boot=False)
    with own_pool(lab, "mount -t tmpfs none"):
        script = f"cd {OWN} && seq -f {NAME}-vda-%g.raw 1 5000 | xargs touch"
        lab.run("kc-b", "sh", "-c", script)
        result = copied(lab, "clone")
        assert result["operation"] in result["disks"][0]["destination"]
        assert_equal(lab, source)
