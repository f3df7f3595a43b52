"""Findings about two hosts, VMs or disks that are the same one. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvm_clone.findings import Finding, Severity, block
from kvm_clone.planning.facts import Facts
from kvm_clone.planning.identity import same_file, shared

SAME_VM = "same-vm"


def identity_findings(facts: Facts, name: str) -> Iterator[Finding]:
    """Yield why the VM of that name at the destination must not be changed: it is the source, or has its disks.

    No flag overrides these.
    """
    source, there = facts.source, facts.destination
    if facts.one_host and name == source.domain.name:
        text = f"{source.host.name}, the source, and {there.host.name} are one host: {name} on it is the source itself."
        yield block(SAME_VM, name, text, "choose another name for the copy, or name another host")
        return
    own = {disk.path: source.files.get(disk.path, "") for disk in source.xml.own_disks if disk.path}
    theirs = there.existing.files if there.existing is not None else {}
    for ours, other in shared(own, theirs, one_host=facts.one_host):
        text = (
            f"VM {name} on {there.host.name} has {other}, which is the source's own disk {ours}: both hosts see one "
            "filesystem, and both define one VM."
        )
        yield block(SAME_VM, name, text, "choose another name for the copy, or undefine that VM and keep its disks")


def duplicate_findings(facts: Facts) -> Iterator[Finding]:
    """Yield the disks of the source that are one file under several names: in the copy each would get its own file."""
    source = facts.source
    disks = [disk for disk in source.xml.disks if disk.path and disk.path in source.files]
    for index, disk in enumerate(disks):
        for other in disks[index + 1 :]:
            ours, theirs = source.files[disk.path or ""], source.files[other.path or ""]
            apart = disk.path != other.path and {disk, other} & set(source.xml.own_disks)
            if apart and same_file(ours, theirs, one_host=True):
                text = f"Disks {disk.target} ({disk.path}) and {other.target} ({other.path}) are one file."
                yield block("disk-duplicate", disk.target, text, "give each disk a file of its own")


def replica_findings(facts: Facts) -> Iterator[Finding]:
    """Yield the disks of the replica that are one file: both overlays would be merged into it."""
    images = facts.destination.existing.images if facts.destination.existing is not None else ()
    for index, image in enumerate(images):
        for other in images[index + 1 :]:
            if same_file(image.fingerprint, other.fingerprint, one_host=True):
                both = f"{image.target} ({image.path}) and {other.target} ({other.path})"
                text = f"Disks {both} of the replica are one file."
                yield block("replica-duplicate", image.target, text, "replace the replica: kvm-clone clone --force")


def kept_findings(facts: Facts) -> Iterator[Finding]:
    """Yield the files of the replaced VM that are not removed, and why."""
    existing = facts.destination.existing
    for path, why in existing.kept if existing is not None else ():
        text = f"{path}, a disk of the VM that is replaced, stays on {facts.destination.host.name}: {why}."
        yield Finding("file-kept", Severity.WARNING, path, text, "remove it by hand once nothing needs it")
