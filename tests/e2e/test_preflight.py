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


def _arguments(*values: str) -> Situation:
    """QEMU's own arguments."""
    inside = "".join(f"<q:arg value='{value}'/>" for value in values)
    return _definition("</domain>", f"<q:commandline xmlns:q='{QEMU}'>{inside}</q:commandline></domain>")


QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
VIRTIO_VIDEO = "<graphics type='vnc' port='-1'/><video><model type='virtio'/></video>"
MODULES = "/usr/lib/x86_64-linux-gnu/qemu"
SECOND = f"{IMAGES}/second.raw"


@contextmanager
def _without_a_module(lab: Lab, vm: Vm) -> Iterator[list[str]]:
    """The VM has a virtio display, and QEMU on kc-b lacks the module for it."""
    copied = f"mkdir -p /run/modules; cp {MODULES}/accel-*.so /run/modules/"
    script = f"{copied}; touch /run/modules; mount --bind /run/modules {MODULES}"  # libvirt looks at the mtime
    _on(lab, "kc-b", script)
    try:
        with _device(VIRTIO_VIDEO)(lab, vm) as options:
            yield options
    finally:
        _on(lab, "kc-b", f"umount {MODULES}")


@contextmanager
def _with_a_second_disk(lab: Lab, vm: Vm) -> Iterator[list[str]]:
    _on(lab, "kc-a", f"truncate -s 1M {SECOND}")
    try:
        with _arguments("-drive", f"file={SECOND},format=raw,if=virtio")(lab, vm) as options:
            yield options
    finally:
        _on(lab, "kc-a", f"rm {SECOND}")


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
    "definition-refused": (_without_a_module, "does not support video model 'virtio'"),
    "data-not-copied": (_with_a_second_disk, SECOND),
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


FILTER = "<filterref filter='only-here'/>"
PCI = "<source><address type='pci' domain='0x0000' bus='0x77' slot='0x00' function='0x0'/></source>"
ISCSI = (
    "<driver name='qemu' type='raw'/><auth username='u'><secret type='iscsi' usage='no such secret'/></auth>"
    "<source protocol='iscsi' name='iqn.2020-01.org.example:t/1'><host name='192.0.2.7' port='3260'/></source>"
)


def _top(xml: str) -> Situation:
    return _definition("<os>", f"{xml}<os>")


@contextmanager
def _with_a_neighbour(lab: Lab, vm: Vm) -> Iterator[list[str]]:
    """A VM on kc-b whose serial port writes to the same file."""
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
    other = re.sub("<uuid>.*?</uuid>|<disk.*</disk>", "", xml, flags=re.DOTALL)
    other = other.replace(f"<name>{vm.name}</name>", "<name>neighbour</name>")
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=other)
    try:
        yield []
    finally:
        lab.run("kc-b", "virsh", "undefine", "neighbour")


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
    "path-missing": (
        _device("<input type='passthrough' bus='virtio'><source evdev='/dev/input/event77'/></input>"),
        "/dev/input/event77",
    ),
    "hugepages-missing": (_top("<memoryBacking><hugepages/></memoryBacking>"), "2.0 MiB"),
    "numa-missing": (_top("<numatune><memory mode='strict' nodeset='3'/></numatune>"), "NUMA node 3"),
    "cpuset-missing": (_top("<cputune><vcpupin vcpu='0' cpuset='700'/></cputune>"), "CPU 700"),
    "nwfilter-missing": (
        _device(f"<interface type='network'><source network='default'/>{FILTER}</interface>"),
        "only-here",
    ),
    "secret-missing": (
        _device(f"<disk type='network' device='cdrom'>{ISCSI}<target dev='sdx' bus='sata'/></disk>"),
        "iscsi/no such secret",
    ),
    "interface-missing": (_device("<interface type='direct'><source dev='eth77' mode='bridge'/></interface>"), "eth77"),
    "host-device-missing": (
        _device(
            "<hostdev mode='subsystem' type='pci'><source><address bus='0x77' slot='0' function='0'/></source>"
            "</hostdev>"
        ),
        "pci:0000:77:00.0",
    ),
    "address-missing": (_device("<graphics type='vnc' port='-1' listen='192.0.2.7'/>"), "192.0.2.7"),
    "seclabel-missing": (
        _definition("</domain>", "<seclabel type='dynamic' model='selinux' relabel='yes'/></domain>"),
        "selinux",
    ),
    "command-line": (_arguments("-device", "virtio-balloon-pci"), "-device"),
    "path-renamed": (_with_a_neighbour, "neighbour"),
}


@pytest.mark.parametrize("code", NOT_BLOCKING)
def test_a_finding_that_only_tells(lab: Lab, vm: Vm, code: str) -> None:
    situation, text = NOT_BLOCKING[code]
    with situation(lab, vm) as options:
        status, findings = _dry_run(lab, options)
    assert status == 0
    assert [one for one in findings if one["code"] == code and one["severity"] != "blocking" and text in one["text"]]


MISSING_MEDIA = {
    "block": "<disk type='block' device='cdrom'><source dev='/dev/sr9'/>%s</disk>",
    "volume": "<disk type='volume' device='cdrom'><source pool='default' volume='seed.iso'/>%s</disk>",
}


@pytest.mark.parametrize("kind", MISSING_MEDIA)
def test_a_medium_that_is_no_file(lab: Lab, vm: Vm, kind: str) -> None:
    with _device(MISSING_MEDIA[kind] % "<target dev='sdx' bus='sata'/>")(lab, vm):
        status, findings = _dry_run(lab, [])
    assert status == 0
    assert [(one["code"], one["subject"]) for one in findings if one["severity"] == "warning"] == [
        ("medium-missing", "sdx")
    ]


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


def test_what_a_define_accepts_is_not_refused(lab: Lab, vm: Vm) -> None:
    """Everything at once that libvirt defines and cannot start; it is cloned, and libvirt says so only at the start."""
    devices = "".join(
        [
            f"<interface type='hostdev'>{PCI}</interface>",
            "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>",
            MISSING_MEDIA["volume"] % "<target dev='sdx' bus='sata'/>",
            f"<disk type='network' device='cdrom'>{ISCSI}<target dev='sdy' bus='sata'/></disk>",
            "<graphics type='vnc' port='-1'><listen type='network' network='nowhere'/></graphics>",
        ]
    )
    top = (
        "<memoryBacking><hugepages/></memoryBacking><numatune><memory mode='strict' nodeset='3'/></numatune>"
        "<cputune><vcpupin vcpu='0' cpuset='700'/></cputune>"
    )
    with _device(devices)(lab, vm), _top(top)(lab, vm):
        status, _ = _dry_run(lab, [])
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "checked")
    try:
        assert (status, done.code) == (0, 0), done.err
        start = lab.run("kc-b", "virsh", "start", "checked", check=False)
        assert start.returncode != 0
    finally:
        remove(lab, "kc-b", "checked")


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
