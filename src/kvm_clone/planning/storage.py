"""Findings about the filesystems on which a clone's disks land: room, and what they cannot do. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvm_clone.agent.disks.image import RAW
from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.findings import Finding, Severity, block
from kvm_clone.planning.facts import DestinationFacts, Directory, Facts
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.units import format_bytes

_MARGIN_PERCENT = 115
"""How much has to be free, of what is to be written: metadata and other writers need room as well."""

_ELSEWHERE = "name another pool with --pool"


def storage_findings(facts: Facts, disks: tuple[PlannedDisk, ...], *, room: bool = True) -> Iterator[Finding]:
    """Yield the findings about the filesystems where the disks land. `room`: about free space as well."""
    destination = facts.destination
    landing = [(disk, found) for disk in disks if (found := _directory(destination, disk)) is not None]
    for directory in dict.fromkeys(directory for _, directory in landing):
        yield from _filesystem_findings(destination.host.name, directory)
    for disk, directory in landing:
        yield from _size_findings(destination.host.name, directory, disk)
        if not directory.abilities.direct:
            yield from _direct_findings(destination.host.name, directory, disk, facts.source.xml)
    if room:
        yield from space_findings(destination, disks)


def _directory(destination: DestinationFacts, disk: PlannedDisk) -> Directory | None:
    return destination.directories.get(disk.place.container)


def _filesystem_findings(host: str, directory: Directory) -> Iterator[Finding]:
    where, can = f"{directory.path} on {host}", directory.abilities
    if can.trouble:
        yield block("storage", directory.path, f"No file can be made in {where}: {can.trouble}.", _ELSEWHERE)
        return
    if not can.naming:
        text = (
            f"The filesystem of {where} has neither hard links nor a rename that replaces nothing: a finished disk "
            "cannot get its name there without the risk of replacing another file."
        )
        yield block("no-links", directory.path, text, _ELSEWHERE)
    if not can.owners:
        text = f"The owner of files in {where} cannot be set; QEMU's user may have no access to the disks."
        remedy = "see to it by the mount's options, or that libvirt runs QEMU as the user that has access"
        yield Finding("owner", Severity.WARNING, directory.path, text, remedy)
    if not can.modes:
        text = f"The mode of files in {where} cannot be set: who may read the disks is what the mount says."
        yield Finding("mode", Severity.WARNING, directory.path, text, "see to it by the mount's options")


def _size_findings(host: str, directory: Directory, disk: PlannedDisk) -> Iterator[Finding]:
    """Yield the findings about the size of the disk's file in the end: a raw one is as large as the disk."""
    largest, image = directory.abilities.largest, disk.image
    format_ = image.format if disk.base is None else disk.base.format
    if (image.virtual_size if format_ == RAW else image.data) > largest:
        size = format_bytes(image.virtual_size if format_ == RAW else image.data)
        text = f"Disk {disk.target} needs a file of {size}; {directory.path} on {host} takes {format_bytes(largest)}."
        yield block("file-size", disk.target, text, _ELSEWHERE)
    elif image.virtual_size > largest:
        text = (
            f"Disk {disk.target} can grow to {format_bytes(image.virtual_size)}, a file in {directory.path} on {host} "
            f"to {format_bytes(largest)}: the guest will get errors when it comes so far."
        )
        yield Finding("file-size-later", Severity.WARNING, disk.target, text, _ELSEWHERE)


def _direct_findings(host: str, directory: Directory, disk: PlannedDisk, xml: DomainXml) -> Iterator[Finding]:
    if any(one.target == disk.target and one.direct for one in xml.own_disks):
        text = (
            f"Disk {disk.target} is to be opened past the page cache (its cache or io mode), which files in "
            f"{directory.path} on {host} cannot be; the VM will not start."
        )
        yield Finding("direct", Severity.WARNING, disk.target, text, f"choose another cache mode, or {_ELSEWHERE}")


def space_findings(destination: DestinationFacts, disks: tuple[PlannedDisk, ...]) -> Iterator[Finding]:
    """Yield a finding for each filesystem without room for what is still to be written and 15 % more."""
    host = destination.host.name
    needed: dict[int, int] = {}
    certain: dict[int, int] = {}
    files: dict[int, int] = {}
    where: dict[int, Directory] = {}
    for disk in disks:
        directory = _directory(destination, disk)
        if directory is not None:
            size, known = to_write(disk, directory), not (disk.image.device and disk.image.format == RAW)
            needed[directory.filesystem] = needed.get(directory.filesystem, 0) + size
            certain[directory.filesystem] = certain.get(directory.filesystem, 0) + (size if known else 0)
            files[directory.filesystem] = files.get(directory.filesystem, 0) + 1
            where[directory.filesystem] = directory
    for filesystem, directory in where.items():
        wanted = with_margin(needed[filesystem])
        free, remedy = format_bytes(directory.free), "make room, or name another pool with --pool"
        if with_margin(certain[filesystem]) > directory.free:
            text = f"{directory.path} on {host} has {free} free, {format_bytes(wanted)} are needed."
            yield block("space", directory.path, text, remedy)
        elif wanted > directory.free:
            text = (
                f"{directory.path} on {host} has {free} free, up to {format_bytes(wanted)} are needed: how much of the "
                "source's devices is zeros is not known before they are read."
            )
            yield Finding("space-unknown", Severity.WARNING, directory.path, text, remedy)
        if files[filesystem] + 1 > directory.inodes:
            more = files[filesystem] + 1
            text = f"The filesystem of {directory.path} on {host} has no room for {more} more files."
            yield block("inodes", directory.path, text, "remove files there, or name another pool with --pool")


def with_margin(size: int) -> int:
    """Return how many bytes have to be free for `size` bytes that are to be written."""
    return size * _MARGIN_PERCENT // 100


def to_write(disk: PlannedDisk, directory: Directory) -> int:
    """Return how many more bytes the disk will take, by its content.

    The blocks that the source's file takes say little: its filesystem may compress or share blocks.
    """
    if disk.base is not None:
        return _to_update(disk, directory)
    image, kept = disk.image, disk.staged
    if image.format == RAW and not directory.abilities.sparse:
        return max(0, image.virtual_size - (kept.allocated if kept else 0))
    # A resumed copy is stored uncompressed, also where the source's image is compressed.
    return max(0, image.data - kept.data) if kept else image.fresh


def _to_update(disk: PlannedDisk, directory: Directory) -> int:
    """Return at least what the replica's image grows by: only the comparison finds out how much has changed.

    The overlay needs it first, then the image below as well, before the overlay is removed.
    """
    assert disk.base is not None
    growth = max(0, disk.image.data - disk.base.data)
    held = disk.staged.data if disk.staged is not None else 0
    below = growth if disk.below is not None else 0
    if disk.below is not None and disk.below.format == RAW and not directory.abilities.sparse:
        below = max(0, disk.image.virtual_size - disk.below.virtual_size)
    return max(0, growth - held) + below
