"""plan.py as tables: facts and options in, findings, places and steps out."""

from __future__ import annotations

import ast
import itertools
import posixpath
import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cases import (
    DEFAULT,
    GIB,
    IDENTITY,
    IMAGES,
    ONE_DISK,
    OTHER_UUID,
    UUID,
    Case,
    disk_xml,
    existing,
    images,
    mark_of,
    options,
    running,
    staged,
    staged_disk,
)
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.definition.marks import Pending
from kvm_clone.errors import DomainExistsError, ExitCode, RefusedError
from kvm_clone.findings import Finding, Severity
from kvm_clone.hosts.domains import STATES
from kvm_clone.image import Image
from kvm_clone.options import Quiesce, Retry, Route, Verify
from kvm_clone.planning import checks, decide, placement, steps, storage
from kvm_clone.planning import plan as planning
from kvm_clone.planning.domain_facts import RUNNING, CpuFacts, Pool
from kvm_clone.planning.facts import Directory, FilesystemAbilities, ImageFacts, RouteFacts
from kvm_clone.planning.live_checks import chain_of
from kvm_clone.planning.plan import Plan, make_plan
from kvm_clone.planning.steps import Step


def with_device(xml: str) -> str:
    return ONE_DISK + xml


def codes(plan: Plan) -> list[str]:
    return [finding.code for finding in plan.findings]


def store(path: str, inside: str = "") -> str:
    """A <backingStore> of a file. `inside`: its format, or what is below it."""
    return f"<backingStore type='file'>{inside}<source file='{path}'/></backingStore>"


BASE = Image("/srv/b.qcow2", "qcow2")
UEFI = "<loader readonly='yes' type='pflash'>/c</loader><nvram>/v</nvram>"
VARIABLES = ImageFacts("/v", "raw", target="nvram")
ISO = disk_xml("/iso/debian.iso", "sda", "<readonly/>", device="cdrom", format_="raw")
SHARED = disk_xml("/shared/data.raw", "vdb", "<shareable/>", format_="raw")
READ_ONLY = disk_xml("/shared/base.raw", "vdb", "<readonly/>", format_="raw")
NETWORK_DISK = (
    "<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='p/i'/>"
    "<target dev='vda'/>%s</disk>"
)

NETWORK = "<interface type='network'><source network='%s'/></interface>"
BRIDGE = "<interface type='bridge'><source bridge='br0'/></interface>"

WARNINGS = {
    "snapshots",
    "disk-snapshots",
    "hostdev",
    "filesystem",
    "shmem",
    "interface-direct",
    "interface-hostdev",
    "medium-missing",
    "referenced-disk",
    "replace",
    "vcpus",
    "network-inactive",
    "owner",
    "mode",
    "file-size-later",
    "direct",
    "space-unknown",
}
INFORMATION = {"clock", "qemu-older", "estimate"}
"""The codes of findings that do not keep a plan from being run."""

APPEARS: dict[str, tuple[str, str, Case]] = {
    # what the definition says
    "firmware variables": ("nvram", "web", Case(os="<nvram>/var/lib/web_VARS.fd</nvram>")),
    "a TPM": ("tpm", "web", Case(with_device("<tpm model='tpm-crb'><backend type='emulator'/></tpm>"))),
    "persistent memory": (
        "memory",
        "web",
        Case(with_device("<memory model='nvdimm'><source><path>/p</path></source></memory>")),
    ),
    "a passed-through LUN": (
        "disk-device",
        "sdb",
        Case(with_device("<disk type='block' device='lun'><source dev='/dev/sdz'/><target dev='sdb'/></disk>")),
    ),
    "a network disk": ("disk-type", "vda", Case(NETWORK_DISK % "")),
    "a disk without a file": (
        "disk-source",
        "vdb",
        Case(with_device("<disk type='file' device='disk'><target dev='vdb'/></disk>")),
    ),
    "a foreign format": ("disk-format", "vda", Case(disk_xml(f"{IMAGES}/web.vmdk", format_="vmdk"))),
    "libvirt's encryption": (
        "disk-encryption",
        "vda",
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", "<encryption format='luks'/>")),
    ),
    "a backing store": (
        "disk-backing",
        "vda",
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", "<backingStore type='file'><source file='/b'/></backingStore>")),
    ),
    "a mirror": ("disk-mirror", "vda", Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", "<mirror type='file'/>"))),
    "a slice": (
        "disk-slices",
        "vda",
        Case(ONE_DISK.replace("web.qcow2'/>", "web.qcow2'><slices/></source>")),
    ),
    "reservations": (
        "disk-reservations",
        "vda",
        Case(ONE_DISK.replace("web.qcow2'/>", "web.qcow2'><reservations managed='yes'/></source>")),
    ),
    "a data store": (
        "disk-datastore",
        "vda",
        Case(ONE_DISK.replace("web.qcow2'/>", "web.qcow2'><dataStore/></source>")),
    ),
    "an open file": ("disk-fdgroup", "vda", Case(ONE_DISK.replace("web.qcow2'/>", "web.qcow2' fdgroup='f'/>"))),
    "a host device": (
        "hostdev",
        "web",
        Case(with_device("<hostdev type='pci'><source><address bus='0x01'/></source></hostdev>")),
    ),
    "a shared directory": ("filesystem", "web", Case(with_device("<filesystem><source dir='/srv'/></filesystem>"))),
    "shared memory": ("shmem", "web", Case(with_device("<shmem name='s'/>"))),
    "a macvtap interface": (
        "interface-direct",
        "web",
        Case(with_device("<interface type='direct'><source dev='eth0'/></interface>")),
    ),
    "a passed-through interface": ("interface-hostdev", "web", Case(with_device("<interface type='hostdev'/>"))),
    # what libvirt says of the VM
    "a crashed VM": ("source-state", "web", Case(domain={"state": "crashed"}, image={"error": "not looked at"})),
    "a saved VM": ("managed-save", "web", Case(domain={"managed_save": True})),
    "snapshots": ("snapshots", "web", Case(domain={"snapshots": ("before", "after")})),
    "variables that a VM in another format runs with": (
        "variables-format",
        "web",
        Case(**running(variables="/v"), os=UEFI, variables=replace(VARIABLES, format="qcow2"), present=("/c",)),
    ),
    "variables that the definition does not have": (
        "variables-live",
        "web",
        Case(**running(variables="/w"), os=UEFI, variables=VARIABLES, present=("/c",)),
    ),
    # what the source says of the images
    "an image in use": ("disk-in-use", "vda", Case(image={"error": "kc-a: it is locked", "in_use": True})),
    "an image that is gone": ("disk-unreadable", "vda", Case(image={"error": "No such file or directory"})),
    "a socket": ("disk-block-device", "vda", Case(image={"regular": False})),
    "a chain that the definition ends": (
        "disk-backing",
        "vda",
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", "<backingStore/>"), image={"below": BASE}),
    ),
    "a chain that is longer by the definition": (
        "disk-backing",
        "vda",
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", store(BASE.path, store("/c"))), image={"below": BASE}),
    ),
    "a chain that goes on by the image": (
        "disk-backing",
        "vda",
        Case(
            disk_xml(f"{IMAGES}/web.qcow2", "vda", store(BASE.path, "<backingStore/>")),
            image={"below": replace(BASE, below=Image("/c", "raw"))},
        ),
    ),
    "a base of another format by the definition": (
        "disk-backing",
        "vda",
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", store(BASE.path, "<format type='raw'/>")), image={"below": BASE}),
    ),
    "a base that is no file by the definition": (
        "disk-backing",
        "vda",
        Case(
            disk_xml(f"{IMAGES}/web.qcow2", "vda", store("").replace("file=''", "dev='/dev/sdx'")),
            image={"below": BASE},
        ),
    ),
    "a data file": ("disk-data-file", "vda", Case(image={"data_file": "/d.raw"})),
    "encryption within": ("disk-encrypted", "vda", Case(image={"encrypted": True})),
    "a corrupt image": ("disk-corrupt", "vda", Case(image={"corrupt": True})),
    "internal snapshots": ("disk-snapshots", "vda", Case(image={"snapshots": ("one",)})),
    # tools
    "no qemu-img at the source": ("tool-missing", "kc-a", Case(source_host={"qemu_img": None})),
    "no qemu-nbd at the source": ("tool-missing", "kc-a", Case(source_host={"qemu_nbd": None})),
    "no qemu-img at the destination": ("tool-missing", "kc-b", Case(destination_host={"qemu_img": None})),
    "no qemu-nbd at the destination": ("tool-missing", "kc-b", Case(destination_host={"qemu_nbd": None})),
    "an old qemu-img": ("tool-old", "kc-a", Case(source_host={"qemu_img": "1.0", "qemu_nbd": "7.2.22"})),
    # names at the destination
    "an existing VM": ("domain-exists", "web", Case(existing=existing())),
    "an existing VM of the new name": (
        "domain-exists",
        "copy",
        Case(existing=existing(name="copy"), options=options(new_name="copy")),
    ),
    "a taken UUID": (
        "uuid-in-use",
        "copy",
        Case(domains={"other": UUID}, options=options(new_name="copy", preserve_uuid=True)),
    ),
    "a slash in the name": ("name", "a/b", Case(options=options(new_name="a/b"))),
    "a newline in the name": ("name", "a\nb", Case(options=options(new_name="a\nb"))),
    "a carriage return in the name": ("name", "a\rb", Case(options=options(new_name="a\rb"))),
    "a name that its definition's file cannot have": ("name", "é" * 124, Case(options=options(new_name="é" * 124))),
    "a pool's path with a detour": (
        "directory-name",
        "/a/../b",
        Case(
            pools=(Pool("up", "dir", "/a/../b", active=True),),
            directories=images(path="/a/../b"),
            options=options(pool="up"),
        ),
    ),
    "a lock directory that is not ours": (
        "locks",
        "kc-b",
        Case(destination_host={"locks": "/run/kvm-clone is not ours alone"}),
    ),
    "a pool's path with a tab": (
        "directory-name",
        "/a\tb",
        Case(
            pools=(Pool("tab", "dir", "/a\tb", active=True),),
            directories=images(path="/a\tb"),
            options=options(pool="tab"),
        ),
    ),
    "a name of spaces": ("name", "  ", Case(options=options(new_name="  "))),
    "a name that is a directory": ("name", "..", Case(options=options(new_name=".."))),
    "a control character in the name": ("name", "a\x1bb", Case(options=options(new_name="a\x1bb"))),
    "a name that is no text": ("name", "a\udcff", Case(options=options(new_name="a\udcff"))),
    # what the retry flags make of the destination
    "nothing to resume": ("nothing-to-resume", "web", Case(options=options(retry=Retry.RESUME))),
    "an attempt of another host on a shared filesystem": (
        "foreign-attempt",
        "web",
        Case(staged=replace(staged(), foreign="kc-c"), options=options(retry=Retry.FORCE)),
    ),
    "an attempt whose files a VM uses": (
        "attempt-in-use",
        "web",
        Case(
            staged=replace(staged(), published=(f"{IMAGES}/kept.qcow2",), in_use=(f"{IMAGES}/kept.qcow2",)),
            options=options(retry=Retry.RESUME),
        ),
    ),
    "another VM's attempt": (
        "other-attempt",
        "web",
        Case(staged=staged(source_uuid=OTHER_UUID), options=options(retry=Retry.IDEMPOTENT)),
    ),
    "a running VM in the way": (
        "existing-running",
        "web",
        Case(existing=existing(state="running"), options=options(retry=Retry.IDEMPOTENT)),
    ),
    "a VM to replace": ("replace", "web", Case(existing=existing(), options=options(retry=Retry.FORCE))),
    "a damaged journal": ("journal-damaged", "web", Case(staged_error="its record 2 is damaged")),
    # what the destination can do
    "no such machine": ("machine", "kc-b", Case(abilities={"refusal": "unsupported machine type"})),
    "no firmware": ("firmware", "kc-b", Case(firmware=" firmware='efi'", abilities={"uefi": False})),
    "too little memory": ("memory", "kc-b", Case(abilities={"memory": 1 << 19})),
    "few CPUs": ("vcpus", "kc-b", Case(abilities={"cpus": 0})),
    "another CPU": (
        "cpu-model",
        "kc-b",
        Case(cpu="<cpu mode='custom'><model>EPYC</model></cpu>", abilities={"cpu": CpuFacts(refusal="it lacks svm")}),
    ),
    "no network": ("network-missing", "lan", Case(with_device(NETWORK % "lan"))),
    "an inactive network": (
        "network-inactive",
        "lan",
        Case(with_device(NETWORK % "lan"), abilities={"networks": {"lan": False}}),
    ),
    "no bridge": ("bridge-missing", "br0", Case(with_device(BRIDGE))),
    "a slow clock": ("clock", "kc-b", Case(destination_host={"clock": -3600.0})),
    "an older QEMU": ("qemu-older", "kc-b", Case(destination_host={"qemu_img": "6.2"})),
    "a measured route": ("estimate", "kc-b", Case(route=RouteFacts(True, "measured", 1e6))),
    "no room": (
        "space",
        IMAGES,
        Case(image={"data": 100}, directories=(Directory(IMAGES, True, True, free=114),)),
    ),
    "perhaps no room for a device": (
        "space-unknown",
        IMAGES,
        Case(
            disk_xml(f"{IMAGES}/web.raw", format_="raw"),
            image={"data": 100, "device": True},
            directories=(Directory(IMAGES, True, True, free=114),),
        ),
    ),
    "no room for files": (
        "inodes",
        IMAGES,
        Case(directories=(Directory(IMAGES, True, True, free=GIB, inodes=1),)),
    ),
    "no hard links, and no such rename": (
        "no-links",
        IMAGES,
        Case(directories=(replace(images()[0], abilities=FilesystemAbilities(naming="")),)),
    ),
    "no file can be made": (
        "storage",
        IMAGES,
        Case(directories=(replace(images()[0], abilities=FilesystemAbilities(trouble="No space left on device")),)),
    ),
    "no owners": (
        "owner",
        IMAGES,
        Case(directories=(replace(images()[0], abilities=FilesystemAbilities(owners=False)),)),
    ),
    "no modes": ("mode", IMAGES, Case(directories=(replace(images()[0], abilities=FilesystemAbilities(modes=False)),))),
    "a file that is too large": (
        "file-size",
        "vda",
        Case(image={"data": 100}, directories=(replace(images()[0], abilities=FilesystemAbilities(largest=99)),)),
    ),
    "a file that may be too large": (
        "file-size-later",
        "vda",
        Case(image={"data": 9}, directories=(replace(images()[0], abilities=FilesystemAbilities(largest=99)),)),
    ),
    "no O_DIRECT": (
        "direct",
        "vda",
        Case(
            ONE_DISK.replace("'qcow2'/>", "'qcow2' cache='none'/>"),
            directories=(replace(images()[0], abilities=FilesystemAbilities(direct=False)),),
        ),
    ),
    # files at the destination
    "no kernel": ("boot-file-missing", "/boot/vmlinuz", Case(os="<kernel>/boot/vmlinuz</kernel>")),
    "no loader": ("boot-file-missing", "/usr/share/bios.bin", Case(os="<loader>/usr/share/bios.bin</loader>")),
    "no medium": ("medium-missing", "sda", Case(with_device(ISO))),
    "no shared disk": ("referenced-disk-missing", "vdb", Case(with_device(SHARED))),
    "no read-only disk": ("referenced-disk-missing", "vdb", Case(with_device(READ_ONLY))),
    "a shared disk": ("referenced-disk", "vdb", Case(with_device(SHARED), present=("/shared/data.raw",))),
    "a read-only disk": ("referenced-disk", "vdb", Case(with_device(READ_ONLY), present=("/shared/base.raw",))),
    "a shared network disk": (
        "referenced-disk",
        "vdb",
        Case(with_device((NETWORK_DISK % "<shareable/>").replace("vda", "vdb"))),
    ),
    # where the disks go
    "no default pool": ("pool-missing", "default", Case(pools=(), directories=())),
    "no pool of that name": ("pool-missing", "fast", Case(options=options(pool="fast"))),
    "an inactive default pool": (
        "pool-inactive",
        "default",
        Case(pools=(replace(DEFAULT, active=False),), directories=()),
    ),
    "an inactive pool": (
        "pool-inactive",
        "fast",
        Case(pools=(DEFAULT, Pool("fast", "dir", "/fast", active=False)), options=options(pool="fast")),
    ),
    "a volume group": (
        "pool-type",
        "vg",
        Case(pools=(DEFAULT, Pool("vg", "logical", "/dev/vg", active=True)), options=options(pool="vg")),
    ),
    "a pool without its directory": ("directory-missing", IMAGES, Case(directories=())),
    "a pool whose directory is gone": (
        "directory-missing",
        IMAGES,
        Case(directories=(Directory(IMAGES, exists=False, writable=False, free=0),)),
    ),
    "a read-only directory": ("not-writable", IMAGES, Case(directories=images(writable=False))),
    "a read-only pool": (
        "not-writable",
        "/fast",
        Case(
            pools=(DEFAULT, Pool("fast", "dir", "/fast", active=True)),
            directories=(*images(), *images(path="/fast", writable=False)),
            options=options(pool="fast"),
        ),
    ),
    "no direct route": (
        "route",
        "kc-b",
        Case(route=RouteFacts(False, "No route to host"), options=options(route=Route.DIRECT)),
    ),
}

DOES_NOT_APPEAR: dict[str, tuple[tuple[str, ...], Case]] = {
    "a backing file that the definition does not name": (("disk-backing",), Case(image={"below": BASE})),
    "a chain that the definition begins": (
        ("disk-backing",),
        Case(
            disk_xml(f"{IMAGES}/web.qcow2", "vda", store("/srv/./b.qcow2", "<format type='qcow2'/>")),
            image={"below": replace(BASE, below=Image("/c", "raw"))},
        ),
    ),
    "a chain that the definition names to its end": (
        ("disk-backing",),
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", store(BASE.path, "<backingStore/>")), image={"below": BASE}),
    ),
    "a plain VM": (("source-state", "managed-save", "snapshots", "tool-missing", "name"), Case()),
    "a raw disk": (("disk-format",), Case(disk_xml(f"{IMAGES}/web.img", format_="raw"))),
    "an explicit end of the chain": (
        ("disk-backing",),
        Case(disk_xml(f"{IMAGES}/web.qcow2", "vda", "<backingStore/>")),
    ),
    "a loader that keeps nothing": (
        ("nvram", "boot-file-missing"),
        Case(os="<loader type='rom'>/usr/share/bios.bin</loader>", present=("/usr/share/bios.bin",)),
    ),
    "memory without a file": (("memory",), Case(with_device("<memory model='dimm'/>"))),
    "an interface on a network": (
        ("interface-direct", "interface-hostdev"),
        Case(with_device("<interface type='network'><source network='default'/></interface>")),
    ),
    "other VMs": (("domain-exists",), Case(domains={"web2": OTHER_UUID, "WEB": UUID})),
    "a new name beside the old": (
        ("domain-exists", "uuid-in-use"),
        Case(domains={"web": UUID}, options=options(new_name="copy")),
    ),
    "a UUID that is kept and free": (
        ("uuid-in-use",),
        Case(domains={"other": OTHER_UUID}, options=options(preserve_uuid=True)),
    ),
    "an awkward name": (("name",), Case(options=options(new_name='-o\'neil "two" …'))),
    "the longest name": (("name",), Case(options=options(new_name="é" * 123 + "e"))),
    "a kernel that is there": (
        ("boot-file-missing",),
        Case(os="<kernel>/boot/vmlinuz</kernel>", present=("/boot/vmlinuz",)),
    ),
    "a medium that is there": (("medium-missing",), Case(with_device(ISO), present=("/iso/debian.iso",))),
    "an empty drive": (
        ("medium-missing",),
        Case(with_device("<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>")),
    ),
    "no pool but the same directory": (("pool-missing",), Case(pools=())),
    "an inactive pool at the same directory": (("pool-inactive",), Case(pools=(replace(DEFAULT, active=False),))),
    "a pool that is not asked for": (
        ("pool-type", "pool-inactive", "not-writable"),
        Case(
            pools=(DEFAULT, Pool("vg", "logical", "/dev/vg", active=False)),
            directories=(*images(), *images(path="/dev/vg", writable=False)),
        ),
    ),
    "a mounted pool": (
        ("pool-type",),
        Case(
            pools=(Pool("nfs", "netfs", "/nfs", active=True),),
            directories=images(path="/nfs"),
            options=options(pool="nfs"),
        ),
    ),
    "a direct route": (("route",), Case(options=options(route=Route.DIRECT))),
    "no direct route, none asked for": (("route",), Case(route=RouteFacts(False, "No route to host"))),
    "a VM without disks": (("pool-missing",), Case("", pools=(), directories=())),
}


@pytest.mark.parametrize("what", APPEARS)
def test_a_finding_appears(what: str) -> None:
    code, subject, case = APPEARS[what]
    plan = case.plan()
    severity = Severity.WARNING if code in WARNINGS else Severity.BLOCKING
    severity = Severity.INFO if code in INFORMATION else severity
    assert [(one.code, one.subject, one.severity) for one in plan.findings] == [(code, subject, severity)]
    assert plan.findings[0].text.endswith((".", plan.route_reason))
    assert plan.blocking == (plan.findings if severity is Severity.BLOCKING else ())
    assert (plan.refusal() is None) == (severity is not Severity.BLOCKING)


IRREPLACEABLE = [
    ("existing-transient", Case(existing=existing(persistent=False), options=options(retry=Retry.FORCE))),
    ("existing-uuid", Case(existing=existing(), options=options(retry=Retry.FORCE, preserve_uuid=True))),
]


@pytest.mark.parametrize(("code", "case"), IRREPLACEABLE)
def test_a_vm_that_cannot_be_replaced(code: str, case: Case) -> None:
    plan = case.plan()
    assert codes(plan) == [code, "replace"]
    assert [one.code for one in plan.blocking] == [code]
    assert plan.steps == ()


@pytest.mark.parametrize("what", DOES_NOT_APPEAR)
def test_a_finding_does_not_appear(what: str) -> None:
    wrong, case = DOES_NOT_APPEAR[what]
    plan = case.plan()
    assert set(wrong) <= {code for code, _, _ in APPEARS.values()}, "a code that nothing has cannot appear"
    assert plan.findings == ()
    assert plan.refusal() is None


def test_every_code_of_the_plan_is_in_the_table() -> None:
    written: set[object] = set()
    for module in (planning, checks, decide, placement, storage):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("block", "_stop", "Finding") and isinstance(node.args[0], ast.Constant):
                    written.add(node.args[0].value)
            elif isinstance(node, ast.Tuple) and len(node.elts) == 4 and isinstance(node.elts[0], ast.Constant):
                written.add(node.elts[0].value)
    assert len(written) > 20
    assert written <= {code for code, _, _ in APPEARS.values()} | {code for code, _ in IRREPLACEABLE}


@pytest.mark.parametrize("state", sorted({*STATES.values()} - {"shut off", *RUNNING}))
def test_only_a_vm_that_runs_or_is_shut_off_is_cloned(state: str) -> None:
    plan = Case(domain={"state": state}).plan()
    assert codes(plan) == ["source-state"]
    assert state in plan.findings[0].text


@pytest.mark.parametrize("state", RUNNING)
def test_a_vm_that_runs_is_cloned(state: str) -> None:
    plan = Case(**{**running(), "domain": {"state": state}}).plan()
    assert plan.findings == ()
    assert plan.backup is not None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (APPEARS["an image in use"][2], ["vda", f"{IMAGES}/web.qcow2"]),
        (APPEARS["an image that is gone"][2], ["No such file or directory", f"{IMAGES}/web.qcow2"]),
        (APPEARS["a chain that the definition ends"][2], [BASE.path, "nothing"]),
        (APPEARS["no kernel"][2], ["kc-b", "/boot/vmlinuz", "kernel"]),
        (APPEARS["no medium"][2], ["kc-b", "/iso/debian.iso"]),
        (APPEARS["a taken UUID"][2], ["other", UUID, "kc-b"]),
        (APPEARS["no pool of that name"][2], ["fast", "kc-b"]),
        (APPEARS["a volume group"][2], ["vg", "logical"]),
        (APPEARS["no direct route"][2], ["No route to host"]),
    ],
)
def test_a_finding_says_what_it_is_about(case: Case, words: list[str]) -> None:
    (finding,) = case.plan().findings
    assert [word for word in words if word not in finding.text] == []


LEFT_BEHIND: dict[str, tuple[Case, list[str], str]] = {
    "snapshots": (Case(domain={"snapshots": ("before", "after")}), ["snapshots"], "before, after"),
    "internal snapshots": (Case(image={"snapshots": ("one",)}), ["disk-snapshots"], "(one)"),
    "internal snapshots that libvirt knows": (
        Case(domain={"snapshots": ("one",)}, image={"snapshots": ("one",)}),
        ["snapshots"],
        "one",
    ),
    "internal snapshots of which libvirt knows some": (
        Case(domain={"snapshots": ("one",)}, image={"snapshots": ("one", "two")}),
        ["snapshots", "disk-snapshots"],
        "(two)",
    ),
    "a managed save": (
        Case(domain={"managed_save": True}, options=options(without_saved_state=True)),
        ["managed-save"],
        "crash-consistent",
    ),
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_what_is_not_copied_is_said_and_no_reason_to_refuse(what: str) -> None:
    case, expected, words = LEFT_BEHIND[what]
    plan = case.plan()
    assert [finding.code for finding in plan.findings] == expected
    assert {finding.severity for finding in plan.findings} == {Severity.WARNING}
    assert words in plan.findings[-1].text
    assert plan.refusal() is None


AT_AN_OLD_LIBVIRT = running()
AT_AN_OLD_LIBVIRT["source"]["libvirt"] = 6_000_000


@pytest.mark.parametrize(
    ("case", "remedy"),
    [
        (Case(**AT_AN_OLD_LIBVIRT), "virsh shutdown web"),
        (APPEARS["a saved VM"][2], "--without-saved-state"),
        (APPEARS["an existing VM"][2], "--new-name"),
        (APPEARS["a taken UUID"][2], "--preserve-uuid"),
        (APPEARS["no pool of that name"][2], "default"),
        (APPEARS["no default pool"][2], "it has none"),
        (APPEARS["an inactive pool"][2], "virsh pool-start fast"),
        (APPEARS["no direct route"][2], "--route relay"),
        (APPEARS["no qemu-nbd at the destination"][2], "install qemu-utils"),
    ],
)
def test_a_remedy_says_what_to_do(case: Case, remedy: str) -> None:
    refusal = case.plan().refusal()
    assert refusal is not None
    assert remedy in refusal.remedy


def test_every_finding_is_reported_at_once() -> None:
    case = Case(
        devices=ONE_DISK + disk_xml("/data/log.raw", "vdb", format_="raw") + ISO + SHARED + "<tpm model='tpm-crb'/>",
        os="<kernel>/boot/vmlinuz</kernel>",
        domain={"managed_save": True, "snapshots": ("s",)},
        image={"corrupt": True, "below": BASE, "snapshots": ("i",)},
        source_host={"qemu_img": None, "qemu_nbd": None},
        destination_host={"qemu_nbd": None},
        domains={"other": UUID},
        existing=existing(),
        route=RouteFacts(False, "No route to host"),
        options=options(pool="fast", preserve_uuid=True, route=Route.DIRECT),
    )
    plan = case.plan()
    of_each_image = ["disk-corrupt", "disk-snapshots"]
    assert codes(plan) == [
        "domain-exists",
        "managed-save",
        "snapshots",
        "tpm",
        *of_each_image,
        *of_each_image,
        "tool-missing",
        "tool-missing",
        "uuid-in-use",
        "tool-missing",
        "boot-file-missing",
        "medium-missing",
        "referenced-disk-missing",
        "pool-missing",
        "route",
    ]
    refusal = plan.refusal()
    assert isinstance(refusal, RefusedError)
    assert refusal.findings == plan.blocking
    assert [finding for finding in plan.blocking if finding.text.rstrip(".") not in str(refusal)] == []
    assert "medium-missing" not in {finding.code for finding in refusal.findings}


def test_two_disks_that_share_a_file_are_both_named() -> None:
    plan = Case(ONE_DISK + disk_xml(f"{IMAGES}/web.qcow2", "vdb")).plan()
    assert [(one.code, one.subject) for one in plan.findings] == [("disk-duplicate", "vda"), ("disk-duplicate", "vdb")]


def test_nothing_is_said_of_an_image_whose_disk_is_refused() -> None:
    assert codes(Case(NETWORK_DISK % "", image={"error": "not looked at"}).plan()) == ["disk-type"]


def test_the_same_pool_is_complained_of_once() -> None:
    devices = ONE_DISK + disk_xml(f"{IMAGES}/log.qcow2", "vdb")
    assert codes(Case(devices, pools=(), directories=()).plan()) == ["pool-missing"]


EXISTS = Case(existing=existing())


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (EXISTS, ExitCode.EXISTS),
        (replace(EXISTS, devices=with_device(ISO)), ExitCode.EXISTS),  # a warning beside it
        (replace(EXISTS, domain={"managed_save": True}), ExitCode.REFUSED),
        (replace(EXISTS, domains={"x": UUID}, options=options(preserve_uuid=True)), ExitCode.REFUSED),
        (Case(existing=existing(uuid=UUID), options=options(preserve_uuid=True)), ExitCode.EXISTS),
        (replace(EXISTS, destination_host={"qemu_img": None}), ExitCode.REFUSED),
        (replace(EXISTS, pools=(), directories=()), ExitCode.REFUSED),
        (Case(pools=(), directories=()), ExitCode.REFUSED),
        (Case(image={"corrupt": True}), ExitCode.REFUSED),
    ],
)
def test_exit_code_of_a_refusal(case: Case, code: ExitCode) -> None:
    refusal = case.plan().refusal()
    assert isinstance(refusal, DomainExistsError if code is ExitCode.EXISTS else RefusedError)
    assert refusal.exit_code is code
    assert refusal.subject == "web"


def test_the_same_remedy_is_given_once() -> None:
    refusal = Case(destination_host={"qemu_img": None, "qemu_nbd": None}).plan().refusal()
    assert refusal is not None
    assert len(refusal.findings) == 2
    assert refusal.remedy.count("install qemu-utils") == 1


FAST = Pool("fast", "dir", "/fast", active=True)
POOLS = (DEFAULT, FAST)
BOTH = (*images(), *images(path="/fast"))
SAME = images(path="/data")


def finals(plan: Plan) -> list[str]:
    assert plan.refusal() is None
    return [disk.final for disk in plan.disks]


@pytest.mark.parametrize(
    ("source", "case", "final"),
    [
        ("/data/web.qcow2", Case(directories=(*BOTH, *SAME)), "/data/web.qcow2"),
        ("/data/sub/..//web.qcow2", Case(directories=(*BOTH, *SAME)), "/data/web.qcow2"),
        ("/data/web.qcow2", Case(directories=BOTH), f"{IMAGES}/web.qcow2"),
        (
            "/data/web.qcow2",
            Case(directories=(*BOTH, Directory("/data", exists=False, writable=False, free=0))),
            f"{IMAGES}/web.qcow2",
        ),
        ("/data/web.qcow2", Case(directories=(*BOTH, *SAME), options=options(pool="fast")), "/fast/web.qcow2"),
        ("/data/web.qcow2", Case(directories=(*BOTH, *SAME), options=options(pool="default")), f"{IMAGES}/web.qcow2"),
        ("/data/sub/web.qcow2", Case(directories=(*BOTH, *SAME)), f"{IMAGES}/web.qcow2"),
        ("/fast/web.qcow2", Case(directories=BOTH), "/fast/web.qcow2"),
    ],
)
def test_directory(source: str, case: Case, final: str) -> None:
    assert finals(replace(case, devices=disk_xml(source), pools=POOLS).plan()) == [final]


def test_the_same_directory_is_not_passed_over_because_it_cannot_be_written() -> None:
    case = Case(disk_xml("/data/web.qcow2"), pools=POOLS, directories=(*BOTH, *images(path="/data", writable=False)))
    assert [(one.code, one.subject) for one in case.plan().findings] == [("not-writable", "/data")]


@pytest.mark.parametrize(
    ("file", "new_name", "taken", "final"),
    [
        ("web.qcow2", None, (), "web.qcow2"),
        ("web.qcow2", None, ("other.qcow2", "web.raw", "web"), "web.qcow2"),
        ("web.qcow2", None, ("web.qcow2",), "web-vda.qcow2"),
        ("web.qcow2", None, ("web.qcow2", "web-vda.qcow2"), "web-vda-1.qcow2"),
        ("web.qcow2", None, ("web.qcow2", "web-vda.qcow2", "web-vda-1.qcow2"), "web-vda-2.qcow2"),
        ("web.qcow2", "web", ("web.qcow2",), "web-vda.qcow2"),
        ("web.qcow2", "copy", (), "copy.qcow2"),
        ("web.qcow2", "copy", ("copy.qcow2",), "copy-vda.qcow2"),
        ("web-data.qcow2", "copy", (), "copy-data.qcow2"),
        ("web2.qcow2", "copy", (), "copy2.qcow2"),
        ("my-web.qcow2", "copy", (), "my-web.qcow2"),
        ("disk.qcow2", "copy", ("disk.qcow2",), "disk-vda.qcow2"),
        ("web.web.img", "copy", (), "copy.web.img"),
        ("web", "copy", (), "copy"),
        ("web", None, ("web",), "web-vda"),
        (".web", "copy", (".web",), ".web-vda"),
        ("web.tar.gz", None, ("web.tar.gz",), "web.tar-vda.gz"),
        ("web.qcow2", 'o\'neil "two" & co', (), 'o\'neil "two" & co.qcow2'),
        ("web.qcow2", "-rf", (), "-rf.qcow2"),
        ("-web disk's.qcow2", None, ("-web disk's.qcow2",), "-web disk's-vda.qcow2"),
        ("a & b.qcow2", "copy", (), "a & b.qcow2"),
        ("web.qcow2", "größe", (), "größe.qcow2"),
        ("web" + "y" * 246 + ".img", "x" * 9, (), "x" * 9 + "y" * 242 + ".img"),
        ("web.qcow2", "a\tb", (), "a_b.qcow2"),
        ("web.qcow2", "a\tb", ("a_b.qcow2",), "a_b-vda.qcow2"),
        ("web" + "y" * 30 + ".img", "ö" * 123, (), "ö" * 123 + "y" * 5 + ".img"),
        ("x" * 250 + ".img", None, (), "x" * 250 + ".img"),
        ("x" * 251 + ".img", None, ("x" * 251 + ".img",), "x" * 247 + "-vda.img"),
    ],
)
def test_file_name(file: str, new_name: str | None, taken: tuple[str, ...], final: str) -> None:
    case = Case(disk_xml(f"{IMAGES}/{file}"), directories=images(*taken), options=options(new_name=new_name))
    assert finals(case.plan()) == [f"{IMAGES}/{final}"]


@pytest.mark.parametrize(
    ("sources", "taken", "expected"),
    [
        (["/a/disk.raw", "/b/disk.raw"], (), ["disk.raw", "disk-vdb.raw"]),
        (["/a/disk.raw", "/b/disk.raw", "/c/disk.raw"], (), ["disk.raw", "disk-vdb.raw", "disk-vdc.raw"]),
        (["/a/disk.raw", "/b/disk.raw"], ("disk.raw",), ["disk-vda.raw", "disk-vdb.raw"]),
        (["/a/disk.raw", "/b/disk.raw"], ("disk-vdb.raw",), ["disk.raw", "disk-vdb-1.raw"]),
        (["/a/disk-vdb.raw", "/b/disk.raw"], ("disk.raw",), ["disk-vdb.raw", "disk-vdb-1.raw"]),
        (["/a/disk.raw", "/b/disk.qcow2"], (), ["disk.raw", "disk.qcow2"]),
    ],
)
def test_disks_of_one_vm_do_not_collide(sources: list[str], taken: tuple[str, ...], expected: list[str]) -> None:
    devices = "".join(disk_xml(path, f"vd{letter}") for path, letter in zip(sources, "abc", strict=False))
    plan = Case(devices, directories=images(*taken)).plan()
    assert [(disk.target, disk.final) for disk in plan.disks] == [
        (f"vd{letter}", f"{IMAGES}/{name}") for letter, name in zip("abc", expected, strict=False)
    ]


def test_the_same_name_in_two_directories_is_no_collision() -> None:
    devices = disk_xml("/a/disk.raw") + disk_xml("/b/disk.raw", "vdb")
    plan = Case(devices, directories=(*images(path="/a"), *images(path="/b"))).plan()
    assert finals(plan) == ["/a/disk.raw", "/b/disk.raw"]


@pytest.mark.parametrize(
    ("wanted", "facts", "taken"),
    [
        (Route.AUTO, RouteFacts(True, "kc-a can connect to kc-b"), Route.DIRECT),
        (Route.AUTO, RouteFacts(False, "kc-a cannot connect to kc-b: No route to host"), Route.RELAY),
        (Route.DIRECT, RouteFacts(True, "kc-a can connect to kc-b"), Route.DIRECT),
        (Route.RELAY, RouteFacts(False, "asked for"), Route.RELAY),
        (Route.RELAY, RouteFacts(True, "kc-a can connect to kc-b"), Route.RELAY),
    ],
)
def test_route(wanted: Route, facts: RouteFacts, taken: Route) -> None:
    plan = Case(route=facts, options=options(route=wanted)).plan()
    assert (plan.route, plan.route_reason) == (taken, facts.reason)
    assert plan.refusal() is None


@pytest.mark.parametrize("verify", [Verify.FULL, Verify.OFF])
def test_steps_in_order(verify: Verify) -> None:
    devices = disk_xml("/b/web.qcow2") + disk_xml("/a/log.raw", "vdb", format_="raw")
    plan = Case(devices, directories=(*images(path="/a"), *images(path="/b")), options=options(verify=verify)).plan()
    one, two = plan.disks
    assert plan.steps == (
        steps.BeginStage("/b", resume=False),
        steps.CreateDisk(one),
        steps.CreateDisk(two),
        steps.CopyDisks((one, two)),
        *((steps.ProveDisks((one, two), verify),) if verify is not Verify.OFF else ()),
        steps.CheckSource((one, two)),
        steps.PublishDisk(one),
        steps.PublishDisk(two),
        steps.DefineDomain((), ()),
        steps.SealReplica(),
        steps.EndStage(("/a", "/b")),
    )


KEPT = staged_disk()


def steps_of(retry: Retry, existing_vm: bool = False, attempt: bool = False, **changes: object) -> tuple[Step, ...]:
    case = Case(options=options(retry=retry))
    if existing_vm:
        case = replace(case, existing=existing())
    if attempt:
        case = replace(case, staged=staged(disks={"vda": KEPT}))
    plan = replace(case, **changes).plan()  # type: ignore[arg-type]
    assert plan.refusal() is None
    return plan.steps


OLD, BESIDE = (f"{IMAGES}/old.qcow2",), ("monday", "backup-1")
FILLING = [steps.CreateDisk, steps.CopyDisks, steps.ProveDisks, steps.CheckSource, steps.PublishDisk]
END = [steps.SealReplica, steps.EndStage]
COMMIT = [steps.DefineDomain, *END]
REPLACE = [steps.DefineDomain, steps.RemoveReplaced, *END]
AGAIN = staged(defining=True, directory="/elsewhere", disks={"vda": KEPT})


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        (steps_of(Retry.NONE), [steps.BeginStage, *FILLING, *COMMIT]),
        (steps_of(Retry.IDEMPOTENT, existing_vm=True), [steps.BeginStage, *FILLING, *REPLACE]),
        (steps_of(Retry.FORCE, existing_vm=True), [steps.BeginStage, *FILLING, *REPLACE]),
        (
            steps_of(Retry.FORCE, existing=existing(state="running")),
            [steps.BeginStage, *FILLING, steps.StopDomain, *REPLACE],
        ),
        (
            steps_of(Retry.CLEANUP_EXISTING, existing_vm=True),
            [steps.BeginStage, steps.RemoveExisting, *FILLING, *COMMIT],
        ),
        (
            steps_of(Retry.CLEANUP_EXISTING, existing=existing(state="running")),
            [steps.BeginStage, steps.RemoveExisting, *FILLING, *COMMIT],
        ),
        (steps_of(Retry.RESUME, attempt=True), [steps.BeginStage, *FILLING, *COMMIT]),
        (steps_of(Retry.IDEMPOTENT, existing_vm=True, attempt=True), [steps.BeginStage, *FILLING, *REPLACE]),
        (steps_of(Retry.FORCE, attempt=True), [steps.BeginStage, *FILLING, *COMMIT]),
        (steps_of(Retry.RESUME, staged=AGAIN), [steps.SettleStage, steps.BeginStage, *FILLING, *COMMIT]),
        (
            steps_of(Retry.FORCE, staged=AGAIN),
            [steps.SettleStage, steps.DiscardStage, steps.BeginStage, *FILLING, *COMMIT],
        ),
    ],
)
def test_steps_of_each_decision(taken: tuple[Step, ...], expected: list[type[Step]]) -> None:
    assert [type(step) for step in taken] == expected


def test_replacing_removes_the_old_disks_after_the_commit_and_no_others() -> None:
    old = existing()
    old = replace(old, domain=replace(old.domain, snapshots=BESIDE[:1], checkpoints=BESIDE[1:]))
    taken = steps_of(Retry.FORCE, existing=old)
    assert taken[-4:] == (
        steps.DefineDomain(OLD, BESIDE),
        steps.RemoveReplaced(OLD, BESIDE),
        steps.SealReplica(),
        steps.EndStage((IMAGES,)),
    )
    taken = steps_of(Retry.CLEANUP_EXISTING, existing_vm=True)
    assert taken[:2] == (steps.BeginStage(IMAGES, resume=False, marks=(IMAGES,)), steps.RemoveExisting(OLD))
    assert taken[-3] == steps.DefineDomain((), ())


def test_resuming_goes_on_where_the_attempt_lies() -> None:
    elsewhere = staged(directory="/elsewhere", disks={"vda": staged_disk(directory="/elsewhere")})
    plan = Case(staged=elsewhere, options=options(retry=Retry.RESUME)).plan()
    assert plan.identity.operation == "earlier"
    assert [(disk.final, disk.staged) for disk in plan.disks] == [
        ("/elsewhere/kept-vda.qcow2", elsewhere.disks["vda"]),
    ]
    assert plan.steps[0] == steps.BeginStage("/elsewhere", resume=True)
    assert plan.steps[-1] == steps.EndStage(("/elsewhere",))


@pytest.mark.parametrize(
    "changes",
    [{"size": GIB - 512}, {"format": "raw"}, {"durable": 0, "allocated": 0}],
    ids=["another size", "another format", "nothing durable"],
)
def test_a_staged_disk_that_is_of_no_use_is_made_anew_under_its_name(changes: dict[str, object]) -> None:
    kept = replace(KEPT, **changes)  # type: ignore[arg-type]
    plan = Case(staged=staged(disks={"vda": kept}), options=options(retry=Retry.RESUME)).plan()
    assert [(disk.final, disk.staged) for disk in plan.disks] == [(kept.final, None)]


def test_a_new_disk_of_the_source_joins_an_attempt() -> None:
    devices = with_device(disk_xml(f"{IMAGES}/log.qcow2", "vdb"))
    plan = Case(devices, staged=staged(disks={"vda": KEPT}), options=options(retry=Retry.RESUME)).plan()
    assert [(disk.target, disk.final, disk.staged) for disk in plan.disks] == [
        ("vda", KEPT.final, KEPT),
        ("vdb", f"{IMAGES}/log.qcow2", None),
    ]


@pytest.mark.parametrize("retry", Retry)
def test_a_commit_that_was_reached_is_only_finished(retry: Retry) -> None:
    made = existing(mark=mark_of(Case().facts()), pending=Pending("earlier", ("/old",), ("monday",)))
    attempt = staged(defining=True, remove=("/forged",), forget=("forged",))
    plan = Case(existing=made, staged=attempt, options=options(retry=retry)).plan()
    assert plan.refusal() is None
    assert plan.uuid == made.domain.uuid
    assert plan.steps == (
        steps.SettleStage(IMAGES, "earlier", committed=True),
        steps.TakeUpCommitted(IMAGES, "earlier"),
        steps.MergeDisks(),
        steps.RemoveReplaced(("/old",), ("monday",)),
        steps.SealReplica(),
        steps.EndStage(()),
    )


@pytest.mark.parametrize("pending", [None, Pending("another", ("/old",), ("monday",))])
def test_only_what_the_definition_says_is_removed_when_finishing(pending: Pending | None) -> None:
    made = existing(mark=mark_of(Case().facts()), pending=pending)
    plan = Case(existing=made, staged=staged(defining=True, remove=("/old",), forget=("monday",))).plan()
    assert steps.RemoveReplaced((), ()) in plan.steps


@pytest.mark.parametrize("verify", [True, False])
def test_steps_when_there_is_nothing_to_do(verify: bool) -> None:
    made = existing(mark=mark_of(Case().facts()))
    plan = Case(existing=made, options=options(retry=Retry.IDEMPOTENT, verify_existing=verify)).plan()
    assert plan.findings == ()
    assert plan.uuid == made.domain.uuid
    assert plan.steps == ((steps.VerifyExisting(plan.disks),) if verify else ())


@pytest.mark.parametrize(
    ("case", "uuid"),
    [
        (Case(), IDENTITY.uuid),
        (Case(options=options(preserve_uuid=True)), UUID),
        (Case(existing=existing(uuid="old"), options=options(retry=Retry.FORCE)), "old"),
        (Case(existing=existing(uuid="old"), options=options(retry=Retry.CLEANUP_EXISTING)), IDENTITY.uuid),
        (Case(staged=staged(), options=options(retry=Retry.RESUME)), IDENTITY.uuid),
    ],
)
def test_uuid(case: Case, uuid: str) -> None:
    assert case.plan().uuid == uuid


VOLUMES = Pool("a-vg", "logical", "/dev/a-vg", active=True)


@pytest.mark.parametrize(
    ("case", "directory"),
    [
        (Case(), IMAGES),
        (Case(pools=(FAST, VOLUMES, DEFAULT), directories=BOTH), IMAGES),
        (Case(pools=POOLS, directories=BOTH, options=options(pool="fast")), "/fast"),
        (Case(pools=(VOLUMES,)), "/var/tmp"),
        (Case(pools=(replace(DEFAULT, active=False),)), "/var/tmp"),
        (Case(directories=images(writable=False)), "/var/tmp"),
        (Case(pools=(), directories=()), "/var/tmp"),
    ],
)
def test_steps_of_a_vm_without_disks(case: Case, directory: str) -> None:
    plan = replace(case, devices="").plan()
    assert plan.refusal() is None
    assert plan.steps == (
        steps.BeginStage(directory, resume=False),
        steps.CheckSource(()),
        steps.DefineDomain((), ()),
        steps.SealReplica(),
        steps.EndStage(()),
    )


@pytest.mark.parametrize(("new_name", "name"), [(None, "web"), ("copy", "copy")])
def test_name(new_name: str | None, name: str) -> None:
    assert Case(options=options(new_name=new_name)).plan().name == name


def test_the_same_facts_make_the_same_plan() -> None:
    case = Case(with_device(ISO), options=options(new_name="copy"))
    assert case.plan() == case.plan()


def test_an_information_does_not_block() -> None:
    plan = replace(Case().plan(), findings=(Finding("x", Severity.INFO, "web", "Worth knowing."),))
    assert plan.blocking == ()
    assert plan.refusal() is None


# Few stems and endings, so that names collide, and their like in the directory.
STEMS = st.sampled_from(["web", "disk", "disk-vda", "disk-vda-1", "copy", ".web", "a b", "x" * 255])
FILES = st.builds(lambda stem, ending: (stem + ending)[:255], STEMS, st.sampled_from(["", ".raw", ".qcow2", ".tar.gz"]))
TAKEN = st.frozensets(
    FILES | st.builds(lambda ending, file: posixpath.splitext(file)[0] + ending, st.sampled_from(
        ["-vda.raw", "-vdb.raw", "-vda-1.raw", "-vda-2.raw", "-vdb-1", "-vda"]
    ), FILES),
    max_size=12,
)  # fmt: skip
DIRECTORIES = st.sampled_from([IMAGES, "/data", "/elsewhere"])


@given(
    paths=st.lists(st.builds(posixpath.join, DIRECTORIES, FILES), unique=True, max_size=6),
    names=st.fixed_dictionaries({IMAGES: TAKEN, "/data": TAKEN}),
    new_name=st.none() | st.sampled_from(["web", "copy", "disk", "-x", "y" * 254]) | st.text(min_size=1),
    pool=st.sampled_from([None, "default"]),
)
def test_final_paths_are_unique_and_free(
    paths: list[str], names: dict[str, frozenset[str]], new_name: str | None, pool: str | None
) -> None:
    devices = "".join(disk_xml(path, f"vd{letter}") for path, letter in zip(paths, "abcdef", strict=False))
    directories = tuple(Directory(path, True, True, 1 << 40, present) for path, present in names.items())
    plan = Case(devices, directories=directories, options=options(new_name=new_name, pool=pool)).plan()
    final = [disk.final for disk in plan.disks]
    assert len(final) == len(set(final)) == len(paths)
    if plan.refusal() is not None:
        assert codes(plan) == ["name"]
        return
    for path in final:
        directory, file = posixpath.split(path)
        assert file not in names[directory]
        assert file not in ("", ".", "..")
        assert len(file.encode()) <= 255


@pytest.mark.parametrize("verify", [Verify.FULL, Verify.OFF])
def test_steps_of_the_clone_of_a_vm_that_runs(verify: Verify) -> None:
    """The backup job begins once there is somewhere to copy to, and has ended before anything is committed."""
    plan = Case(**running(), options=options(verify=verify, track=True)).plan()
    (disk,) = plan.disks
    assert plan.backup is not None
    assert plan.backup.checkpoint
    assert plan.steps == (
        steps.BeginStage(IMAGES, resume=False),
        steps.CreateDisk(disk),
        steps.BeginBackup(plan.backup, Quiesce.AUTO, ()),
        steps.CopyDisks((disk,)),
        *((steps.ProveDisks((disk,), verify),) if verify is not Verify.OFF else ()),
        steps.EndBackup(),
        steps.PublishDisk(disk),
        steps.DefineDomain((), ()),
        steps.SealReplica(),
        steps.EndStage((IMAGES,)),
    )


def test_a_running_vm_without_disks_needs_no_backup_job() -> None:
    plan = Case(**running(""), options=options()).plan()
    assert plan.refusal() is None
    assert not [step for step in plan.steps if isinstance(step, (steps.BeginBackup, steps.EndBackup, steps.CopyDisks))]


def test_a_clone_deletes_the_checkpoints_that_interrupted_runs_have_left() -> None:
    how = running()
    chain = chain_of(Case().facts(), "web")
    how["domain"]["checkpoints"] = (f"{chain}older", "monday", "kvm-clone.other.x")
    begin = Case(**how, options=options(quiesce=Quiesce.OFF)).plan().steps[2]
    assert isinstance(begin, steps.BeginBackup)
    assert (begin.stale, begin.quiesce) == ((f"{chain}older",), Quiesce.OFF)


INTERFACES = "".join(f"<interface type='user'><mac address='{mac}'/></interface>" for mac in ("aa", "bb"))


@pytest.mark.parametrize(
    ("case", "macs"),
    [
        (Case(), ("x", "y")),
        (Case(options=options(preserve_mac=True)), ("aa", "bb")),
        # a VM that is replaced is another one: only a sync keeps what is the replica's own
        (Case(existing=existing(), options=options(retry=Retry.FORCE)), ("x", "y")),
    ],
)
def test_macs(case: Case, macs: tuple[str, ...]) -> None:
    given = replace(case, devices=ONE_DISK + INTERFACES)
    if given.existing is not None:
        given = replace(given, existing=replace(given.existing, mark=mark_of(given.facts(), macs="aa=11 bb=22")))
    assert make_plan(given.facts(), given.options, replace(IDENTITY, macs=("x", "y"))).macs == macs


def test_every_step_can_be_told() -> None:
    """The saved plan and --dry-run have words for each kind, with and without what it may name."""
    backup = Case(**running()).plan().backup
    assert backup is not None
    disks = Case().plan().disks
    given: dict[str, tuple[object, ...]] = {
        "tuple[str, ...]": ((), ("/a", "/b")),
        "tuple[Asset, ...]": ((), disks),
        "Asset": disks,
        "BackupJob": (backup, replace(backup, incremental="kvm-clone.x")),
        "Quiesce": tuple(Quiesce),
        "Verify": tuple(Verify),
        "str": ("/pool",),
        "bool": (False, True),
    }
    for kind in typing.get_args(Step):
        for values in itertools.product(*(given[str(part.type)] for part in fields(kind))):
            text = kind(*values).describe()
            assert text
            assert not text.endswith((":", ","))
