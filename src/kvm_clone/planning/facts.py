"""What a plan is made from: both hosts as they are before anything is written. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvm_clone.agent.disks import fingerprint
from kvm_clone.definition import variables
from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.definition.marks import Pending, Provenance, Seal, definition_digest, read_pending
from kvm_clone.definition.references import Reference
from kvm_clone.image import Image
from kvm_clone.planning.domain_facts import Abilities, Domain, Live, Pool
from kvm_clone.planning.identity import HostIdentity, same_host
from kvm_clone.planning.things import Things


@dataclass(frozen=True)
class HostFacts:
    """A host and its tools' versions, None for a tool that it lacks. `clock`: its time less ours, in seconds.

    `locks`: why operations cannot be locked there, nothing where they can.
    """

    name: str
    hostname: str
    python: str
    qemu_img: str | None
    qemu_nbd: str | None
    clock: float = 0.0
    identity: HostIdentity = field(default_factory=HostIdentity)
    locks: str = ""


@dataclass(frozen=True)
class ImageFacts(Image):
    """What the inspection found out about one disk's image file. Sizes are in bytes.

    `target`: the guest's name for the disk, empty for an image that was looked at by its path alone. `data`: how
    much has to be sent, which is a guess while a VM writes to it, and all of a raw device. `stored`: what a fresh copy
    takes where that is less than `data`, since compressed clusters stay compressed; else 0. `error`: why nothing is
    known. `in_use`: another process writes to it. `regular`, `device`: it is a file, a block device. `fingerprint`: of
    the image with all that it rests on, see agent/disks/fingerprint.py.
    """

    target: str = field(default="", kw_only=True)
    error: str = ""
    in_use: bool = False
    regular: bool = True
    device: bool = False
    virtual_size: int = 0
    allocated: int = 0
    data: int = 0
    mode: int = 0o600
    user: str = "root"
    group: str = "root"
    fingerprint: str = ""
    data_file: str = ""
    encrypted: bool = False
    corrupt: bool = False
    snapshots: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    stored: int = 0

    @property
    def fresh(self) -> int:
        """Bytes that a fresh copy of it takes."""
        return self.stored or self.data


@dataclass(frozen=True)
class FilesystemAbilities:
    """What the filesystem of a directory can do, as it was tried there: see agent/disks/filesystem.py.

    `naming`: how a file gets its final name without replacing another, nothing where there is no way. `largest`: the
    most bytes of a file. `direct`: whether files can be opened past the page cache. `any_name`: whether a name may have
    any character. `folds`: whether names that differ in case alone are the same. `trouble`: why no file can be made.
    """

    naming: str = "link"
    owners: bool = True
    modes: bool = True
    sparse: bool = True
    largest: int = (1 << 63) - 1
    direct: bool = True
    any_name: bool = True
    folds: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class Directory:
    """A directory where disks or scratch files may land.

    `names`: its entries with the beginnings that were asked for. `more`: there are too many of them to list. `free`:
    bytes. `inodes`: how many files its filesystem has room for. `filesystem`: the device's number. `reflink`: whether
    files there can share blocks. `longest`: the most bytes of a name.
    """

    path: str
    exists: bool
    writable: bool
    free: int
    names: frozenset[str] = frozenset()
    more: bool = False
    inodes: int = 1 << 40
    filesystem: int = 0
    reflink: bool = False
    longest: int = 255
    abilities: FilesystemAbilities = field(default_factory=FilesystemAbilities)

    def same(self, path: str) -> str:
        """Return the same text for all paths of one file here, where names that differ in case may be the same."""
        return path.casefold() if self.abilities.folds else path


@dataclass(frozen=True)
class SourceFacts:
    """The VM at the source.

    `live`: its running state, None when it does not run. `directories`: where a backup job's scratch files may lie.
    `reader`: the operation that copies it by a backup job, if there is one. `libvirt`: the version, see Abilities.
    `files`: the fingerprints of all files that it uses as disks or media, by path. `references`: what the definition
    refers to, its own disks left out. `things`: what the source has of these. `images`: of its disks, and the file of
    its UEFI variables, if there is one.
    """

    host: HostFacts
    domain: Domain
    xml: DomainXml
    images: tuple[ImageFacts, ...]
    live: Live | None = None
    directories: Mapping[str, Directory] = field(default_factory=dict)
    reader: str = ""
    libvirt: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    references: tuple[Reference, ...] = ()
    things: Things = field(default_factory=Things)

    @property
    def disk_images(self) -> tuple[ImageFacts, ...]:
        """The disks' images, without the file of UEFI variables."""
        return tuple(image for image in self.images if image.target != variables.KEY)

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the definition or a disk may have changed; no disk is read for it."""
        xml = hashlib.sha256(self.domain.xml.encode()).hexdigest()[:16]
        return ";".join([f"xml={xml}", *(f"{image.target}={image.fingerprint}" for image in self.images)])


def files_in(fingerprint: str) -> dict[str, str]:
    """Return the files' fingerprints that a source's fingerprint has, by the disks' targets."""
    return dict(part.split("=", 1) for part in fingerprint.split(";")[1:] if "=" in part)


@dataclass(frozen=True)
class Existing:
    """The VM of the wanted name that the destination has.

    `mark`: our mark, if it is this VM's own. `whole`: its disks are there. `removable`: the files that are known to be
    its alone. `kept`: its other files, each with the reason why it is not removed. `seal`: its state when our last
    operation had finished. `images`: its disks' files, for a sync only. `files`: the fingerprints of its own disks'
    files, by path.
    """

    domain: Domain
    xml: DomainXml
    mark: Provenance | None
    whole: bool
    removable: tuple[str, ...]
    seal: Seal | None = None
    images: tuple[ImageFacts, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def pending(self) -> Pending | None:
        """What the operation that committed it left to be done."""
        return read_pending(self.domain.xml)

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of its snapshots and checkpoints."""
        return (*self.domain.snapshots, *self.domain.checkpoints)

    @property
    def variables(self) -> tuple[str, ...]:
        """Where the file of its UEFI variables can be."""
        return self.xml.variables.paths(self.domain.name) if self.xml.variables is not None else ()

    @property
    def unused(self) -> bool:
        """Whether nobody has used or changed it since our last operation had finished, as far as the seal shows."""
        if self.seal is None or self.domain.managed_save:
            return False
        return self.disks_untouched and definition_digest(self.domain.xml) == self.seal.definition

    @property
    def disks_untouched(self) -> bool:
        """Whether its disks are as they were when our last operation had finished, as far as the seal shows.

        The ctime counts too: it changes when a file is written and its mtime then set back, and when a VM is started on
        the file.
        """
        if self.seal is None or not self.whole:
            return False
        prints = {disk.target: self.files.get(disk.path or "", "") for disk in self.xml.own_disks}
        for path in self.variables:
            if path in self.files:
                prints[variables.KEY] = self.files[path]
        prints.update({image.target: image.fingerprint for image in self.images})  # taken under a lock
        now = {target: fingerprint.whole(text) for target, text in prints.items()}
        return all(now.values()) and now == {
            target: fingerprint.whole(text) for target, text in self.seal.images.items()
        }


@dataclass(frozen=True)
class StagedDisk:
    """One disk of an interrupted attempt. Sizes are in bytes.

    `durable`: how much content is durable. `data`: how much content the file itself has. `ranges`: which those durable
    bytes are; empty for the first ones.
    """

    part: str
    final: str
    format: str
    size: int
    durable: int
    allocated: int
    backing: str = ""
    data: int = 0
    ranges: Sequence[Sequence[int]] = ()

    @property
    def durable_ranges(self) -> tuple[tuple[int, int], ...]:
        """The [start, end) pairs whose content is durable, in order and apart."""
        return tuple((start, end) for start, end in self.ranges or ((0, self.durable),) if start < end)


@dataclass(frozen=True)
class Staged:
    """An interrupted or running attempt to make the VM of the wanted name, from its journal.

    `holder`: the process that runs it, nothing for an interrupted one. `defining`: libvirt may have the definition.
    `remove`, `forget`: files and snapshots of the VM that it replaces. `kind`: clone or sync. `published`: the files
    that have their final names already. `in_use`: the published files that something uses. `foreign`: the other host
    that it belongs to, which sees the same directory.
    """

    directory: str
    operation: str
    source_uuid: str
    source_name: str
    defining: bool
    committed: bool
    remove: tuple[str, ...]
    forget: tuple[str, ...]
    disks: Mapping[str, StagedDisk]
    holder: str = ""
    kind: str = "clone"
    published: tuple[str, ...] = ()
    foreign: str = ""
    in_use: tuple[str, ...] = ()


@dataclass(frozen=True)
class DestinationFacts:
    """The destination.

    `domains`: its VMs' UUIDs by name. `directories`: where disks may land, by path. `present`: whether each path that
    the definition refers to is there. `paths_in_use`: the paths that VMs there refer to, with the VMs' names.
    `staged_error`: why the journal of an earlier attempt cannot be read. `things`: what it has of everything that the
    definition refers to.
    """

    host: HostFacts
    domains: Mapping[str, str]
    pools: tuple[Pool, ...]
    directories: Mapping[str, Directory]
    present: Mapping[str, bool]
    existing: Existing | None = None
    staged: Staged | None = None
    staged_error: str = ""
    abilities: Abilities = field(default_factory=Abilities)
    paths_in_use: Mapping[str, frozenset[str]] = field(default_factory=dict)
    things: Things = field(default_factory=Things)


@dataclass(frozen=True)
class RouteFacts:
    """Whether the source host can connect to the destination itself, and the reason.

    `rate`: bytes a second that were measured on the route that `auto` takes; 0 where nothing was measured.
    """

    direct: bool
    reason: str
    rate: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Everything that a plan is made from."""

    source: SourceFacts
    destination: DestinationFacts
    route: RouteFacts

    @property
    def one_host(self) -> bool:
        """Whether source and destination are the same host, whatever their addresses."""
        return same_host(self.source.host.identity, self.destination.host.identity)

    @property
    def digest(self) -> str:
        """A digest of what a plan depends on. Free space and the like may change without harm and are left out."""
        there = self.destination
        parts = (
            self.source.fingerprint,
            self.source.domain.state,
            there.existing and (there.existing.domain.xml, there.existing.domain.state, there.existing.removable),
            there.staged and (there.staged.operation, there.staged.defining),
            sorted(there.domains.items()),
            there.pools,
            self.route.direct,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()
