"""A pair of hosts and a VM as facts, for the suites of what is pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvm_clone.definition import DiskXml, Provenance, read_domain
from kvm_clone.domains import SHUT_OFF, Abilities, Domain, Pool
from kvm_clone.facts import (
    DestinationFacts,
    Directory,
    Existing,
    Facts,
    HostFacts,
    ImageFacts,
    RouteFacts,
    SourceFacts,
    Staged,
    StagedDisk,
)
from kvm_clone.options import CloneOptions
from kvm_clone.plan import Identity, Plan, make_plan

UUID = "6695eb01-f6a4-4304-b9aa-97f2502e193f"
OTHER_UUID = "12345678-9abc-4def-8123-456789abcdef"
IMAGES = "/var/lib/libvirt/images"
IDENTITY = Identity(operation="0123456789ab", uuid=OTHER_UUID, macs=())
GIB = 1 << 30
ABLE = Abilities(memory=1 << 40, cpus=64, networks={"default": True})
DEFAULT = Pool("default", "dir", IMAGES, active=True)


def disk_xml(path: str, target: str = "vda", inside: str = "", *, device: str = "disk", format_: str = "qcow2") -> str:
    path = path.replace("&", "&amp;").replace("'", "&apos;")
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{format_}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/>{inside}</disk>"
    )


def domain_xml(devices: str, os: str = "", cpu: str = "") -> str:
    return (
        f"<domain type='kvm'><name>NAME</name><uuid>{UUID}</uuid><memory>1024</memory><vcpu>1</vcpu>"
        f"<os>{os}</os>{cpu}<devices>{devices}</devices></domain>"
    )


ONE_DISK = disk_xml(f"{IMAGES}/web.qcow2")
DIRECT = RouteFacts(True, "kc-a can connect to kc-b")
NOTHING_ASKED = CloneOptions()


@dataclass(frozen=True)
class Case:
    """Two hosts that differ from a pair between which VM web, which has one disk, can be cloned without a remark.

    `image` changes what is known of every image, `domain` of the VM, `present` holds the paths at the destination.
    """

    devices: str = ONE_DISK
    os: str = ""
    cpu: str = ""
    name: str = "web"
    domain: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    source_host: dict[str, Any] = field(default_factory=dict)
    destination_host: dict[str, Any] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    pools: tuple[Pool, ...] = (DEFAULT,)
    directories: tuple[Directory, ...] = (Directory(IMAGES, exists=True, writable=True, free=1 << 40),)
    present: tuple[str, ...] = ()
    abilities: dict[str, Any] = field(default_factory=dict)
    existing: Existing | None = None
    staged: Staged | None = None
    staged_error: str = ""
    route: RouteFacts = DIRECT
    options: CloneOptions = NOTHING_ASKED

    def facts(self) -> Facts:
        xml = domain_xml(self.devices, self.os, self.cpu).replace("NAME", self.name)
        read = read_domain(xml)
        tools = HostFacts("kc-a", "kc-a.example.org", "3.11.2", "7.2.22", "7.2.22")
        domain = replace(Domain(self.name, UUID, "shut off", True, xml), **self.domain)
        paths = {disk.path for disk in (*read.media, *read.referenced_disks) if disk.path}
        paths |= {file.path for file in read.os_files}
        return Facts(
            SourceFacts(
                replace(tools, **self.source_host),
                domain,
                read,
                tuple(self._image(disk) for disk in read.own_disks),
            ),
            DestinationFacts(
                replace(tools, name="kc-b", hostname="kc-b.example.org", **self.destination_host),
                self.domains,
                self.pools,
                {directory.path: directory for directory in self.directories},
                {path: path in self.present for path in paths},
                self.existing,
                self.staged,
                self.staged_error,
                replace(ABLE, **self.abilities),
            ),
            self.route,
        )

    def _image(self, disk: DiskXml) -> ImageFacts:
        plain = ImageFacts(disk.target, disk.path or "", disk.format, virtual_size=GIB, data=1 << 20, fingerprint="1:2")
        return replace(plain, **self.image)

    def plan(self, own_operation: str | None = None) -> Plan:
        return make_plan(self.facts(), self.options, IDENTITY, own_operation)


def images(*names: str, writable: bool = True, path: str = IMAGES) -> tuple[Directory, ...]:
    return (Directory(path, exists=True, writable=writable, free=1 << 40, names=frozenset(names)),)


def options(**changes: Any) -> CloneOptions:
    return CloneOptions(**changes)


def existing(
    *,
    state: str = SHUT_OFF,
    name: str = "web",
    uuid: str = OTHER_UUID,
    mark: Provenance | None = None,
    whole: bool = True,
    persistent: bool = True,
    removable: tuple[str, ...] = (f"{IMAGES}/old.qcow2",),
) -> Existing:
    """A VM that the destination has; by default not ours, and shut off."""
    xml = domain_xml(disk_xml(f"{IMAGES}/old.qcow2")).replace("NAME", name).replace(UUID, uuid)
    return Existing(Domain(name, uuid, state, persistent, xml), read_domain(xml), mark, whole, removable)


def mark_of(facts: Facts, operation: str = "earlier", **changes: Any) -> Provenance:
    """Our mark on a clone of the source as it is."""
    source = facts.source
    mark = Provenance(
        operation, OTHER_UUID, "kc-a", source.xml.uuid, source.domain.name, source.fingerprint, "1", "t", True
    )
    return replace(mark, **changes)


def staged(
    *,
    directory: str = IMAGES,
    operation: str = "earlier",
    source_uuid: str = UUID,
    defining: bool = False,
    committed: bool = False,
    remove: tuple[str, ...] = (),
    forget: tuple[str, ...] = (),
    disks: Mapping[str, StagedDisk] | None = None,
) -> Staged:
    """An interrupted attempt to clone the VM."""
    about = {"operation": operation, "source_uuid": source_uuid, "source_name": "another"}
    return Staged(
        directory=directory,
        **about,
        defining=defining,
        committed=committed,
        remove=remove,
        forget=forget,
        disks=disks or {},
    )


def staged_disk(target: str = "vda", directory: str = IMAGES, **changes: Any) -> StagedDisk:
    """What an attempt named `earlier` has of one disk."""
    part = f"{directory}/.kvm-clone-earlier-{target}.part"
    disk = StagedDisk(part, f"{directory}/kept-{target}.qcow2", "qcow2", GIB, 1 << 19, 1 << 19)
    return replace(disk, **changes)
