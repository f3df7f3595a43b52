"""Our marks in a domain's <metadata>: where a clone came from, and its state when we had finished. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from kvm_clone.definition.domain_xml import parse
from kvm_clone.definition.spans import escape

NAMESPACE = "https://kvm-clone.org/xmlns/clone/1"
SEAL_NAMESPACE = "https://kvm-clone.org/xmlns/replica/1"
PENDING_NAMESPACE = "https://kvm-clone.org/xmlns/pending/1"
"""Each mark has its own namespace: libvirt keeps one element of each, and can set each by itself."""


@dataclass(frozen=True)
class Provenance:
    """The ownership mark in a clone's <metadata>: what made it, and from what.

    `uuid` is the clone's own: a copy of the clone by another tool carries the mark, but another UUID. `macs`: pairs of
    the source's and the clone's addresses. `consistency`: of the point in time that was copied; `frozen`: seconds that
    the guest was frozen for it; `scratch`: bytes that its backup job took. `checkpoint`: the source's, since which
    a dirty bitmap names what has changed.
    """

    operation: str
    uuid: str
    source_host: str
    source_uuid: str
    source_name: str
    fingerprint: str
    version: str
    created: str
    verified: bool
    macs: str = ""
    consistency: str = ""
    frozen: str = ""
    scratch: str = ""
    checkpoint: str = ""

    @property
    def mac_pairs(self) -> dict[str, str]:
        """The clone's addresses by the source's."""
        return dict(pair.split("=", 1) for pair in self.macs.split() if "=" in pair)


_ALWAYS = frozenset(part.name for part in fields(Provenance) if part.default is MISSING)
"""What every mark has: an incomplete one proves nothing."""


@dataclass(frozen=True)
class Seal:
    """The state of a clone when it was finished, by which it is known whether it was used or changed since.

    `definition`: see `definition_digest`. `images`: each disk's fingerprint, by its target.
    """

    definition: str
    images: Mapping[str, str]


@dataclass(frozen=True)
class Pending:
    """What the commit of an operation left to be done, for the run that finishes it.

    It is kept in libvirt's definition, which only those can write who may remove anything on the host; others may write
    where a journal lies. `remove`: files that only the replaced VM had. `contents`: inode, size and mtime of each at
    the commit, since another file may get its path. `forget`: snapshots and checkpoints that it had.
    """

    operation: str
    remove: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    contents: Mapping[str, str] = field(default_factory=dict)


def read_pending(xml: str) -> Pending | None:
    """Return what is left to be done, or None when nothing is. Raises RefusedError when `xml` is no domain's."""
    _, domain, _ = parse(xml)
    node = domain.find("metadata", f"{PENDING_NAMESPACE} pending")
    if node is None:
        return None
    remove, forget = (
        tuple(one.text for one in node.find_all(f"{PENDING_NAMESPACE} {tag}")) for tag in ("remove", "forget")
    )
    removed = node.find_all(f"{PENDING_NAMESPACE} remove")
    contents = {one.text: one.attributes["content"] for one in removed if "content" in one.attributes}
    return Pending(node.attributes.get("operation", ""), remove, forget, contents)


def pending_markup(pending: Pending) -> str:
    """Return the element as libvirt would print it."""
    known = {path: f' content="{escape(said, quote=chr(34))}"' for path, said in pending.contents.items()}
    written = [("remove", path, known.get(path, "")) for path in pending.remove]
    written += [("forget", name, "") for name in pending.forget]
    inner = "".join(
        f"<kvm-clone-pending:{tag}{said}>{escape(text)}</kvm-clone-pending:{tag}>" for tag, text, said in written
    )
    opening = f'kvm-clone-pending:pending xmlns:kvm-clone-pending="{PENDING_NAMESPACE}"'
    return f'<{opening} operation="{escape(pending.operation, quote=chr(34))}">{inner}</kvm-clone-pending:pending>'


def read_provenance(xml: str) -> Provenance | None:
    """Return the ownership mark; None when there is none, or an incomplete one.

    Raises RefusedError when `xml` is no domain's.
    """
    _, domain, _ = parse(xml)
    mark = domain.find("metadata", f"{NAMESPACE} clone")
    if mark is None:
        return None
    values: dict[str, Any] = {}
    for part in fields(Provenance):
        values[part.name] = mark.attributes.get(part.name.replace("_", "-"), part.default)
    if MISSING in values.values():
        return None
    return Provenance(**{**values, "verified": values["verified"] == "yes"})


def read_seal(xml: str) -> Seal | None:
    """Return the seal, or None when there is none. Raises RefusedError when `xml` is no domain's."""
    _, domain, _ = parse(xml)
    seal = domain.find("metadata", f"{SEAL_NAMESPACE} replica")
    if seal is None:
        return None
    found = [image.attributes for image in seal.find_all(f"{SEAL_NAMESPACE} image")]
    images = {one.get("target", ""): one.get("fingerprint", "") for one in found}
    return Seal(seal.attributes.get("definition", ""), images)


def definition_digest(xml: str) -> str:
    """Return a digest of everything in the definition but its name and our own marks.

    Raises RefusedError when `xml` is no domain's.
    """
    document, domain, name = parse(xml)
    document.replace(name, "")
    metadata = domain.find("metadata")
    ours = [node for node in metadata.children if _is_ours(node.tag)] if metadata else []
    if metadata and len(ours) == len(metadata.children):
        document.replace(metadata, "")
    else:
        for node in ours:
            document.replace(node, "")
    return hashlib.sha256(re.sub(r">\s+<", "><", document.result()).encode()).hexdigest()[:32]


def _is_ours(tag: str) -> bool:
    return tag.startswith((f"{NAMESPACE} ", f"{SEAL_NAMESPACE} ", f"{PENDING_NAMESPACE} "))


def seal_markup(seal: Seal) -> str:
    """Return the element that `virDomainSetMetadata` takes."""
    images = "".join(
        f'<image target="{escape(target, quote=chr(34))}" fingerprint="{escape(text, quote=chr(34))}"/>'
        for target, text in sorted(seal.images.items())
    )
    return f'<replica definition="{seal.definition}">{images}</replica>'


def mark_markup(provenance: Provenance) -> str:
    """Return the element as libvirt would print it."""
    values = {**asdict(provenance), "verified": "yes" if provenance.verified else "no"}
    written = [
        f'{name.replace("_", "-")}="{escape(value, quote=chr(34))}"'
        for name, value in values.items()
        if value or name in _ALWAYS
    ]
    return f'<kvm-clone:clone xmlns:kvm-clone="{NAMESPACE}" {" ".join(written)}/>'
