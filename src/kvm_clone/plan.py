"""The plan of a clone: facts and options in, findings and steps out. Pure: no I/O, no clock, no chance."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvm_clone import definition, domains
from kvm_clone.errors import DomainExistsError, KvmCloneError, RefusedError
from kvm_clone.facts import DestinationFacts, Directory, Facts, ImageFacts, SourceFacts
from kvm_clone.findings import EXISTS, Finding, Severity
from kvm_clone.options import CloneOptions, Route
from kvm_clone.xmlspan import is_xml

_NAME_MAX = 255
"""Bytes in a file's name, on every filesystem that images live on."""


@dataclass(frozen=True)
class Identity:
    """What chance decides, decided before planning: the operation's name, and the clone's UUID and MACs."""

    operation: str
    uuid: str
    macs: tuple[str, ...]


@dataclass(frozen=True)
class PlannedDisk:
    """One disk to copy and the file it becomes."""

    image: ImageFacts
    final: str

    @property
    def target(self) -> str:
        """The guest's name for it, such as vda."""
        return self.image.target


@dataclass(frozen=True)
class BeginStage:
    """Take the destination's lock and begin the journal in `directory`. Undo: remove the journal, let go."""

    directory: str


@dataclass(frozen=True)
class CreateDisk:
    """Make the empty staged image. Undo: remove it."""

    disk: PlannedDisk


@dataclass(frozen=True)
class CopyDisks:
    """Send every disk's content. Undo: nothing of its own, the staged images go."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class ProveDisks:
    """Digest every disk at both ends and compare. Undo: nothing."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class CheckSource:
    """Make sure that the source's images are as they were when the plan was made. Undo: nothing."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class PublishDisk:
    """Give the staged image its final name. Undo: remove it."""

    disk: PlannedDisk


@dataclass(frozen=True)
class DefineDomain:
    """Define the clone: the commit point. Undo: none; a definition that libvirt refuses changes nothing."""

    uuid: str


@dataclass(frozen=True)
class EndStage:
    """Remove the journal and let go of the lock. After the commit: a failure here is a warning."""

    directories: tuple[str, ...]


Step = BeginStage | CreateDisk | CopyDisks | ProveDisks | CheckSource | PublishDisk | DefineDomain | EndStage


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order, and what there is to say about it."""

    name: str
    facts: Facts
    options: CloneOptions
    identity: Identity
    route: Route
    route_reason: str
    disks: tuple[PlannedDisk, ...]
    findings: tuple[Finding, ...]
    steps: tuple[Step, ...]

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """The findings that keep the plan from being run."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.BLOCKING)

    def refusal(self) -> KvmCloneError | None:
        """The error that a plan with blocking findings ends with, None for one that can be run."""
        if not self.blocking:
            return None
        kind = DomainExistsError if all(one.code == EXISTS for one in self.blocking) else RefusedError
        text = "; ".join(finding.text.rstrip(".") for finding in self.blocking)
        remedies = dict.fromkeys(finding.remedy for finding in self.blocking if finding.remedy)
        return kind(text, subject=self.name, remedy="; ".join(remedies), findings=self.blocking)


def make_plan(facts: Facts, options: CloneOptions, identity: Identity) -> Plan:
    """Plan a clone. Every finding is reported, not only the first."""
    source = facts.source
    name = options.new_name or source.domain.name
    disks, placing = _place(facts, options, name)
    findings = (*_source_findings(source), *_destination_findings(facts, options, name), *placing)
    if options.route is Route.DIRECT and not facts.route.direct:
        findings += (
            Finding(
                "route",
                Severity.BLOCKING,
                facts.destination.host.name,
                f"The direct route cannot be taken: {facts.route.reason}",
                "let the source host connect to the destination by SSH, or use --route relay",
            ),
        )
    route = Route.DIRECT if facts.route.direct and options.route is not Route.RELAY else Route.RELAY
    steps = _steps(disks, options, identity, _stage_directory(facts, options, disks))
    return Plan(name, facts, options, identity, route, facts.route.reason, disks, findings, steps)


def _steps(
    disks: tuple[PlannedDisk, ...], options: CloneOptions, identity: Identity, directory: str
) -> tuple[Step, ...]:
    prove: tuple[Step, ...] = (ProveDisks(disks),) if options.verify and disks else ()
    copy: tuple[Step, ...] = (CopyDisks(disks),) if disks else ()
    return (
        BeginStage(directory),
        *(CreateDisk(disk) for disk in disks),
        *copy,
        *prove,
        CheckSource(disks),
        *(PublishDisk(disk) for disk in disks),
        DefineDomain(identity.uuid),
        EndStage(tuple(sorted({posixpath.dirname(disk.final) for disk in disks}))),
    )


def _source_findings(source: SourceFacts) -> Iterator[Finding]:
    domain = source.domain
    if domain.state != domains.SHUT_OFF:
        yield _block(
            "source-state",
            domain.name,
            f"VM {domain.name} is {domain.state} on {source.host.name}; only a VM that is shut off can be cloned yet.",
            f"shut it down: virsh shutdown {domain.name}",
        )
    if domain.managed_save:
        yield _block(
            "managed-save",
            domain.name,
            f"VM {domain.name} has a saved memory image (managed save), which cannot be cloned yet.",
            "start it and shut it down, or drop the image with virsh managedsave-remove",
        )
    if domain.snapshots:
        listed = ", ".join(domain.snapshots)
        yield _block(
            "snapshots",
            domain.name,
            f"VM {domain.name} has snapshots ({listed}), which cannot be cloned yet.",
            "",
        )
    for reason in definition.unsupported(source.xml):
        yield _block(reason.code, reason.subject, reason.text, "")
    for warning in definition.warnings(source.xml):
        yield Finding(warning.code, Severity.WARNING, warning.subject, warning.text)
    if domain.state == domains.SHUT_OFF:
        refused = {reason.subject for reason in definition.unsupported(source.xml)}
        for image in source.images:
            if image.target not in refused:
                yield from _image_findings(image)
    yield from _tool_findings(source.host.name, source.host.qemu_img, source.host.qemu_nbd)


def _image_findings(image: ImageFacts) -> Iterator[Finding]:
    what = f"Disk {image.target} ({image.path})"
    reasons = (
        ("disk-in-use", image.in_use, "is in use by another process", "shut down whatever uses it"),
        ("disk-unreadable", image.error and not image.in_use, f"cannot be read: {image.error}", ""),
        (
            "disk-block-device",
            not image.regular,
            "is no regular file but a device, which cannot be cloned yet",
            "",
        ),
        (
            "disk-backing",
            image.backing,
            f"has the backing file {image.backing}, which cannot be cloned yet",
            "",
        ),
        (
            "disk-data-file",
            image.data_file,
            f"keeps its data in {image.data_file}, which cannot be cloned yet",
            "",
        ),
        ("disk-encrypted", image.encrypted, "is encrypted, which cannot be cloned yet", ""),
        ("disk-corrupt", image.corrupt, "is marked as corrupt", "repair it: qemu-img check -r all"),
        (
            "disk-snapshots",
            image.snapshots,
            f"has internal snapshots ({', '.join(image.snapshots)}), which cannot be cloned yet",
            "",
        ),
    )
    for code, applies, text, remedy in reasons:
        if applies:
            yield _block(code, image.target, f"{what} {text}.", remedy)


def _tool_findings(host: str, qemu_img: str | None, qemu_nbd: str | None) -> Iterator[Finding]:
    for program, version in (("qemu-img", qemu_img), ("qemu-nbd", qemu_nbd)):
        if version is None:
            yield _block(
                "tool-missing",
                host,
                f"{host} has no {program}.",
                f"install qemu-utils (or qemu-img) on {host}",
            )


def _destination_findings(facts: Facts, options: CloneOptions, name: str) -> Iterator[Finding]:
    destination, xml = facts.destination, facts.source.xml
    host = destination.host.name
    if not _is_name(name):
        yield _block("name", name, f"{name!r} cannot be a VM's name.", "choose another --new-name")
    if name in destination.domains:
        yield _block(
            EXISTS,
            name,
            f"{host} already has a VM named {name}.",
            "choose another --new-name, or remove that VM first",
        )
    owner = next((one for one, uuid in destination.domains.items() if uuid == xml.uuid and one != name), None)
    if options.preserve_uuid and owner is not None:
        yield _block("uuid-in-use", name, f"VM {owner} on {host} has the UUID {xml.uuid}.", "leave out --preserve-uuid")
    yield from _tool_findings(host, destination.host.qemu_img, destination.host.qemu_nbd)
    for file in xml.os_files:
        if not destination.present.get(file.path, False):
            yield _block(
                "boot-file-missing",
                file.path,
                f"{host} lacks {file.path}, the {file.role} that VM {name} boots with.",
                f"copy it to {host} at the same path",
            )
    yield from _reference_findings(destination, xml)


def _is_name(name: str) -> bool:
    """Whether libvirt and XML take the name, and a file can have it."""
    return bool(name.strip()) and name not in (".", "..") and not re.search("[/\n]", name) and is_xml(name)


def _reference_findings(destination: DestinationFacts, xml: definition.DomainXml) -> Iterator[Finding]:
    host = destination.host.name
    for disk in xml.media:
        if disk.type == "file" and disk.path and not destination.present.get(disk.path, False):
            text = (
                f"{host} lacks {disk.path}, the medium in {disk.target}; the reference is kept, the VM may not start."
            )
            yield Finding("medium-missing", Severity.WARNING, disk.target, text, "copy it there, or eject it")
    for disk in xml.referenced_disks:
        kind = "shared" if disk.shareable else "read-only"
        if disk.type == "file" and not destination.present.get(disk.path or "", False):
            yield _block(
                "referenced-disk-missing",
                disk.target,
                f"{host} lacks {disk.path}, the {kind} disk {disk.target}, which is not copied.",
                f"make it available on {host} at the same path",
            )
        else:
            text = f"The {kind} disk {disk.target} ({disk.path}) is not copied; {host} uses what it has there."
            yield Finding("referenced-disk", Severity.WARNING, disk.target, text)


def _place(facts: Facts, options: CloneOptions, name: str) -> tuple[tuple[PlannedDisk, ...], tuple[Finding, ...]]:
    """Where each disk goes: a directory, and in it a name that nothing has."""
    placed: list[PlannedDisk] = []
    findings: list[Finding] = []
    taken: set[str] = set()
    for image in facts.source.images:
        directory, finding = _directory_for(facts.destination, posixpath.dirname(image.path), options.pool)
        if finding is not None and finding not in findings:
            findings.append(finding)
        if directory is not None:
            path = _free_path(directory, image, facts.source.domain.name, name, taken)
            taken.add(path)
            placed.append(PlannedDisk(image, path))
    return tuple(placed), tuple(findings)


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
        if pool is None or not pool.active or pool.type not in domains.FILE_POOLS:
            return None, _pool_finding(host, pool_name or "default", pool, sorted(pools))
        directory = destination.directories.get(pool.path) or Directory(pool.path, exists=False, writable=False, free=0)
    return _usable(host, directory)


def _usable(host: str, directory: Directory) -> tuple[Directory | None, Finding | None]:
    if not directory.exists:
        text = f"{host} has no directory {directory.path}, although it has a storage pool there."
        return None, _block("directory-missing", directory.path, text, "make it, or name another pool with --pool")
    if not directory.writable:
        text = f"This user cannot write in {directory.path} on {host}."
        remedy = "connect as another user, or name another pool with --pool"
        return None, _block("not-writable", directory.path, text, remedy)
    return directory, None


def _pool_finding(host: str, name: str, pool: domains.Pool | None, known: list[str]) -> Finding:
    if pool is None:
        remedy = f"name one of its pools with --pool: {', '.join(known) or 'it has none'}"
        return _block("pool-missing", name, f"{host} has no storage pool named {name}.", remedy)
    if not pool.active:
        return _block(
            "pool-inactive",
            name,
            f"The storage pool {name} on {host} is not active.",
            f"virsh pool-start {name}",
        )
    text = f"The storage pool {name} on {host} is of type {pool.type}, whose volumes are not files."
    return _block("pool-type", name, text, f"name a pool of type {', '.join(domains.FILE_POOLS)} with --pool")


def _free_path(directory: Directory, image: ImageFacts, old: str, new: str, taken: set[str]) -> str:
    """The source's file name where it is free, with the VM's new name for the old; else one with the disk's target."""
    stem, extension = posixpath.splitext(posixpath.basename(image.path))
    if new != old and stem.startswith(old):
        stem = new + stem.removeprefix(old)
    # Names end up in paths that people type: a VM's name may hold what they would have to quote.
    endings = ["", f"-{image.target}"]
    endings += [f"-{image.target}-{number}" for number in range(1, len(directory.names) + len(taken) + 2)]
    for ending in endings:
        file = _file_name(stem, f"{ending}{extension}")
        path = posixpath.join(directory.path, file)
        if file not in directory.names and path not in taken:
            return path
    raise AssertionError("more candidates than names")


def _file_name(stem: str, ending: str) -> str:
    """Both together, the stem cut where a file's name could not hold it."""
    room = _NAME_MAX - len(ending.encode())
    raw = stem.encode(errors="surrogatepass")
    return (stem if len(raw) <= room else raw[: max(room, 0)].decode(errors="ignore")) + ending


def _stage_directory(facts: Facts, options: CloneOptions, disks: tuple[PlannedDisk, ...]) -> str:
    """Where the journal lies: beside the first disk; for a VM without disks, where its disks would be."""
    if disks:
        return posixpath.dirname(disks[0].final)
    directory, _ = _directory_for(facts.destination, "", options.pool)
    return directory.path if directory else "/var/tmp"  # noqa: S108


def _block(code: str, subject: str, text: str, remedy: str) -> Finding:
    return Finding(code, Severity.BLOCKING, subject, text, remedy)
