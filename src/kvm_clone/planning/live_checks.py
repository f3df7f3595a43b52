"""Findings about a running source, and the backup job that is to be begun. Pure."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator

from kvm_clone.agent.staging.scratch import SOCKETS, SUFFIX
from kvm_clone.findings import LOCKED, Finding, Severity, block
from kvm_clone.options import Options, Quiesce
from kvm_clone.planning import domain_facts
from kvm_clone.planning.domain_facts import BackupDisk, BackupJob
from kvm_clone.planning.facts import Directory, Facts, ImageFacts, SourceFacts
from kvm_clone.planning.file_names import scratch_prefix
from kvm_clone.units import format_bytes

_OLDEST_LIBVIRT = 7_002_000
"""The first release whose pull-mode backups need no configuration: major * 1,000,000 + minor * 1,000 + release."""

_LEAST_SCRATCH_PERCENT = 10
_LEAST_SCRATCH = 64 << 20
"""The least free room for what the guest writes during the copy: a share of the disk's data, and bytes."""


def live_findings(source: SourceFacts, options: Options, own_operation: str | None = None) -> Iterator[Finding]:
    """Yield the findings about copying a running source.

    `own_operation`: the operation of this run, whose agent may not have ended yet.
    """
    name, running = source.domain.name, source.live
    if running is None:
        if options.track:
            text = f"VM {name} does not run: no checkpoint is left on it, and the next sync compares everything."
            yield Finding("track", Severity.WARNING, name, text)
        return
    if source.libvirt < _OLDEST_LIBVIRT:
        text = f"libvirt on {source.host.name} is too old for copying a VM that runs; 7.2 or newer is needed."
        yield block("libvirt-old", source.host.name, text, f"shut it down: virsh shutdown {name}")
    if source.reader and not (own_operation and own_operation in source.reader):
        text = f"Another operation copies VM {name} on {source.host.name}: {source.reader}."
        yield block(LOCKED, name, text, "wait until it has ended, or let --wait do so")
    elif running.backup and not running.backup_is_ours:
        text = f"VM {name} has a backup job of another tool ({running.backup}) under way."
        yield block("backup-job", name, text, "wait until it has ended, or end it: virsh domjobabort")
    for target in running.jobs:
        if not running.backup:
            text = f"Disk {target} of VM {name} has a block job under way."
            yield block("block-job", target, text, "wait until it has ended, or end it: virsh blockjob --abort")
    yield from _agent_findings(source, options.quiesce)
    yield from _changes(source)
    foreign = [one for one in source.domain.checkpoints if not one.startswith(domain_facts.CHECKPOINTS)]
    if options.track and foreign:
        text = f"VM {name} has checkpoints of another tool ({', '.join(foreign)}), whose chain stays its own."
        yield block("foreign-checkpoint", name, text, "leave out --track")
    _, findings = _scratch(source)
    yield from findings


def _agent_findings(source: SourceFacts, quiesce: Quiesce) -> Iterator[Finding]:
    assert source.live is not None
    name = source.domain.name
    if quiesce is Quiesce.OFF or source.live.agent:
        return
    if quiesce is Quiesce.REQUIRE:
        text = f"VM {name} has no guest agent connected, so that its filesystems cannot be frozen."
        yield block("guest-agent", name, text, "install and start qemu-guest-agent in it, or use --quiesce auto")
    else:
        text = f"VM {name} has no guest agent connected: the copy is crash-consistent, as after a power cut."
        yield Finding("crash-consistent", Severity.INFO, name, text)


def _changes(source: SourceFacts) -> Iterator[Finding]:
    """Yield how the running VM differs from its persistent definition, which is the one that is copied."""
    assert source.live is not None
    name = source.domain.name
    persistent = {disk.target: disk.path for disk in source.xml.own_disks}
    for target, path in source.live.paths.items():
        if target not in persistent:
            text = f"Disk {target} ({path}) was attached to the running VM {name} alone; it is not copied."
            yield Finding("live-disk", Severity.WARNING, target, text, "attach it with --config too")
        elif persistent[target] != path:
            text = f"Disk {target} of VM {name} is {path} while it runs, and {persistent[target]} by its definition."
            yield block("disk-live", target, text, "shut it down, or let the block job that did this end")
    for target in sorted(persistent.keys() - source.live.paths.keys()):
        text = f"Disk {target} of VM {name} is in its definition only, not in the running VM."
        yield block("disk-not-live", target, text, "restart the VM, or shut it down")


def _scratch(source: SourceFacts) -> tuple[dict[str, str], list[Finding]]:
    """Return the scratch file of each disk that has room for one, by target, and the findings about room."""
    usable = [one for one in source.directories.values() if one.exists and one.writable]
    free = {one.filesystem: one.free for one in usable}
    placed: dict[str, str] = {}
    findings: list[Finding] = []
    for image in source.disk_images:
        least = max(_LEAST_SCRATCH, image.data * _LEAST_SCRATCH_PERCENT // 100)
        chosen = _roomiest(usable, free, posixpath.dirname(image.path), max(image.data, least))
        if chosen is None or free[chosen.filesystem] < least:
            text = (
                f"There is no room on {source.host.name} for what the guest writes to {image.target} while it is "
                f"copied: {format_bytes(least)} at least."
            )
            findings.append(block("scratch", image.target, text, "make room there, or shut the VM down"))
            continue
        if free[chosen.filesystem] < image.data:
            text = (
                f"{chosen.path} on {source.host.name} has {format_bytes(free[chosen.filesystem])} for what the guest "
                f"writes to {image.target} while it is copied; if that runs out, the copy is ended, not the guest."
            )
            findings.append(Finding("scratch-small", Severity.WARNING, image.target, text))
        free[chosen.filesystem] -= least
        file = f"{scratch_prefix(source.domain.uuid)}{image.target}{SUFFIX}"
        placed[image.target] = posixpath.join(chosen.path, file)
    return placed, findings


def _socket(source: SourceFacts) -> str:
    return posixpath.join(SOCKETS, f"{domain_facts.OURS}{source.domain.uuid}.sock")


def stale_files(source: SourceFacts) -> list[str]:
    """Return the files that earlier backup jobs may have left: a killed QEMU or a power cut removes nothing."""
    scratch = [
        posixpath.join(directory.path, name)
        for directory in source.directories.values()
        for name in sorted(directory.names)
        if name.startswith(scratch_prefix(source.domain.uuid)) and name.endswith(SUFFIX)
    ]
    return [_socket(source), *scratch]


def _roomiest(usable: list[Directory], free: dict[int, int], own: str, wanted: int) -> Directory | None:
    """Return the disk's own directory if it has room for everything, else the one with the most room."""
    for directory in usable:
        if directory.path == own and free[directory.filesystem] >= wanted:
            return directory
    return max(usable, key=lambda one: free[one.filesystem], default=None)


def chain_of(facts: Facts, name: str) -> str:
    """Return the beginning of the names of checkpoints for the replica of that name at the destination."""
    return _chain(facts.destination.host.identity.lasting, name)


def chain_by_uuid(facts: Facts, name: str) -> str:
    """Return how they began in version 0.1: by the host's UUID, which several hosts may have in common."""
    return _chain(facts.destination.abilities.uuid, name)


def _chain(host: str, name: str) -> str:
    return f"{domain_facts.CHECKPOINTS}{hashlib.sha256(f'{host}/{name}'.encode()).hexdigest()[:12]}."


def backup_job(facts: Facts, options: Options, name: str, operation: str, since: str) -> BackupJob | None:
    """Return the job that offers a running source's disks; None for a source that is shut off.

    `since`: the checkpoint since which the changes are wanted.
    """
    if facts.source.live is None:
        return None
    placed, _ = _scratch(facts.source)
    disks = tuple(
        BackupDisk(image.target, placed[image.target], _is_trackable(image))
        for image in facts.source.disk_images
        if image.target in placed
    )
    tracked = options.track and any(disk.trackable for disk in disks)
    return BackupJob(
        _socket(facts.source),
        disks,
        incremental=since if since in facts.source.domain.checkpoints else "",
        checkpoint=f"{chain_of(facts, name)}{operation}" if tracked else "",
    )


def _is_trackable(image: ImageFacts) -> bool:
    """Whether the image can hold a persistent dirty bitmap: qcow2 of version 3."""
    return image.format == "qcow2" and ("compat", "0.10") not in image.options


def stale_checkpoints(facts: Facts, name: str, since: str) -> tuple[str, ...]:
    """Return the checkpoints for this replica that earlier runs have left, but for `since`: nothing rests on them."""
    chain = chain_of(facts, name)
    return tuple(one for one in facts.source.domain.checkpoints if one.startswith(chain) and one != since)
