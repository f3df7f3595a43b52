"""What a VM's definition names of its host: the files that must not be taken for unused. Pure.

More is named here than a VM can use: a path that is none of a file does no harm, one that is overlooked costs a disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvm_clone.agent.host import uses
from kvm_clone.definition import variables
from kvm_clone.definition.spans import Document, Node

_CHAIN = ("backingStore", "mirror", "dataStore")
"""Elements that are built like a disk, within one."""

_ELSEWHERE = ("network", "nvme", "vhostuser", "vhostvdpa")
"""Types of disk that are no file of the host."""

_PATH = re.compile(r"""/(?:[^,\s"']|,,)+""")
"""A path within a word of a command line; QEMU doubles the commas in it."""


@dataclass(frozen=True)
class Owner:
    """The VM that names something. One without UUID stands for libvirt itself."""

    name: str
    uuid: str = ""

    def __str__(self) -> str:
        return f"VM {self.name}" if self.uuid else self.name


@dataclass(frozen=True)
class Claim:
    """A file, an image with what it rests on, or a directory that a VM names; see agent.host.uses. `by`: the VM."""

    by: Owner
    kind: str
    path: str
    format: str = ""

    def as_list(self) -> list[str]:
        """Return the claim as the agent takes it."""
        return [str(self.by), self.kind, self.path, self.format]


@dataclass(frozen=True)
class VolumeClaim:
    """An image that a VM names by a storage pool and a volume: the host's libvirt resolves it to a path."""

    by: Owner
    pool: str
    volume: str
    format: str


def claims_of(xml: str, by: Owner) -> Iterator[Claim | VolumeClaim]:
    """Yield everything that the XML of a domain, a snapshot or a saved state names.

    Raises RefusedError when the XML is malformed.
    """
    root = Document(xml).root
    yield from _below(root, by)
    chosen = variables.read(root) if root.tag == "domain" else None
    if chosen is not None and not chosen.path:  # libvirt does not say which
        yield from (Claim(by, uses.FILE, path) for path in chosen.paths(by.name))


def _below(node: Node, by: Owner) -> Iterator[Claim | VolumeClaim]:
    for child in node.children:
        if child.tag == "metadata" and node.tag in ("domain", "inactiveDomain"):
            continue  # belongs to other tools
        if child.tag == "disk":
            yield from _disk(child, by)
        elif child.tag == "filesystem":
            yield from _filesystem(child, by)
        elif " " in child.tag:  # in a namespace: QEMU's command line, above all
            yield from _foreign(child, by)
        else:
            yield from _paths(child, by)
            yield from _below(child, by)


def _disk(disk: Node, by: Owner) -> Iterator[Claim | VolumeClaim]:
    format_ = disk.find_attributes("driver").get("type", "raw")
    if "snapshot" in disk.attributes and disk.find("driver") is None:  # in a snapshot: the file that was begun
        format_ = ""
    yield from _layer(disk, disk.attributes.get("type", "file"), format_, by)


def _layer(layer: Node, kind: str, format_: str, by: Owner) -> Iterator[Claim | VolumeClaim]:
    """Yield one image of a disk, and those that the definition names below it or beside it."""
    source = layer.find("source")
    if source is not None:
        yield from _source(source, kind, format_, by)
    if layer.tag == "mirror" and layer.attributes.get("file"):
        yield Claim(by, uses.IMAGE, layer.attributes["file"], format_)
    inner = [*layer.children, *(source.children if source else [])]
    for child in inner:
        if child.tag in _CHAIN:
            below = child.find_attributes("format").get("type") or child.attributes.get("format", "")
            yield from _layer(child, child.attributes.get("type", "file"), below, by)
        elif child is not source:
            yield from _paths(child, by)
            yield from _below(child, by)


def _source(source: Node, kind: str, format_: str, by: Owner) -> Iterator[Claim | VolumeClaim]:
    at = source.attributes
    if kind == "volume":
        yield VolumeClaim(by, at.get("pool", ""), at.get("volume", ""), format_)
    elif kind == "dir":
        yield Claim(by, uses.TREE, at.get("dir", ""))
    elif kind in ("file", "block"):
        path = at.get("file") or at.get("dev")
        if path:
            yield Claim(by, uses.IMAGE, path, format_)
    elif kind not in _ELSEWHERE:
        yield Claim(by, uses.DOUBT, f"a disk of the type {kind} is not understood here")


def _filesystem(node: Node, by: Owner) -> Iterator[Claim | VolumeClaim]:
    """Yield a directory of the host that is shared with the guest as a whole."""
    shared = node.find_attributes("source").get("dir")
    if shared:
        yield Claim(by, uses.TREE, shared)
    for child in node.children:
        yield from _paths(child, by)
        yield from _below(child, by)


def _paths(node: Node, by: Owner) -> Iterator[Claim]:
    """Yield the absolute paths in an element's attributes and text."""
    for text in (*node.attributes.values(), node.text.strip()):
        if text.startswith("/"):
            yield Claim(by, uses.FILE, text)


def _foreign(node: Node, by: Owner) -> Iterator[Claim]:
    """Yield what an element of another namespace names: images on QEMU's command line are unknown to libvirt."""
    for inner in (node, *node.walk()):
        for text in (*inner.attributes.values(), inner.text.strip()):
            for path in sorted(_named_in(text)):
                yield Claim(by, uses.IMAGE, path)


def _named_in(word: str) -> set[str]:
    """Return the paths in a word of a command line: after a key, in JSON, or anywhere else."""
    found = {match.replace(",,", ",") for match in _PATH.findall(word)}
    for part in re.split(r"(?<!,),(?!,)", word):
        value = part.partition("=")[2] if "=" in part else part
        found |= {value.replace(",,", ",")} if value.startswith("/") else set()
    try:
        found |= set(_strings(json.loads(word)))
    except (ValueError, RecursionError):  # no JSON
        return found
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith("/"):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
