"""Domain definitions: the facts that a plan needs, read from libvirt's XML.

Pure. Only libvirt's own elements, which are in no namespace, are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from kvm_clone.definition import variables
from kvm_clone.definition.spans import Document, Node
from kvm_clone.definition.variables import Variables
from kvm_clone.definition.volumes import Locations, Volume, named_by
from kvm_clone.errors import RefusedError
from kvm_clone.image import Image
from kvm_clone.units import scaled

FORMATS = ("raw", "qcow2")
COPIED_TYPES = ("file", "block")
"""Types of disk whose content can be copied."""

_REFUSED_FEATURES = {"nvram": "UEFI variables", "tpm": "a TPM", "memory": "persistent memory"}
_REFUSED_STORAGE = {
    "mirror": "is being mirrored by a block job",
    "slices": "is a slice of its file, which cannot be cloned",
    "reservations": "uses SCSI persistent reservations, which cannot be cloned",
    "dataStore": "keeps its data in a second file, which cannot be cloned yet",
    "fdgroup": "is passed to QEMU as an open file, which another host has not",
}


@dataclass(frozen=True)
class DiskXml:
    """One <disk>. `path` is its file or device, describes a source that is neither, or is None for no source.

    `volume`: the pool and volume that the definition names; `path` and `type` are what these are on the host. The type
    is "volume" where that is not known.
    `backing`: the images that it rests on, as far as the definition names them, the nearest first; a format is empty
    where it is not said. `ends`: the definition says that the last one rests on nothing. `storage` names what makes it
    more than a plain image, among the keys of _REFUSED_STORAGE. `direct`: QEMU opens it past the page cache.
    """

    target: str
    bus: str | None
    device: str
    type: str
    driver_format: str | None
    path: str | None
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    backing: tuple[Image, ...] = ()
    ends: bool = False
    encrypted: bool = False
    storage: tuple[str, ...] = ()
    direct: bool = False
    volume: Volume | None = None

    @property
    def format(self) -> str:
        """The image's format; libvirt takes a missing one for raw, and never probes."""
        return self.driver_format or "raw"


@dataclass(frozen=True)
class OsFile:
    """A file of the host that the guest boots from: "loader", "kernel", "initrd", "dtb" or "shim", and its path."""

    role: str
    path: str


@dataclass(frozen=True)
class Feature:
    """State that the VM keeps outside of its disks, or a thing of its host that it uses."""

    kind: str
    detail: str


@dataclass(frozen=True)
class CpuXml:
    """The <cpu>. `check`: how libvirt compares it with the host's at a start: none, partial, full.

    `model`: None where it is not asked for by name. `fallback`: whether another model may be given. `eased`: some of
    the model's features are optional or disabled. `markup`: the element as it is written.
    """

    markup: str
    mode: str
    check: str
    model: str | None = None
    fallback: str = "allow"
    eased: bool = False


@dataclass(frozen=True)
class DomainXml:
    """What a plan needs to know of a definition.

    `memory` is in bytes, `vcpus` the maximum. `uuid` is empty, and `memory` 0, only in XML written by hand.
    `variables`: of UEFI, None for a VM that keeps none.
    """

    name: str
    uuid: str
    type: str
    memory: int
    vcpus: int
    arch: str | None
    machine: str | None
    emulator: str | None
    os_files: tuple[OsFile, ...]
    loader_type: str | None
    macs: tuple[str, ...]
    disks: tuple[DiskXml, ...]
    features: tuple[Feature, ...]
    networks: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    cpu: CpuXml | None = None
    variables: Variables | None = None

    @property
    def own_disks(self) -> tuple[DiskXml, ...]:
        """Disks that belong to this VM alone: these are copied."""
        return tuple(d for d in self.disks if d.device == "disk" and not (d.readonly or d.shareable))

    @property
    def referenced_disks(self) -> tuple[DiskXml, ...]:
        """Disks that others may use too: the reference is kept, the content never copied."""
        return tuple(d for d in self.disks if d.device == "disk" and (d.readonly or d.shareable))

    @property
    def media(self) -> tuple[DiskXml, ...]:
        """CD-ROMs and floppies: the reference is kept, the content never copied."""
        return tuple(d for d in self.disks if d.device in ("cdrom", "floppy"))


@dataclass(frozen=True)
class Remark:
    """What is reported of a definition: a code, a disk's target or the VM's name, and a sentence."""

    code: str
    subject: str
    text: str


class Unsupported(Remark):
    """The VM cannot be cloned because of this."""


class HostTied(Remark):
    """The clone may not start or work on another host because of this."""


def read_domain(xml: str, volumes: Locations = MappingProxyType({})) -> DomainXml:
    """Return the facts of a definition. `volumes`: where the volumes are that it names.

    Raises RefusedError when `xml` is no domain's, or its memory or vcpu is not a number.
    """
    document, domain, name = parse(xml)
    machine = domain.find_attributes("os", "type")
    os_files = tuple(_os_files(domain))
    has_loader = any(file.role == "loader" for file in os_files)
    return DomainXml(
        name=name.text,
        uuid=domain.find_text("uuid") or "",
        type=domain.attributes.get("type", ""),
        memory=_memory(domain),
        vcpus=_number(domain, "vcpu", 1),
        arch=machine.get("arch"),
        machine=machine.get("machine"),
        emulator=domain.find_text("devices", "emulator"),
        os_files=os_files,
        loader_type=domain.find_attributes("os", "loader").get("type", "rom") if has_loader else None,
        macs=tuple(mac.attributes["address"] for mac in macs_of(domain)),
        disks=tuple(_disk(disk, volumes) for disk in domain.find_all("devices", "disk")),
        features=(*_outside_state(domain), *_host_devices(domain)),
        networks=tuple(_connected_to(domain, "network")),
        bridges=tuple(_connected_to(domain, "bridge")),
        cpu=_cpu(document, domain),
        variables=variables.read(domain),
    )


def unsupported(domain: DomainXml) -> tuple[Unsupported, ...]:
    """Return every reason why this VM cannot be cloned: something would not be copied, or copied wrong."""
    found = [
        Unsupported(
            feature.kind,
            domain.name,
            f"VM {domain.name} has {_REFUSED_FEATURES[feature.kind]} ({feature.detail}), "
            "whose state cannot be cloned yet.",
        )
        for feature in domain.features
        if feature.kind in _REFUSED_FEATURES
    ]
    kept = (*domain.referenced_disks, *domain.media)
    for disk in domain.disks:
        if disk not in kept:
            where = f"Disk {disk.target}" + (f" ({disk.path})" if disk.path else "")
            for code, reason in (*_disk_reasons(disk), *_shared_file(disk, domain)):
                found.append(Unsupported(code, disk.target, f"{where} of VM {domain.name} {reason}."))
    return tuple(found)


def warnings(domain: DomainXml) -> tuple[HostTied, ...]:
    """Return what ties this VM to its host without being a reason to refuse."""
    return tuple(
        HostTied(
            feature.kind,
            domain.name,
            f"VM {domain.name} uses something of its host: {feature.kind} ({feature.detail}). "
            "The clone needs the same on the destination.",
        )
        for feature in domain.features
        if feature.kind not in _REFUSED_FEATURES
    )


def parse(xml: str) -> tuple[Document, Node, Node]:
    """Return the document, its <domain> and the <name> in that. Raises RefusedError when `xml` is no domain's."""
    document = Document(xml)
    domain = document.root
    if domain.tag != "domain":
        raise RefusedError(f"This is not a libvirt domain but <{domain.tag}>.")
    name = domain.find("name")
    if name is None or not name.text:
        raise RefusedError("The domain has no name.")
    return document, domain, name


def macs_of(domain: Node) -> list[Node]:
    """Return the <mac> of each interface that has one."""
    return [mac for mac in domain.find_all("devices", "interface", "mac") if "address" in mac.attributes]


def _number(domain: Node, tag: str, default: int) -> int:
    text = domain.find_text(tag)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise RefusedError(f"The domain's <{tag}> is {text!r}, which is not a number.")
    return int(text)


def _memory(domain: Node) -> int:
    """Return the size in bytes."""
    number = _number(domain, "memory", 0)
    unit = domain.find_attributes("memory").get("unit") or "KiB"
    size = scaled(number, unit)
    if size is None:
        raise RefusedError(f"The domain's <memory> is in an unknown unit, {unit!r}.")
    return size


def _os_files(domain: Node) -> Iterator[OsFile]:
    for role in ("loader", "kernel", "initrd", "dtb", "shim"):
        path = domain.find_text("os", role)
        if path:
            yield OsFile(role, path)


def _outside_state(domain: Node) -> Iterator[Feature]:
    """Yield the state that is in none of the disks."""
    signs = [*variables.refused(domain)]
    if signs:
        yield Feature("nvram", ", ".join(signs))
    for tpm in domain.find_all("devices", "tpm"):
        yield Feature("tpm", tpm.attributes.get("model", "default model"))
    for memory in domain.find_all("devices", "memory"):
        path = memory.find_text("source", "path")
        if path:
            yield Feature("memory", f"{memory.attributes.get('model', 'memory')} {path}")


def _host_devices(domain: Node) -> Iterator[Feature]:
    """Yield what the destination may not have."""
    for kind in ("hostdev", "filesystem", "shmem"):
        for node in domain.find_all("devices", kind):
            yield Feature(kind, _source(node) or node.attributes.get("name", "unnamed"))
    for node in domain.find_all("devices", "interface"):
        kind = node.attributes.get("type", "")
        if kind in ("direct", "hostdev"):
            yield Feature(f"interface-{kind}", _source(node) or "unnamed")


def _connected_to(domain: Node, kind: str) -> Iterator[str]:
    """Yield the names of the libvirt networks, or bridges of the host, that interfaces are connected to."""
    for node in domain.find_all("devices", "interface"):
        source = node.find("source")
        if node.attributes.get("type") == kind and source is not None and kind in source.attributes:
            yield source.attributes[kind]


def _cpu(document: Document, domain: Node) -> CpuXml | None:
    """Return the <cpu>, with libvirt's default for a missing check (qemuDomainDefCPUPostParse)."""
    cpu = domain.find("cpu")
    if cpu is None:
        return None
    mode = cpu.attributes.get("mode", "custom")
    model = cpu.find_text("model") if mode == "custom" else None
    compared = mode == "host-model" or (model is not None and domain.attributes.get("type") != "qemu")
    return CpuXml(
        document.markup(cpu),
        mode,
        cpu.attributes.get("check") or ("partial" if compared else "none"),
        model,
        cpu.find_attributes("model").get("fallback", "allow"),
        any(feature.attributes.get("policy") in ("disable", "optional") for feature in cpu.find_all("feature")),
    )


def _source(device: Node) -> str:
    """Return all that the device's <source> says of what it is on the host."""
    source = device.find("source")
    nodes = [source, *source.walk()] if source else []
    return " ".join(f"{key}={value}" for node in nodes for key, value in node.attributes.items())


def _disk(disk: Node, volumes: Locations) -> DiskXml:
    target = disk.find_attributes("target")
    flags = {child.tag for child in disk.children}
    source = disk.find("source")
    parts = flags | set(source.attributes) | {child.tag for child in source.children} if source else flags
    kind, path = _where(disk, volumes)
    driver = disk.find_attributes("driver")
    backing, ends = _backing(disk, volumes)
    return DiskXml(
        target=target.get("dev", ""),
        bus=target.get("bus"),
        device=disk.attributes.get("device", "disk"),
        type=kind,
        driver_format=driver.get("type"),
        path=path,
        readonly="readonly" in flags,
        shareable="shareable" in flags,
        transient="transient" in flags,
        backing=backing,
        ends=ends,
        encrypted=any(node.tag == "encryption" for node in disk.walk()),
        storage=tuple(name for name in _REFUSED_STORAGE if name in parts),
        direct=driver.get("cache") in ("none", "directsync") or driver.get("io") == "native",
        volume=named_by(disk),
    )


def _backing(disk: Node, volumes: Locations) -> tuple[tuple[Image, ...], bool]:
    """Return the images of the nested <backingStore>, and whether an empty one ends the chain."""
    found: list[Image] = []
    store = disk.find("backingStore")
    while store is not None and store.find("source") is not None:
        _, path = _where(store, volumes)
        found.append(Image(path or "", store.find_attributes("format").get("type", "")))
        store = store.find("backingStore")
    return tuple(found), store is not None


def _where(layer: Node, volumes: Locations) -> tuple[str, str | None]:
    """Return the type of a disk or backing store, and its path or what describes it: of a volume those of the host."""
    found = volumes.get(volume) if (volume := named_by(layer)) is not None else None
    if found is not None:
        return found.type, found.path
    kind = layer.attributes.get("type", "file")
    return kind, _path(kind, layer)


def _path(kind: str, disk: Node) -> str | None:
    source = disk.find_attributes("source")
    if kind == "network":
        return f"{source.get('protocol', 'network')}:{source.get('name', '')}"
    if kind == "volume":
        return f"{source.get('pool', '')}/{source.get('volume', '')}"
    if kind == "nvme":
        return _source(disk) or None
    return next((source[key] for key in ("file", "dev", "dir", "path") if source.get(key)), None)


def _disk_reasons(disk: DiskXml) -> Iterator[tuple[str, str]]:
    if disk.device != "disk":
        yield "disk-device", f"is a {disk.device}, which passes a device of the host through"
    elif disk.type == "volume":
        yield "disk-volume", "is a volume that libvirt on its host cannot find"
    elif disk.type not in COPIED_TYPES:
        yield "disk-type", f"is of type {disk.type}; only files and block devices can be cloned yet"
    elif disk.path is None:
        yield "disk-source", "names no file"
    if disk.format not in FORMATS:
        yield "disk-format", f"has the format {disk.format}; only {' and '.join(FORMATS)} can be cloned"
    if disk.encrypted:
        yield (
            "disk-encryption",
            "is encrypted with a secret of its host's libvirt, which cannot be cloned yet",
        )
    for name in disk.storage:
        yield f"disk-{name.lower()}", _REFUSED_STORAGE[name]


def _shared_file(disk: DiskXml, domain: DomainXml) -> Iterator[tuple[str, str]]:
    others = [d.target for d in domain.disks if d is not disk and d.path and d.path == disk.path]
    if others:
        # In the clone each would have a file of its own.
        yield "disk-duplicate", f"has the same source as {', '.join(others)}"
