"""Every check before a clone, made to fail for real; nothing is written by any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from clonekit import IMAGES, Picture, kvm_clone, picture, remove
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

Situation = Callable[[Lab, Vm], AbstractContextManager[list[str]]]
"""Brings a situation about, and gives the options with which the clone is asked for."""


@pytest.fixture(scope="module")
def vm(lab: Lab) -> Iterator[Vm]:
    yield lab.vm("kc-a", "checked", ["qcow2:64M:20M"], boot=False)
    remove(lab, "kc-a", "checked")


def _on(lab: Lab, host: str, script: str) -> None:
    lab.run(host, "sh", "-c", script)


def _definition(old: str, new: str) -> Situation:
    """The source's definition with a pattern replaced."""

    @contextmanager
    def situation(lab: Lab, vm: Vm) -> Iterator[list[str]]:
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
        changed, count = re.subn(old, new, xml, count=1, flags=re.DOTALL)
        assert count == 1, xml
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=changed)
        try:
            yield []
        finally:
            lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)

    return situation


def _device(xml: str) -> Situation:
    return _definition("</devices>", f"{xml}</devices>")


def _pool(mount: str, *, active: bool = True) -> Situation:
    """A pool on a filesystem of its own on kc-b."""
    path = f"{IMAGES}/own"

    @contextmanager
    def situation(lab: Lab, vm: Vm) -> Iterator[list[str]]:
        _on(lab, "kc-b", f"mkdir -p {path} && {mount} {path} && virsh pool-define-as own dir --target {path}")
        if active:
            _on(lab, "kc-b", "virsh pool-start own")
        try:
            yield ["--pool", "own"]
        finally:
            _on(lab, "kc-b", f"virsh pool-destroy own; virsh pool-undefine own; umount {path}; rmdir {path}; true")

    return situation


def _covered(host: str, file: str, content: str) -> Situation:
    """A file of the host covered by another one."""

    @contextmanager
    def situation(lab: Lab, vm: Vm) -> Iterator[list[str]]:
        script = f"printf '{content}' > /run/cover && chmod 755 /run/cover && mount --bind /run/cover {file}"
        _on(lab, host, script if content else f"mount --bind /dev/null {file}")
        try:
            yield []
        finally:
            _on(lab, host, f"umount {file}")

    return situation


@contextmanager
def _inactive_network(lab: Lab, vm: Vm) -> Iterator[list[str]]:
    network = (
        "<network><name>idle</name><bridge name='virbr9'/><ip address='10.9.9.1' netmask='255.255.255.0'/></network>"
    )
    lab.run("kc-b", "virsh", "net-define", "/dev/stdin", input=network)
    try:
        with _device("<interface type='network'><source network='idle'/></interface>")(lab, vm) as options:
            yield options
    finally:
        lab.run("kc-b", "virsh", "net-undefine", "idle")


@contextmanager
def _same_uuid(lab: Lab, vm: Vm) -> Iterator[list[str]]:
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
    other = xml.replace(f"<name>{vm.name}</name>", "<name>twin</name>")
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=other)
    try:
        yield ["--preserve-uuid"]
    finally:
        lab.run("kc-b", "virsh", "undefine", "twin")


def _options(*options: str) -> Situation:
    @contextmanager
    def situation(lab: Lab, vm: Vm) -> Iterator[list[str]]:
        yield list(options)

    return situation


CPU = "<cpu mode='custom' check='%s'><model fallback='forbid'>%s</model>%s</cpu>"
LACKING = "Westmere-IBRS"
"""A model with a feature, spec-ctrl, that QEMU cannot emulate."""

BLOCKING: dict[str, tuple[Situation, str]] = {
    "space": (_pool("mount -t tmpfs -o size=16m none"), "are needed"),
    "inodes": (_pool("mount -t tmpfs -o nr_inodes=2 none"), "no room for"),
    "not-writable": (_pool("mount -t tmpfs -o ro none"), "cannot write"),
    "pool-inactive": (_pool("mount -t tmpfs none", active=False), "not active"),
    "pool-missing": (_options("--pool", "nowhere"), "no storage pool named nowhere"),
    "memory": (_definition(r"<memory[^>]*>\d+</memory>.*?</currentMemory>", "<memory unit='TiB'>9</memory>"), "memory"),
    "cpu-model": (
        _definition(r"<cpu .*?</cpu>", CPU % ("partial", "EPYC-Milan", "")),
        "required features: vme",
    ),
    "network-missing": (_device("<interface type='network'><source network='none'/></interface>"), "named none"),
    "bridge-missing": (_device("<interface type='bridge'><source bridge='br77'/></interface>"), "named br77"),
    "uuid-in-use": (_same_uuid, "VM twin on kc-b"),
    "tool-missing": (_covered("kc-b", "/usr/bin/qemu-nbd", ""), "kc-b has no qemu-nbd"),
    "tool-old": (_covered("kc-b", "/usr/bin/qemu-img", "#!/bin/sh\\necho qemu-img version 2.1.0\\n"), "2.1.0"),
    "referenced-disk-missing": (
        _device("<disk type='file' device='disk'><source file='/srv/x'/><target dev='vdr'/><readonly/></disk>"),
        "/srv/x",
    ),
    "boot-file-missing": (_definition("</type>", "</type><kernel>/boot/own-kernel</kernel>"), "/boot/own-kernel"),
    "name": (_options("--new-name", "a/b"), "cannot be a VM's name"),
}


def _dry_run(lab: Lab, options: list[str]) -> tuple[int, list[dict[str, str]]]:
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "checked", *options, "--dry-run", "--output", "json")
    return done.code, done.document["findings"]


@pytest.mark.parametrize("code", BLOCKING)
def test_a_blocking_finding(lab: Lab, vm: Vm, code: str) -> None:
    situation, text = BLOCKING[code]
    with situation(lab, vm) as options:
        before: dict[str, Picture] = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
        status, findings = _dry_run(lab, options)
        refused = kvm_clone(lab, "clone", "kc-a", "kc-b", "checked", *options)
        assert {host: picture(lab, host) for host in ("kc-a", "kc-b")} == before
    assert status == 3
    assert [one for one in findings if one["code"] == code and one["severity"] == "blocking" and text in one["text"]]
    assert refused.code == 3, refused.err
    assert text in refused.err


NOT_BLOCKING: dict[str, tuple[Situation, str]] = {
    "vcpus": (_definition(r"<vcpu[^>]*>1</vcpu>", "<vcpu>99</vcpu>"), "99 vCPUs"),
    "network-inactive": (_inactive_network, "idle"),
    "medium-missing": (
        _device("<disk type='file' device='cdrom'><source file='/srv/a.iso'/><target dev='sda' bus='sata'/></disk>"),
        "/srv/a.iso",
    ),
    "hostdev": (
        _device(
            "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>"
        ),
        "hostdev",
    ),
    "estimate": (_options(), "measured"),
}


@pytest.mark.parametrize("code", NOT_BLOCKING)
def test_a_finding_that_only_tells(lab: Lab, vm: Vm, code: str) -> None:
    situation, text = NOT_BLOCKING[code]
    with situation(lab, vm) as options:
        status, findings = _dry_run(lab, options)
    assert status == 0
    assert [one for one in findings if one["code"] == code and one["severity"] != "blocking" and text in one["text"]]


RUNNABLE = {
    "the feature is disabled": CPU % ("partial", LACKING, "<feature policy='disable' name='spec-ctrl'/>"),
    "nothing is checked": CPU % ("none", LACKING, ""),
}


@pytest.mark.parametrize("how", RUNNABLE)
def test_a_cpu_that_runs_there_although_its_model_does_not(lab: Lab, vm: Vm, how: str) -> None:
    with _definition(r"<cpu .*?</cpu>", RUNNABLE[how])(lab, vm):
        status, findings = _dry_run(lab, [])
    assert status == 0
    assert "cpu-model" not in [one["code"] for one in findings]


def test_an_emulator_that_the_destination_lacks(lab: Lab, vm: Vm) -> None:
    _on(lab, "kc-a", "cp -s /usr/bin/qemu-system-x86_64 /run/qemu-elsewhere")
    with _definition("<emulator>[^<]*", "<emulator>/run/qemu-elsewhere")(lab, vm):
        status, findings = _dry_run(lab, [])
    assert status == 3
    assert "machine" in [one["code"] for one in findings]


def test_a_host_without_python(lab: Lab, vm: Vm) -> None:
    with _covered("kc-b", "/usr/bin/python3.11", "")(lab, vm):
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "checked")
    assert done.code == 3, done.err
    assert "python3" in done.err


def test_a_path_that_another_vm_refers_to_is_not_taken(lab: Lab, vm: Vm) -> None:
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
    other = re.sub("<uuid>.*?</uuid>", "", xml).replace(f"<name>{vm.name}</name>", "<name>neighbour</name>")
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=other)
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "checked", "--dry-run", "--output", "json")
        assert done.code == 0, done.out
        assert done.document["disks"][0]["destination"] == f"{IMAGES}/checked-vda-vda.qcow2"
    finally:
        lab.run("kc-b", "virsh", "undefine", "neighbour")


def test_every_finding_is_told_at_once(lab: Lab, vm: Vm) -> None:
    with _device("<interface type='network'><source network='none'/></interface>")(lab, vm):
        _, findings = _dry_run(lab, ["--pool", "nowhere", "--new-name", "a/b"])
    assert {"network-missing", "pool-missing", "name"} <= {one["code"] for one in findings}
