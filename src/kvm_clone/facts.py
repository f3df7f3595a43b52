"""What a plan rests on: both hosts as they are before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvm_clone.definition import DomainXml
from kvm_clone.domains import Domain, Pool


@dataclass(frozen=True)
class HostFacts:
    """A host's tools; None for one that is missing."""

    name: str
    hostname: str
    python: str
    qemu_img: str | None
    qemu_nbd: str | None


@dataclass(frozen=True)
class ImageFacts:
    """One disk's image file. Sizes in bytes; `data` is how much of it has to be sent.

    `error` says why nothing is known; `in_use` that another process writes it.
    """

    target: str
    path: str
    format: str
    error: str = ""
    in_use: bool = False
    regular: bool = True
    virtual_size: int = 0
    allocated: int = 0
    data: int = 0
    mode: int = 0o600
    user: str = "root"
    group: str = "root"
    fingerprint: str = ""
    backing: str = ""
    data_file: str = ""
    encrypted: bool = False
    corrupt: bool = False
    snapshots: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Directory:
    """A directory at the destination; `names` are its entries."""

    path: str
    exists: bool
    writable: bool
    free: int
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SourceFacts:
    """The VM at the source."""

    host: HostFacts
    domain: Domain
    xml: DomainXml
    images: tuple[ImageFacts, ...]


@dataclass(frozen=True)
class DestinationFacts:
    """The destination.

    `domains`: its VMs' UUIDs by name. `directories`: those that disks may land in, by path. `present`: whether each
    path that the definition refers to is there.
    """

    host: HostFacts
    domains: Mapping[str, str]
    pools: tuple[Pool, ...]
    directories: Mapping[str, Directory]
    present: Mapping[str, bool]


@dataclass(frozen=True)
class RouteFacts:
    """Whether the source host can reach the destination itself, and if not, why."""

    direct: bool
    reason: str


@dataclass(frozen=True)
class Facts:
    """Everything a plan looks at."""

    source: SourceFacts
    destination: DestinationFacts
    route: RouteFacts


_QCOW2_OPTIONS = {
    "compat": "compat",
    "compression-type": "compression_type",
    "extended-l2": "extended_l2",
    "lazy-refcounts": "lazy_refcounts",
    "refcount-bits": "refcount_bits",
}
"""What `qemu-img info` calls a qcow2 feature, and what `qemu-img create -o` calls it."""

_DEFAULTS = {"compression_type": "zlib", "extended_l2": "off", "lazy_refcounts": "off"}
"""Left out of `-o`: older images and tools do not know these options."""


def host_facts(name: str, answer: Mapping[str, Any]) -> HostFacts:
    """From the agent's answer to `host`."""
    return HostFacts(name, answer["hostname"], answer["python"], answer["qemu_img"], answer["qemu_nbd"])


def image_facts(target: str, path: str, format_: str, answer: Mapping[str, Any]) -> ImageFacts:
    """From the agent's answer to `disk`."""
    if "error" in answer:
        return ImageFacts(target, path, format_, error=answer["error"], in_use=answer.get("in_use", False))
    image = answer.get("image", {})
    specific = image.get("format-specific", {}).get("data", {})
    return ImageFacts(
        target,
        path,
        format_,
        regular=answer["regular"],
        virtual_size=answer["virtual_size"],
        allocated=answer["allocated"],
        data=answer["data"],
        mode=answer["mode"],
        user=answer["user"],
        group=answer["group"],
        fingerprint=answer["fingerprint"],
        backing=image.get("backing-filename", ""),
        data_file=specific.get("data-file", ""),
        encrypted=bool(image.get("encrypted", False)),
        corrupt=bool(specific.get("corrupt", False)),
        snapshots=tuple(snapshot["name"] for snapshot in image.get("snapshots", [])),
        options=tuple(sorted(_options(image, specific).items())),
    )


def _options(image: Mapping[str, Any], specific: Mapping[str, Any]) -> dict[str, str]:
    if not specific:
        return {}
    options = {"cluster_size": str(image["cluster-size"])}
    for theirs, ours in _QCOW2_OPTIONS.items():
        if theirs in specific:
            value = specific[theirs]
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            if text != _DEFAULTS.get(ours):
                options[ours] = text
    return options
