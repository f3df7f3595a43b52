"""VMs that boot by UEFI: their variables travel with their disks, and go with them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from clonekit import (
    IMAGES,
    assert_nothing_left,
    definition,
    held,
    kvm_clone,
    leftovers,
    records,
    refused_in_the_end,
    remove,
    succeeded,
    wait_until,
    wipe,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

LONG = pytest.mark.faults

NAME = "uefi"
NVRAM = "/var/lib/libvirt/qemu/nvram"
FIRMWARE = "/usr/share/OVMF"
SIZE = 540672
"""Bytes of the variables of OVMF's 4M builds."""


def listed(lab: Lab, host: str) -> dict[str, bytes]:
    """The files of variables on the host, with what is staged of them."""
    return {path.name: path.read_bytes() for path in sorted(lab.outside(host, NVRAM).iterdir())}


def started(lab: Lab, host: str, name: str) -> None:
    """Start the VM and stop it at once: libvirt makes its variables, and the firmware may write some."""
    for command in ("start", "destroy"):
        lab.run(host, "virsh", command, "--domain", name)


def made(lab: Lab, name: str = NAME) -> Vm:
    """A VM without a guest that has its variables."""
    vm = lab.vm("kc-a", name, ["raw:8M:1M"], boot=False, uefi=True)
    started(lab, "kc-a", name)
    return vm


def named(lab: Lab, host: str, name: str) -> str:
    """The file of variables that the definition names, if it does."""
    return definition(lab, host, name).findtext("os/nvram") or ""


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    yield
    assert_nothing_left(lab)
    wipe(lab)
    names = lab.run("kc-a", "virsh", "list", "--all", "--name").stdout.split()
    remove(lab, "kc-a", *(name for name in names if name.startswith(NAME)))
    for host in ("kc-a", "kc-b"):
        lab.run(host, "sh", "-c", f"rm -rf {NVRAM}/* {NVRAM}/.k*")


def cloned(lab: Lab, *argv: str, command: str = "clone") -> Any:
    return succeeded(lab, command, NAME, *argv)


@pytest.mark.parametrize("running", [False, pytest.param(True, marks=LONG)], ids=["stopped", "running"])
def test_the_clone_prints_the_variable_that_the_guest_has_made(running: bool, lab: Lab) -> None:
    vm = lab.vm("kc-a", NAME, ["raw:8M:1M"], uefi=True, start=True)
    text = lab.wait_for_guest("kc-a", vm.serial, 120, "EFI-VARIABLE")
    if not running:
        lab.run("kc-a", "virsh", "destroy", NAME)
    result = cloned(lab, "--new-name", "other")
    assert [disk["target"] for disk in result["disks"]] == ["vda", "vdb", "nvram"]
    assert result["disks"][-1]["destination"] == f"{NVRAM}/other_VARS.fd"
    assert list(listed(lab, "kc-b")) == ["other_VARS.fd"]
    lab.run("kc-b", "virsh", "start", "other")
    assert lab.wait_for_guest("kc-b", vm.serial, 120, "EFI-VARIABLE") == text


def test_the_source_keeps_its_variables_and_the_clone_has_the_same(lab: Lab) -> None:
    made(lab)
    before = listed(lab, "kc-a")
    cloned(lab)
    assert listed(lab, "kc-b") == listed(lab, "kc-a") == before
    (content,) = before.values()
    assert len(content) == SIZE
    assert named(lab, "kc-b", NAME) == "", "it is where libvirt looks for it by itself"


def test_a_replacing_clone_and_an_undefine_leave_no_orphan(lab: Lab) -> None:
    made(lab)
    cloned(lab)
    started(lab, "kc-b", NAME)
    result = cloned(lab, "--force")
    assert f"{NVRAM}/{NAME}_VARS.fd" in result["removed"]
    assert list(listed(lab, "kc-b")) == [f"{NAME}_VARS-nvram.fd"]
    assert named(lab, "kc-b", NAME) == f"{NVRAM}/{NAME}_VARS-nvram.fd"
    started(lab, "kc-b", NAME)
    assert list(listed(lab, "kc-b")) == [f"{NAME}_VARS-nvram.fd"]
    cloned(lab, "--cleanup-existing")
    assert list(listed(lab, "kc-b")) == [f"{NAME}_VARS.fd"]
    lab.run("kc-b", "virsh", "undefine", NAME, "--nvram")
    assert listed(lab, "kc-b") == {}


def test_variables_that_another_vm_has_too_stay(lab: Lab) -> None:
    """libvirt would remove them with the VM: the definition does not name them, and the other one's does."""
    made(lab)
    cloned(lab)
    file = f"{NVRAM}/{NAME}_VARS.fd"
    lab.vm("kc-b", "another", ["raw:8M:1M"], boot=False, uefi=True)
    xml = lab.run("kc-b", "virsh", "dumpxml", "--inactive", "another").stdout
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml.replace("</os>", f"<nvram>{file}</nvram></os>"))
    before = listed(lab, "kc-b")
    result = cloned(lab, "--cleanup-existing")
    assert before.items() <= listed(lab, "kc-b").items()
    assert file in " ".join(result["warnings"])
    assert named(lab, "kc-b", NAME) == f"{NVRAM}/{NAME}_VARS-nvram.fd"
    result = cloned(lab, "--force")
    assert before.items() <= listed(lab, "kc-b").items()


def test_a_vm_that_was_never_started_has_none(lab: Lab) -> None:
    """Its clone makes its own, and does not take up what another VM has left behind."""
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False, uefi=True)
    result = cloned(lab)
    assert [disk["target"] for disk in result["disks"]] == ["vda"]
    assert (listed(lab, "kc-b"), named(lab, "kc-b", NAME)) == ({}, "")
    remove(lab, "kc-b", NAME)
    lab.run("kc-b", "sh", "-c", f"echo left behind >{NVRAM}/{NAME}_VARS.fd")
    cloned(lab)
    assert named(lab, "kc-b", NAME) == f"{NVRAM}/{NAME}_VARS-nvram.fd"
    started(lab, "kc-b", NAME)
    assert {name: len(content) for name, content in listed(lab, "kc-b").items()} == {
        f"{NAME}_VARS-nvram.fd": SIZE,
        f"{NAME}_VARS.fd": len("left behind\n"),
    }


def test_a_sync_brings_what_has_changed(lab: Lab) -> None:
    made(lab)
    cloned(lab, "--create", command="sync")
    assert cloned(lab, command="sync")["changed"] is False
    file = lab.outside("kc-a", f"{NVRAM}/{NAME}_VARS.fd")
    for byte in (b"x", b"y"):
        with file.open("r+b") as out:
            out.seek(1000)
            out.write(byte)
        result = cloned(lab, command="sync")
        (content,) = listed(lab, "kc-b").values()
        assert content == file.read_bytes()
        assert [disk["sent"] for disk in result["disks"] if disk["target"] == "vda"] == [0]
    started(lab, "kc-b", NAME)
    refused = kvm_clone(lab, "sync", "kc-a", "kc-b", NAME)
    assert refused.code == 4, "the replica was started"


@pytest.mark.parametrize("record", ["create", pytest.param("durable", marks=LONG), "publish", "define", "committed"])
@pytest.mark.parametrize("command", [pytest.param("clone", marks=LONG), "sync"])
def test_it_ends_well_after_a_kill(command: str, record: str, lab: Lab) -> None:
    made(lab)
    if command == "sync":
        cloned(lab)
        started(lab, "kc-a", NAME)
    before = listed(lab, "kc-b")
    with held(lab, record, "kc-a", "kc-b", NAME, command=command) as child:
        child.kill()
        child.wait()
    wait_until("the agents end", lambda: not leftovers(lab, "kc-b").get("processes"))
    if record != "committed":
        assert before.items() <= listed(lab, "kc-b").items(), "what was there is as it was"
    cloned(lab, "--idempotent", command=command)
    assert list(listed(lab, "kc-b").values()) == list(listed(lab, "kc-a").values())
    assert records(lab) == []


def test_what_is_rolled_back_and_cleaned_up_leaves_nothing(lab: Lab) -> None:
    vm = made(lab)
    with refused_in_the_end(lab, vm):
        with held(lab, "before publish", "kc-a", "kc-b", NAME) as child:
            lab.run("kc-b", "rm", "/run/qemu-elsewhere")
            child.send_signal(signal.SIGCONT)
            assert child.wait(60) == 6
        assert listed(lab, "kc-b") == {}
    with held(lab, "publish", "kc-a", "kc-b", NAME) as child:
        child.kill()
        child.wait()
    wait_until("the agents end", lambda: not leftovers(lab, "kc-b").get("processes"))
    assert listed(lab, "kc-b")
    done = kvm_clone(lab, "cleanup", "kc-b")
    assert done.code == 0, done.err
    assert listed(lab, "kc-b") == {}


LOADERS = {
    "explicit": (
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader readonly='yes' type='pflash'>{FIRMWARE}/OVMF_CODE_4M.fd</loader>"
        f"<nvram template='{FIRMWARE}/OVMF_VARS_4M.fd'>{NVRAM}/of-its-own.fd</nvram></os>",
        "",
    ),
    "explicit, without a word of the variables": (
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader readonly='yes' type='pflash'>{FIRMWARE}/OVMF_CODE_4M.fd</loader></os>",
        "",
    ),
    "with secure boot": (
        "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type>"
        "<firmware><feature enabled='yes' name='enrolled-keys'/><feature enabled='yes' name='secure-boot'/></firmware>"
        "</os>",
        "<smm state='on'/>",
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders(loader: str, lab: Lab) -> None:
    os, feature = LOADERS[loader]
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False, uefi=True)
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", NAME).stdout
    start, end = xml.index("<os "), xml.index("</os>") + len("</os>")
    xml = (xml[:start] + os + xml[end:]).replace("<acpi/>", f"<acpi/>{feature}")
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
    started(lab, "kc-a", NAME)
    (content,) = listed(lab, "kc-a").values()
    cloned(lab, "--new-name", "other")
    assert listed(lab, "kc-b") == {"other_VARS.fd": content}
    started(lab, "kc-b", "other")
    assert list(listed(lab, "kc-b")) == ["other_VARS.fd"]


def test_a_destination_without_firmware_is_told(lab: Lab) -> None:
    lab.vm("kc-a", NAME, ["raw:8M:1M"], boot=False, uefi=True)
    descriptors = "/usr/share/qemu/firmware"
    lab.run("kc-b", "mount", "-t", "tmpfs", "tmpfs", descriptors)
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
    finally:
        lab.run("kc-b", "umount", descriptors)
    assert done.code == 3
    assert "has no firmware to choose from" in done.err


def test_variables_that_are_in_use(lab: Lab) -> None:
    """Of a VM at rest they are locked like its disks, and by its disks' rules in use."""
    made(lab)
    file = lab.outside("kc-a", f"{NVRAM}/{NAME}_VARS.fd")
    argv = ["qemu-io", "-f", "raw", str(file)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("write 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", NAME)
        writer.stdin.close()
    assert done.code == 3
    assert "UEFI variables" in done.err
    assert "in use" in done.err
    assert not list(lab.outside("kc-b", IMAGES).iterdir())
