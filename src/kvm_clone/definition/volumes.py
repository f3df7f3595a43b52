"""Disks that a definition names by storage pool and volume. Pure: the host's libvirt says where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvm_clone.definition.spans import Document, Node


@dataclass(frozen=True)
class Volume:
    """A volume of a storage pool, by their names."""

    pool: str
    name: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.name}"


@dataclass(frozen=True)
class Located:
    """Where a volume is: its path, and the type of disk that it makes there ("file", "block", …)."""

    path: str
    type: str


Locations = Mapping[Volume, Located]
"""Where the volumes are that a definition names, of those that are there."""


def volumes_of(xml: str) -> Iterator[Volume]:
    """Yield each volume that a disk of the definition, or an image below one, names.

    Raises RefusedError when the XML is malformed.
    """
    for disk in Document(xml).root.find_all("devices", "disk"):
        for node in (disk, *disk.walk()):
            volume = named_by(node)
            if volume is not None:
                yield volume


def named_by(layer: Node) -> Volume | None:
    """Return the volume that a disk or backing store is, None for one of another type."""
    source = layer.find_attributes("source")
    if layer.attributes.get("type") == "volume" and source.get("pool") and source.get("volume"):
        return Volume(source["pool"], source["volume"])
    return None


def is_path_or_volume(disk: Node) -> bool:
    """Whether the disk is named by a path, of a file or a device, or is a volume: it can become a file then."""
    kind, source = disk.attributes.get("type", "file"), disk.find_attributes("source")
    key = {"file": "file", "block": "dev"}.get(kind, "")
    return named_by(disk) is not None or key in source


def set_source(document: Document, disk: Node, source: Node, path: str, volume: Volume | None) -> None:
    """Make the disk's source the file at `path`: by its pool and name if it has a `volume` and the disk is one.

    What else the source says, its children and attributes such as startupPolicy, stays.
    """
    if named_by(disk) is not None and volume is not None:
        document.set_attribute(source, "pool", volume.pool)
        document.set_attribute(source, "volume", volume.name)
        return
    if "file" in source.attributes:
        document.set_attribute(source, "file", path)
        return
    others = {key: value for key, value in source.attributes.items() if key not in ("pool", "volume", "mode", "dev")}
    document.set_attributes(source, {"file": path, **others})
    if "type" in disk.attributes:
        document.set_attribute(disk, "type", "file")
