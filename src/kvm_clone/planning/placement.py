"""Where each disk of a clone lands. Pure: the only module of planning that chooses directories and names."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvm_clone.agent.disks.image import QCOW2
from kvm_clone.agent.names import is_plain
from kvm_clone.definition import variables
from kvm_clone.definition.volumes import Volume
from kvm_clone.findings import Finding, block
from kvm_clone.image import Image
from kvm_clone.options import Options
from kvm_clone.planning import domain_facts
from kvm_clone.planning.assets import Place
from kvm_clone.planning.facts import DestinationFacts, Directory, Facts, ImageFacts, Staged, StagedDisk
from kvm_clone.planning.file_names import UNKEPT, cut, file_like, file_name, home_of, length_of, stem_of


@dataclass(frozen=True)
class PlannedDisk:
    """One disk to copy and the file that it becomes: an Asset.

    `staged`: what an interrupted attempt has of it. `base`: the replica's image that is brought up to date. The file
    is then an overlay on it until both are merged, or with `shares` a copy that shares its blocks and succeeds it.
    `fine`: the overlay has subclusters of 2 KiB.
    """

    image: ImageFacts
    place: Place
    staged: StagedDisk | None = None
    base: ImageFacts | None = None
    shares: bool = False
    fine: bool = False

    @property
    def final(self) -> str:
        """The path that the file gets in the end."""
        return self.place.path

    @property
    def options(self) -> dict[str, str]:
        """The options of `qemu-img create -o`: the source image's own, or those of an overlay."""
        if self.base is None:
            return dict(self.image.options)
        return {"extended_l2": "on"} if self.fine else {}

    @property
    def format(self) -> str:
        """The file's own format."""
        if self.base is None:
            return self.image.format
        return self.base.format if self.shares else QCOW2

    @property
    def below(self) -> ImageFacts | None:
        """The image that the file is an overlay on, None for a file that is none."""
        return None if self.shares else self.base

    @property
    def target(self) -> str:
        """The guest's name for it, such as vda."""
        return self.image.target

    # What follows is the contract of an Asset: see there.

    @property
    def key(self) -> str:
        """The target."""
        return self.target

    @property
    def source(self) -> Image:
        """See Asset."""
        return self.image

    @property
    def size(self) -> int:
        """See Asset."""
        return self.image.virtual_size

    @property
    def data(self) -> int:
        """See Asset."""
        return self.image.data

    @property
    def fingerprint(self) -> str:
        """See Asset."""
        return self.image.fingerprint

    @property
    def spec(self) -> dict[str, Any]:
        """As agent.staging.stage.create takes it. A file that takes an image's place gets that one's owner and mode."""
        owner = self.image if self.base is None else self.base
        return {
            "format": self.format,
            "size": self.size,
            "options": self.options,
            "mode": owner.mode,
            "user": owner.user,
            "group": owner.group,
            "backing": [self.below.path, self.below.format] if self.below is not None else None,
            "copy_of": self.base.path if self.base is not None and self.shares else None,
            "store": self.place.store,
        }

    def at(self, path: str) -> Image:
        """See Asset."""
        return Image(path, self.format, below=self.below)


@dataclass(frozen=True)
class Names:
    """What new names are made from: the VM's at the source and at the destination, and the operation's."""

    old: str
    new: str
    operation: str


def place(
    facts: Facts, options: Options, names: Names, staged: Staged | None, images: tuple[ImageFacts, ...] | None = None
) -> tuple[tuple[PlannedDisk, ...], tuple[Finding, ...]]:
    """Return each disk with its place: a free name in a directory, or where an interrupted attempt put it.

    `images`: the source's images that become files of their own, None for all.
    """
    placed: list[PlannedDisk] = []
    findings: list[Finding] = []
    taken: set[str] = set()
    for image in facts.source.images if images is None else images:
        kept = staged.disks.get(image.target) if staged is not None else None
        # Nothing durable: nothing to reuse, and the file may be missing or half made.
        if kept is not None and kept.durable and _is_same(kept, image):
            placed.append(PlannedDisk(image, Place.of_file(kept.final), kept))
            continue
        directory, finding = _directory_of(facts.destination, image, options.pool or _home_pool(facts, image))
        if finding is not None and finding not in findings:
            findings.append(finding)
        if directory is not None:
            others = taken | facts.destination.paths_in_use.keys()
            free = Place.of_file(kept.final) if kept else _free_place(directory, image, names, others)
            taken.add(free.path)
            placed.append(PlannedDisk(image, free))
    return tuple(placed), tuple(findings)


def _is_same(kept: StagedDisk, image: ImageFacts) -> bool:
    """Whether a staged file can become this disk as the source has it now."""
    return not kept.backing and (kept.size, kept.format) == (image.virtual_size, image.format)


def _home_pool(facts: Facts, image: ImageFacts) -> str | None:
    """Return the pool where a volume lands: that of the name which it is in at the source, if there is one."""
    volume = next((disk.volume for disk in facts.source.xml.own_disks if disk.target == image.target), None)
    names = [pool.name for pool in _pools_of_files(facts.destination)]
    return volume.pool if volume is not None and volume.pool in names else None


def _pools_of_files(destination: DestinationFacts) -> list[domain_facts.Pool]:
    return [pool for pool in destination.pools if pool.active and pool.type in domain_facts.FILE_POOLS]


def volumes_of(facts: Facts, disks: Iterable[PlannedDisk]) -> dict[str, Volume]:
    """Return the pool and volume by which the definition names a disk, by target, of those that the source's names so.

    A disk that lands where no active pool is has none, and is named by its path.
    """
    named = {disk.target: disk.volume for disk in facts.source.xml.own_disks if disk.volume is not None}
    found: dict[str, Volume] = {}
    for disk in disks:
        pools = [one.name for one in _pools_of_files(facts.destination) if one.path == disk.place.container]
        if disk.target in named and pools:
            same = named[disk.target].pool
            found[disk.target] = Volume(same if same in pools else pools[0], disk.place.name)
    return found


def _directory_of(
    destination: DestinationFacts, image: ImageFacts, pool_name: str | None
) -> tuple[Directory | None, Finding | None]:
    """Return the directory where the image lands: libvirt's own for UEFI variables, if it has one there."""
    own = destination.directories.get(variables.DIRECTORY)
    if image.target == variables.KEY:
        pool_name = None
        if own is not None and own.exists:
            return _usable(destination.host.name, own)
    return _directory_for(destination, home_of(image.path), pool_name)


def variables_image(facts: Facts, names: Names, disks: Iterable[PlannedDisk]) -> Image | None:
    """Return the file of UEFI variables that the clone's definition has to name; None where libvirt names it itself.

    A VM that was never started has no such file yet, and its clone's must not be one that is there.
    """
    wanted = facts.source.xml.variables
    if wanted is None:
        return None
    copied = next((disk for disk in disks if disk.target == variables.KEY), None)
    if copied is not None:
        found = Image(copied.final, copied.format)
    else:
        image = ImageFacts(wanted.paths(names.new)[0], wanted.format, target=variables.KEY)
        directory, _ = _directory_of(facts.destination, image, None)
        if directory is None:
            return None
        place = _free_place(directory, image, names, set(facts.destination.paths_in_use))
        found = Image(place.path, wanted.format)
    chosen_by_libvirt = not wanted.path and found.path in wanted.paths(names.new)
    return None if chosen_by_libvirt else found


def _directory_for(
    destination: DestinationFacts, source_directory: str, pool_name: str | None
) -> tuple[Directory | None, Finding | None]:
    host = destination.host.name
    pools = {pool.name: pool for pool in destination.pools}
    same = destination.directories.get(source_directory)
    if pool_name is None and same is not None and same.exists:
        directory = same
    else:
        pool = pools.get(pool_name or "default")
        if pool is None or not pool.active or pool.type not in domain_facts.FILE_POOLS:
            return None, _pool_finding(host, pool_name or "default", pool, sorted(pools))
        directory = destination.directories.get(pool.path) or Directory(pool.path, exists=False, writable=False, free=0)
    return _usable(host, directory)


def _usable(host: str, directory: Directory) -> tuple[Directory | None, Finding | None]:
    if UNKEPT.search(directory.path) or not is_plain(directory.path):
        text = f"The path {directory.path!r} on {host} cannot hold a disk: it has line breaks, tabs, or '..' in it."
        return None, block("directory-name", directory.path, text, "name another pool with --pool")
    if not directory.exists:
        text = f"{host} has no directory {directory.path}, although it has a storage pool there."
        return None, block("directory-missing", directory.path, text, "make it, or name another pool with --pool")
    if not directory.writable:
        text = f"This user cannot write in {directory.path} on {host}."
        remedy = "connect as another user, or name another pool with --pool"
        return None, block("not-writable", directory.path, text, remedy)
    return directory, None


def _pool_finding(host: str, name: str, pool: domain_facts.Pool | None, known: list[str]) -> Finding:
    if pool is None:
        remedy = f"name one of its pools with --pool: {', '.join(known) or 'it has none'}"
        return block("pool-missing", name, f"{host} has no storage pool named {name}.", remedy)
    if not pool.active:
        return block(
            "pool-inactive",
            name,
            f"The storage pool {name} on {host} is not active.",
            f"virsh pool-start {name}",
        )
    text = f"The storage pool {name} on {host} is of type {pool.type}, whose volumes are not files."
    return block("pool-type", name, text, f"name a pool of type {', '.join(domain_facts.FILE_POOLS)} with --pool")


def _free_place(directory: Directory, image: ImageFacts, names: Names, taken: set[str]) -> Place:
    """Return the place with the source's file name, the VM's new name in it for the old one.

    Where that name is taken, the disk's target is added to it; where not every name that is there is known, the target
    and the operation's name, which nobody else has.
    """
    stem, extension = stem_of(file_like(image, image.target, names.old), names.old, names.new)
    if image.target == variables.KEY:
        stem = UNKEPT.sub("_", f"{names.new}_VARS")
    # People type these paths: an ending has nothing in it that would have to be quoted.
    endings = ["", f"-{image.target}"]
    endings += [f"-{image.target}-{number}" for number in range(1, len(directory.names) + len(taken) + 2)]
    there = {directory.same(posixpath.join(directory.path, file)) for file in directory.names}
    there |= {directory.same(path) for path in taken}
    for ending in endings if not directory.more else [f"-{image.target}-{names.operation}"]:
        free = Place(directory.path, file_name(directory, stem, f"{ending}{extension}"))
        if directory.same(free.path) not in there:
            return free
    raise AssertionError("more candidates than names")


def stage_directory(facts: Facts, options: Options, disks: tuple[PlannedDisk, ...], staged: Staged | None) -> str:
    """Return the journal's directory: the first disk's; for a VM without disks the one where a disk would land."""
    if staged is not None:
        return staged.directory
    if disks:
        return disks[0].place.container
    directory, _ = _directory_for(facts.destination, "", options.pool)
    return directory.path if directory else "/var/tmp"  # noqa: S108


def overlay_place(base: Image, operation: str, target: str) -> Place:
    """Return the place of the overlay on a replica's image, which has it until both are merged."""
    return Place.of_file(base.path).beside(f"kvm-clone-{operation}-{target}.qcow2")


_OPERATION = re.compile(r"\.[0-9a-f]{12}$")


def successor_place(base: Image, operation: str, longest: int) -> Place:
    """Return the place of the file that succeeds a replica's image: the operation's name before the extension.

    The stem is cut where a file's name of at most `longest` bytes could not hold it.
    """
    old = Place.of_file(base.path)
    stem, extension = posixpath.splitext(old.name)
    ending = f".{operation}{extension}"
    return old.beside(cut(_OPERATION.sub("", stem), longest - length_of(ending)) + ending)
