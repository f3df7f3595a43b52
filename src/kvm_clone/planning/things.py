"""What hosts have of the things that a definition refers to, and what to ask them. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.definition.references import Reference, Role

MISSING, UNKNOWN = "missing", "unknown"
"""What a path is beside file, directory, socket, fifo, char and block: see agent/host/things.py."""


@dataclass(frozen=True)
class HugePages:
    """How many pages of one size a host has, and how many of them are free."""

    total: int
    free: int


@dataclass(frozen=True)
class Resources:
    """What a host has beside its files. `nodes`, `cpus`: those online, None where the host does not say.

    `hugepages`: by size in KiB. `hugetlbfs`: whether it is mounted, so that libvirt can use them. `usb`: VENDOR:PRODUCT
    and BUS/DEVICE of each device. `addresses`: whether each IP address is the host's own, None for a name.
    """

    hugepages: Mapping[int, HugePages] = field(default_factory=dict)
    default_hugepage: int = 0
    hugetlbfs: bool = False
    nodes: frozenset[int] | None = None
    cpus: frozenset[int] | None = None
    usb: frozenset[str] = frozenset()
    addresses: Mapping[str, bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Objects:
    """What libvirt on a host has of the objects that a definition names; None where libvirt cannot list them.

    `secrets`: by UUID and by USAGE-TYPE/USAGE. `volumes`: why POOL/VOLUME cannot be used, nothing for one that can.
    `portgroups`: NETWORK/PORTGROUP. `used`: the VMs that claim a path or number which two cannot share, by `claim`.
    """

    filters: frozenset[str] | None = None
    secrets: frozenset[str] | None = None
    volumes: Mapping[str, str] = field(default_factory=dict)
    portgroups: frozenset[str] | None = None
    secmodels: frozenset[str] | None = None
    used: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Things:
    """What a host has of all these. `paths`: what each path is there."""

    paths: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    objects: Objects = field(default_factory=Objects)

    def path(self, path: str) -> str:
        """Return what the path is; UNKNOWN for one that was not asked for."""
        return self.paths.get(path, UNKNOWN)


def kept(references: Iterable[Reference], xml: DomainXml) -> tuple[Reference, ...]:
    """Return the references without the images of the VM's own disks: these are copied, and get new paths."""
    own = {f"devices/disk[{number}]" for number, disk in enumerate(xml.disks) if disk in xml.own_disks}
    return tuple(one for one in references if one.owner not in own or one.role is Role.SECLABEL)


def paths_of(references: Iterable[Reference]) -> tuple[str, ...]:
    """Return every path to look at, including those of devices in sysfs and of directories to write in."""
    found: set[str] = set()
    for reference in references:
        if reference.is_path:
            found.add(reference.value)
            if reference.made:
                found.add(posixpath.dirname(reference.value))
        found.update(kernel_paths(reference))
    return tuple(sorted(found))


def kernel_paths(reference: Reference) -> tuple[str, ...]:
    """Return the paths at which the kernel shows the thing: it is there if any of them is. Nothing for other things."""
    value = reference.value
    bus, _, address = value.partition(":")
    if reference.role in (Role.INTERFACE, Role.BRIDGE):
        return (f"/sys/class/net/{value}",)
    if reference.role is Role.HOST_DEVICE and bus == "pci":
        return (f"/sys/bus/pci/devices/{address}",)
    if reference.role is Role.HOST_DEVICE and bus == "scsi":
        return (f"/sys/bus/scsi/devices/{address}",)
    if reference.role is Role.HOST_DEVICE and bus == "mdev":
        return (f"/sys/bus/mdev/devices/{address}",)
    return tuple(_cgroups(value)) if reference.role is Role.CGROUP else ()


def _cgroups(partition: str) -> Iterable[str]:
    """Yield where a resource partition may be: a slice with systemd, else a directory (libvirt's docs/cgroups.rst)."""
    parts = [part for part in partition.split("/") if part]
    slices = ["-".join(parts[: number + 1]) + ".slice" for number in range(len(parts))]
    plain = [f"{part}.partition" for part in parts]
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/systemd"):
        yield from (posixpath.join(root, *names) for names in (slices, plain, parts))


def claim(reference: Reference) -> str:
    """Return the text that identifies a thing which two VMs of a host cannot share."""
    if reference.is_path:
        return plain_path(reference.value)
    return f"{reference.kind} {reference.value}"


def is_claim(reference: Reference) -> bool:
    """Whether two VMs that run on one host cannot share what the reference names."""
    return reference.role in (Role.EXCLUSIVE, Role.PIPE) or (reference.made and reference.is_path)


def plain_path(path: str) -> str:
    """Return the path normalised: /var/run is /run everywhere."""
    plain = posixpath.normpath(path)
    for old, new in (("/var/run/", "/run/"), ("/var/lock/", "/run/lock/")):
        if plain.startswith(old):
            return new + plain.removeprefix(old)
    return plain


def parse_set(text: str | None) -> frozenset[int] | None:
    """Return the numbers of a set such as 0-3,5,^2; None for a text that is no set."""
    if text is None:
        return None
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\^?)(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        if match is None:
            return None
        numbers = range(int(match[2]), int(match[3] or match[2]) + 1)
        found = found - set(numbers) if match[1] else found | set(numbers)
    return frozenset(found)
