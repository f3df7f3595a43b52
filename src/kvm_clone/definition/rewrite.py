"""Domain definitions: libvirt's XML rewritten for the clone.

Pure: text in, text out. Only libvirt's own elements, which are in no namespace, are changed, and our mark.
"""

from __future__ import annotations

import posixpath
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kvm_clone.definition import variables
from kvm_clone.definition.domain_xml import macs_of, parse
from kvm_clone.definition.marks import (
    NAMESPACE,
    PENDING_NAMESPACE,
    SEAL_NAMESPACE,
    Pending,
    Provenance,
    mark_markup,
    pending_markup,
)
from kvm_clone.definition.references.walk import places
from kvm_clone.definition.spans import Document, Node, escape
from kvm_clone.definition.volumes import Locations, Volume, is_path_or_volume, named_by, set_source
from kvm_clone.errors import RefusedError
from kvm_clone.image import Image


@dataclass(frozen=True)
class Change:
    """What differs between a source's definition and its clone's; None keeps what is there.

    `new_macs` has one entry for each of `DomainXml.macs`, in the same order. `disk_paths` maps a disk's
    target ("vda") to the file it gets, `disk_formats` to that one's format where it is not the source's, and
    `disk_bases` to the image that it rests on; `disk_volumes` to the pool and volume that the file is, by which a disk
    is named whose definition names it so already. `new_genid` replaces a generation ID, where there is one.
    `host_paths`: new paths of logs and sockets by their old ones. `variables`: the file of the UEFI variables.
    `pending`: what the commit leaves to be done.
    """

    new_name: str
    provenance: Provenance
    new_uuid: str | None = None
    new_macs: tuple[str, ...] | None = None
    disk_paths: Mapping[str, str] = field(default_factory=dict)
    disk_formats: Mapping[str, str] = field(default_factory=dict)
    disk_bases: Mapping[str, Image] = field(default_factory=dict)
    disk_volumes: Mapping[str, Volume] = field(default_factory=dict)
    new_genid: str | None = None
    host_paths: Mapping[str, str] = field(default_factory=dict)
    variables: Image | None = None
    pending: Pending | None = None


def new_mac(source: random.Random) -> str:
    """Return a random MAC address with the prefix that QEMU's and libvirt's own have."""
    return "52:54:00:" + source.randbytes(3).hex(":")


def rewrite(xml: str, change: Change) -> str:
    """Return the definition with `change` made, and every other byte as it was.

    Raises RefusedError when `xml` is no domain's, when `change` names a disk that is without a file or has
    another number of MACs than the domain, or when a value cannot stand in XML.
    """
    document, domain, name = parse(xml)
    document.set_text(name, change.new_name)
    if change.new_uuid is not None:
        _set_uuid(document, domain, name, change.new_uuid)
    if change.new_macs is not None:
        _set_macs(document, domain, change.new_macs)
    if change.new_genid is not None:
        _set_genid(document, domain, change.new_genid)
    _set_disks(document, domain, change)
    _set_host_paths(document, domain, change.host_paths)
    if change.variables is not None:
        variables.set_path(document, domain, change.variables.path, change.variables.format)
    _set_marks(document, domain, name, change)
    return document.result()


def _set_uuid(document: Document, domain: Node, name: Node, new: str) -> None:
    uuid = domain.find("uuid")
    old = uuid.text if uuid else ""
    if _same_uuid(old, new):
        return
    if uuid:
        document.set_text(uuid, new)
    else:
        document.insert_after(name, f"{document.margin(name)}<uuid>{escape(new)}</uuid>")
    # libvirt refuses a domain whose SMBIOS UUID is another than its own.
    for entry in domain.find_all("sysinfo", "system", "entry"):
        if entry.attributes.get("name") == "uuid" and (not old or _same_uuid(entry.text, old)):
            document.set_text(entry, new)


def _same_uuid(one: str, other: str) -> bool:
    """Compare as libvirt does, for which hyphens and case do not count."""
    return one.replace("-", "").strip().lower() == other.replace("-", "").strip().lower()


def _set_macs(document: Document, domain: Node, new: tuple[str, ...]) -> None:
    macs = macs_of(domain)
    if len(macs) != len(new):
        raise RefusedError(f"The domain has {len(macs)} MAC addresses, and {len(new)} new ones were given.")
    for mac, address in zip(macs, new, strict=True):
        document.set_attribute(mac, "address", address)


def _set_genid(document: Document, domain: Node, new: str) -> None:
    """Give the guest a new generation ID, which shows it that it is a copy; libvirt fills an empty element itself."""
    genid = domain.find("genid")
    if genid and genid.text.strip():
        document.set_text(genid, new)


def _set_host_paths(document: Document, domain: Node, new: Mapping[str, str]) -> None:
    """Give the VM's own logs and sockets their new paths, wherever the definition names them."""
    for place in places(domain) if new else ():
        if place.reference.is_renamed and place.reference.value in new:
            if place.attribute is None:
                document.set_text(place.node, new[place.reference.value])
            else:
                document.set_attribute(place.node, place.attribute, new[place.reference.value])


def _set_disks(document: Document, domain: Node, change: Change) -> None:
    missing = set(change.disk_paths)
    for disk in domain.find_all("devices", "disk"):
        target, source = disk.find_attributes("target").get("dev", ""), disk.find("source")
        if target in change.disk_paths and source and is_path_or_volume(disk):
            missing.discard(target)
            set_source(document, disk, source, change.disk_paths[target], change.disk_volumes.get(target))
            if target in change.disk_formats:
                _set_format(document, disk, source, change.disk_formats[target])
            if target in change.disk_bases or disk.find("backingStore", "source"):
                _set_base(document, disk, source, change.disk_bases.get(target))
    if missing:
        raise RefusedError(f"The domain has no disk with a file or device as {', '.join(sorted(missing))}.")


def merge_down(xml: str, bases: Mapping[str, Image], volumes: Locations = MappingProxyType({})) -> str:
    """Return the definition with each disk whose file is a key of `bases` on that base, beside it, instead.

    `volumes`: where the volumes are that it names.

    Raises RefusedError when `xml` is no domain's.
    """
    document, domain, _ = parse(xml)
    for disk in domain.find_all("devices", "disk"):
        source, volume = disk.find("source"), named_by(disk)
        located = volumes.get(volume) if volume is not None else None
        base = bases.get(located.path if located is not None else disk.find_attributes("source").get("file", ""))
        if source and base:
            beside = replace(volume, name=posixpath.basename(base.path)) if volume is not None else None
            set_source(document, disk, source, base.path, beside)
            _set_format(document, disk, source, base.format)
            _set_base(document, disk, source, None)
    return document.result()


def _set_format(document: Document, disk: Node, source: Node, format_: str) -> None:
    driver = disk.find("driver")
    if driver is None:
        document.insert_after(source, f"{document.margin(source)}<driver name='qemu' type='{escape(format_)}'/>")
    elif "type" in driver.attributes:
        document.set_attribute(driver, "type", format_)
    elif format_ != "raw":  # libvirt takes a missing one for raw
        kept = "".join(f' {name}="{escape(value, quote=chr(34))}"' for name, value in driver.attributes.items())
        document.replace(driver, f'<driver{kept} type="{escape(format_)}"/>')


def _set_base(document: Document, disk: Node, source: Node, base: Image | None) -> None:
    """Write what the disk's image rests on, in place of what the definition says of it, if anything."""
    for node in disk.children:
        if node.tag == "backingStore":
            document.replace(node, "")
    if base is not None:
        path = escape(base.path, quote='"')
        chain = f'<format type="{escape(base.format)}"/><source file="{path}"/><backingStore/>'
        document.insert_after(source, f'{document.margin(source)}<backingStore type="file">{chain}</backingStore>')


def _set_marks(document: Document, domain: Node, name: Node, change: Change) -> None:
    mark = mark_markup(change.provenance) + (pending_markup(change.pending) if change.pending else "")
    metadata = domain.find("metadata")
    if metadata is None:
        anchor = domain.find("uuid") or name
        outer = document.margin(anchor)
        document.insert_after(anchor, f"{outer}<metadata>{_deeper(outer)}{mark}{outer}</metadata>")
        return
    ours = [node for node in metadata.children if node.tag.startswith(f"{NAMESPACE} ")]
    if not ours:
        outer = document.margin(metadata)
        inner = document.margin(metadata.children[-1]) if metadata.children else _deeper(outer)
        document.append(metadata, inner + mark, closing=outer)
    # One mark only: libvirt keeps one element of a namespace.
    for index, node in enumerate(ours):
        document.replace(node, "" if index else mark)
    for node in metadata.children:
        if node.tag.startswith((f"{SEAL_NAMESPACE} ", f"{PENDING_NAMESPACE} ")):  # the source may be a clone itself
            document.replace(node, "")


def _deeper(margin: str) -> str:
    """Return the margin below a child of <domain>, whose own margin is one step."""
    return margin + margin.lstrip("\r\n")
