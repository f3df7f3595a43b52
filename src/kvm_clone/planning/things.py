"""What two hosts have of the things that a definition refers to: facts, and what is to be asked for. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.definition.references import Reference, Role

MISSING, UNKNOWN = "missing", "unknown"
"""Of a path, as agent/host/things.py has them, beside file, directory, socket, fifo, char and block."""


@dataclass(frozen=True)
class HugePages:
    """Pages of one size: all, and those that nobody uses."""

    total: int
    free: int


@dataclass(frozen=True)
class Resources:
    """What a host has beside its files. `nodes`, `cpus`: those online, None where that is not known.

    `hugepages`: by the size in KiB. `hugetlbfs`: whether libvirt has a mount to take them from. `usb`: VENDOR:PRODUCT
    and BUS/DEVICE of each device. `addresses`: whether an IP address is the host's own, None where it is a name.
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
    """What libvirt on a host has of what a definition names; None where libvirt cannot say.

    `secrets`: by UUID and by USAGE-TYPE/USAGE. `volumes`: why POOL/VOLUME cannot be used, nothing for one that can.
    `portgroups`: NETWORK/PORTGROUP. `used`: the VMs that have a path or number which two cannot share, by `claim`.
    """

    filters: frozenset[str] | None = None
    secrets: frozenset[str] | None = None
    volumes: Mapping[str, str] = field(default_factory=dict)
    portgroups: frozenset[str] | None = None
    secmodels: frozenset[str] | None = None
    used: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Things:
    """What a host has: `paths` says what each path is."""

    paths: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    objects: Objects = field(default_factory=Objects)

    def path(self, path: str) -> str:
        """What the path is; one that was not asked for is not known."""
        return self.paths.get(path, UNKNOWN)


def kept(references: Iterable[Reference], xml: DomainXml) -> tuple[Reference, ...]:
    """Return the references without the images of the VM's own disks: these are copied, and get new paths."""
    own = {f"devices/disk[{number}]" for number, disk in enumerate(xml.disks) if disk in xml.own_disks}
    return tuple(one for one in references if one.owner not in own or one.role is Role.SECLABEL)


def paths_of(references: Iterable[Reference]) -> tuple[str, ...]:
    """Return every path that has to be looked at, those of devices in sysfs and of directories to write in too."""
    found: set[str] = set()
    for reference in references:
        if reference.is_path:
            found.add(reference.value)
            if reference.made:
                found.add(posixpath.dirname(reference.value))
        found.update(kernel_paths(reference))
    return tuple(sorted(found))


def kernel_paths(reference: Reference) -> tuple[str, ...]:
    """Return where the kernel shows what is no file: any one of these will do. Nothing for what it does not show."""
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
    """Yield where a resource partition may be: with systemd a slice, without it a directory (docs/cgroups.rst)."""
    parts = [part for part in partition.split("/") if part]
    slices = ["-".join(parts[: number + 1]) + ".slice" for number in range(len(parts))]
    plain = [f"{part}.partition" for part in parts]
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/systemd"):
        yield from (posixpath.join(root, *names) for names in (slices, plain, parts))


def claim(reference: Reference) -> str:
    """Return what tells one thing that two VMs of a host cannot share from every other."""
    if reference.is_path:
        return plain_path(reference.value)
    return f"{reference.kind} {reference.value}"


def is_claim(reference: Reference) -> bool:
    """Whether two VMs that run on one host cannot share what the reference names."""
    return reference.role in (Role.EXCLUSIVE, Role.PIPE) or (reference.made and reference.is_path)


def plain_path(path: str) -> str:
    """Return the path without what does not count: /var/run is /run everywhere."""
    plain = posixpath.normpath(path)
    for old, new in (("/var/run/", "/run/"), ("/var/lock/", "/run/lock/")):
        if plain.startswith(old):
            return new + plain.removeprefix(old)
    return plain


def parse_set(text: str | None) -> frozenset[int] | None:
    """Return the numbers of a set such as 0-3,5,^2; None for what is none."""
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


def resources(answer: Mapping[str, Any]) -> Resources:
    """From the agent's answer to `resources`."""
    return Resources(
        {int(size): HugePages(*counts) for size, counts in answer["hugepages"].items()},
        answer["default_hugepage"],
        answer["hugetlbfs"],
        parse_set(answer["nodes"]),
        parse_set(answer["cpus"]),
        frozenset(answer["usb"]),
        answer["addresses"],
    )
