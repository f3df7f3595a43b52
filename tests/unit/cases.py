"""A pair of hosts and a VM as facts, for the suites of what is pure."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvm_clone.definition.domain_xml import DiskXml, read_domain
from kvm_clone.definition.marks import Pending, Provenance, Seal, definition_digest, pending_markup
from kvm_clone.definition.references import references
from kvm_clone.options import CloneOptions, SyncOptions
from kvm_clone.planning.domain_facts import SHUT_OFF, Abilities, Domain, Live, Pool
from kvm_clone.planning.facts import (
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
from kvm_clone.planning.identity import HostIdentity
from kvm_clone.planning.plan import Identity, Plan, make_plan
from kvm_clone.planning.sync import make_sync_plan
from kvm_clone.planning.things import HugePages, Objects, Resources, Things, kept, paths_of

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


def domain_xml(devices: str, os: str = "", cpu: str = "", firmware: str = "") -> str:
    return (
        f"<domain type='kvm'><name>NAME</name><uuid>{UUID}</uuid><memory>1024</memory><vcpu>1</vcpu>"
        f"<os{firmware}>{os}</os>{cpu}<devices>{devices}</devices></domain>"
    )


ONE_DISK = disk_xml(f"{IMAGES}/web.qcow2")
SOURCE_HOST = HostIdentity("boot a", "1:2:3", "machine a", "uuid a")
OTHER_HOST = HostIdentity("boot b", "1:2:3", "machine b", "uuid b")
PLENTY = Resources(
    hugepages={2048: HugePages(1 << 20, 1 << 20)},
    default_hugepage=2048,
    hugetlbfs=True,
    nodes=frozenset({0, 1}),
    cpus=frozenset(range(8)),
    usb=frozenset({"1234:5678"}),
    addresses={"0.0.0.0": True, "10.0.0.1": False},
)
DIRECT = RouteFacts(True, "kc-a can connect to kc-b")
NOTHING_ASKED = CloneOptions()


@dataclass(frozen=True)
class Case:
    """Two hosts that differ from a pair between which VM web, which has one disk, can be cloned without a remark.

    `image` changes what is known of every image, `domain` of the VM, `source` of where that is, `present` holds the
    paths at the destination. `here`, `there`: what paths are on the two hosts; those left out are devices, and
    directories where the VM writes. `resources`, `objects`: what else the destination has. `variables`: the source's
    file of UEFI variables; `firmware`: an attribute of <os>.
    """

    devices: str = ONE_DISK
    os: str = ""
    cpu: str = ""
    firmware: str = ""
    name: str = "web"
    domain: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
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
    paths_in_use: Mapping[str, frozenset[str]] = field(default_factory=dict)
    here: Mapping[str, str] = field(default_factory=dict)
    there: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = PLENTY
    objects: Objects = field(default_factory=Objects)
    route: RouteFacts = DIRECT
    options: CloneOptions = NOTHING_ASKED
    variables: ImageFacts | None = None

    def facts(self) -> Facts:
        xml = domain_xml(self.devices, self.os, self.cpu, self.firmware).replace("NAME", self.name)
        read = read_domain(xml, self.domain.get("volumes", {}))
        tools = HostFacts("kc-a", "kc-a.example.org", "3.11.2", "7.2.22", "7.2.22", identity=SOURCE_HOST)
        domain = replace(Domain(self.name, UUID, "shut off", True, xml), **self.domain)
        paths = {disk.path for disk in (*read.media, *read.referenced_disks) if disk.path}
        paths |= {file.path for file in read.os_files}
        refs = kept(references(xml), read)
        usual = dict.fromkeys(paths_of(refs), "char")
        usual |= {posixpath.dirname(one.value): "directory" for one in refs if one.made and one.is_path}
        return Facts(
            SourceFacts(
                replace(tools, **self.source_host),
                domain,
                read,
                (*map(self._image, read.own_disks), *([self.variables] if self.variables else [])),
                references=refs,
                things=Things({**usual, **self.here}),
                **self.source,
            ),
            DestinationFacts(
                replace(
                    tools,
                    **{"name": "kc-b", "hostname": "kc-b.example.org", "identity": OTHER_HOST, **self.destination_host},
                ),
                self.domains,
                self.pools,
                {directory.path: directory for directory in self.directories},
                {path: path in self.present for path in paths},
                self.existing,
                self.staged,
                self.staged_error,
                replace(ABLE, **self.abilities),
                self.paths_in_use,
                Things({**usual, **self.there}, self.resources, self.objects),
            ),
            self.route,
        )

    def _image(self, disk: DiskXml) -> ImageFacts:
        plain = ImageFacts(
            disk.path or "", disk.format, target=disk.target, virtual_size=GIB, data=1 << 20, fingerprint="1:2"
        )
        return replace(plain, **self.image)

    def plan(self, own_operation: str | None = None) -> Plan:
        return make_plan(self.facts(), self.options, IDENTITY, own_operation)

    def sync(self, options: SyncOptions | None = None, own_operation: str | None = None, **changes: Any) -> Plan:
        """The plan of a sync with these options, or with those that differ from the usual ones by `changes`."""
        asked = replace(options or SyncOptions(), **changes)
        return make_sync_plan(self.facts(), asked, IDENTITY, own_operation)


def running(devices: str = ONE_DISK, **changes: Any) -> dict[str, Any]:
    """What a Case takes for a VM that runs with these disks, where nothing speaks against copying it."""
    paths = {disk.target: disk.path or "" for disk in read_domain(domain_xml(devices)).own_disks}
    live = replace(Live(paths, agent=True), **changes)
    directories = {IMAGES: Directory(IMAGES, exists=True, writable=True, free=1 << 40)}
    return {
        "devices": devices,
        "domain": {"state": "running"},
        "source": {"live": live, "libvirt": 9_000_000, "directories": directories},
    }


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
    touched: bool = False,
    kept: tuple[tuple[str, str], ...] = (),
    pending: Pending | None = None,
    os: str = "",
) -> Existing:
    """A VM that the destination has; by default not ours, and shut off. `touched`: its disk since it was sealed."""
    xml = domain_xml(disk_xml(f"{IMAGES}/old.qcow2"), os).replace("NAME", name).replace(UUID, uuid)
    if pending is not None:
        xml = xml.replace("<os>", f"<metadata>{pending_markup(pending)}</metadata><os>")
    domain, files = (
        Domain(name, uuid, state, persistent, xml),
        {f"{IMAGES}/old.qcow2": "1:2:3:4:6" if touched else "1:2:3:4:5"},
    )
    seal = Seal(definition_digest(xml), {"vda": "1:2:3:4:5"}) if mark is not None else None
    return Existing(domain, read_domain(xml), mark, whole, removable, seal, kept=kept, files=files)


def mark_of(facts: Facts, operation: str = "earlier", **changes: Any) -> Provenance:
    """Our mark on a clone of the source as it is."""
    source = facts.source
    mark = Provenance(
        operation, OTHER_UUID, "kc-a", source.xml.uuid, source.domain.name, source.fingerprint, "1", "t", True
    )
    return replace(mark, **changes)


REPLICA_IMAGE = ImageFacts(
    f"{IMAGES}/replica.qcow2",
    "qcow2",
    target="vda",
    virtual_size=GIB,
    allocated=1 << 20,
    mode=0o640,
    fingerprint="1:2:3:4:5",
)
"""What the replica's disk is before a sync."""


def replica(
    facts: Facts,
    *images: ImageFacts,
    domain: Mapping[str, Any] | None = None,
    sealed: bool = True,
    removable: tuple[str, ...] | None = None,
    **mark: Any,
) -> Existing:
    """A replica of the facts' source that nobody has used, whose source has changed since.

    `domain` changes the VM, `mark` what our mark says.
    """
    found = images or (REPLICA_IMAGE,)
    devices = "".join(disk_xml(image.path, image.target, format_=image.format) for image in found)
    xml = domain_xml(devices).replace("NAME", "web").replace(UUID, OTHER_UUID)
    seal = Seal(definition_digest(xml), {image.target: image.fingerprint for image in found})
    vm = replace(Domain("web", OTHER_UUID, SHUT_OFF, True, xml), **(domain or {}))
    return Existing(
        vm,
        read_domain(xml),
        mark_of(facts, **{"operation": "before", "fingerprint": "older", **mark}),
        True,
        tuple(image.path for image in found) if removable is None else removable,
        seal if sealed else None,
        found,
        files={image.path: image.fingerprint for image in found},
    )


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
    kind: str = "clone",
    holder: str = "",
) -> Staged:
    """An interrupted attempt to clone the VM."""
    return Staged(
        directory=directory,
        operation=operation,
        source_uuid=source_uuid,
        source_name="another",
        defining=defining,
        committed=committed,
        remove=remove,
        forget=forget,
        disks=disks or {},
        kind=kind,
        holder=holder,
    )


def staged_disk(target: str = "vda", directory: str = IMAGES, **changes: Any) -> StagedDisk:
    """What an attempt named `earlier` has of one disk."""
    part = f"{directory}/.kvm-clone-earlier-{target}.part"
    disk = StagedDisk(part, f"{directory}/kept-{target}.qcow2", "qcow2", GIB, 1 << 19, 1 << 19)
    return replace(disk, **changes)
