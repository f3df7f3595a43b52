"""What a VM owns and what has to travel with it, and where each such thing lands. Pure."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any, Protocol

from kvm_clone.image import Image
from kvm_clone.planning.facts import StagedDisk

DIRECTORY = "directory"
"""The kind of store whose assets are files: under a staged name first, then under the final one beside it."""


@dataclass(frozen=True)
class Place:
    """Where an asset lands.

    `container`: what the store calls the part of it where the asset lies: a directory, or a pool. `name`: the asset's
    final name there. `store`: the kind of store.
    """

    container: str
    name: str
    store: str = DIRECTORY

    @classmethod
    def of_file(cls, path: str) -> Place:
        """Return the place of the file with this final path."""
        return cls(*posixpath.split(path))

    @property
    def path(self) -> str:
        """The path by which libvirt and QEMU open the asset once it is published."""
        return posixpath.join(self.container, self.name)

    def beside(self, name: str) -> Place:
        """Return the place of that name in the same container."""
        return Place(self.container, name, self.store)


class Asset(Protocol):
    """One thing that a VM owns and that has to travel with it.

    Each asset is created under a staged name, filled, proven equal, published under its final name, and part of the VM
    from the commit on; before the commit it can be removed at any time. Nothing but planning knows what kind of thing
    it is.
    """

    @property
    def key(self) -> str:
        """What identifies it within its VM, in journals and in results: a disk's target such as vda."""

    @property
    def source(self) -> Image:
        """Its image at the source."""

    @property
    def size(self) -> int:
        """Bytes that the guest sees."""

    @property
    def data(self) -> int:
        """Bytes of content at the source, a guess while a VM writes to it."""

    @property
    def fingerprint(self) -> str:
        """What changes when the source's image is written, as it was at the inspection: see agent.disks.fingerprint."""

    @property
    def place(self) -> Place:
        """Where it lands at the destination."""

    @property
    def base(self) -> Image | None:
        """The older state at the destination that is brought up to date; None for an asset that is copied whole."""

    @property
    def below(self) -> Image | None:
        """The image that the new one is an overlay on until both are merged."""

    @property
    def fine(self) -> bool:
        """Whether an overlay takes no more room than what is written to it, instead of whole clusters."""

    @property
    def staged(self) -> StagedDisk | None:
        """What an interrupted attempt has of it."""

    @property
    def spec(self) -> dict[str, Any]:
        """How the agent creates the staged image: its format, size, owner, and what it rests on or is a copy of."""

    def at(self, path: str) -> Image:
        """Return the new image as it is opened under this path, its staged or its final one."""
