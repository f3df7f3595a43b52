"""How much a sync would send, found out without changing anything."""

from __future__ import annotations

from kvm_clone.hosts.host import Host
from kvm_clone.hosts.pool import Connected
from kvm_clone.planning.decide import Action
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.plan import Plan
from kvm_clone.progress import DiskProgress, OnEvent, Phase
from kvm_clone.transfer.compare import Side, differing, total


async def delta(plan: Plan, source: Connected, destination: Host, on_event: OnEvent) -> dict[str, int | None]:
    """Bytes that would be sent, by disk; None where only the run can tell. Raises TransferError and its kinds."""
    if plan.refusal() is not None or not plan.steps:
        return {disk.target: 0 for disk in plan.disks}
    if plan.decision.action is Action.STOP_REPLICA:
        return {disk.target: None if disk.base else disk.image.data for disk in plan.disks}
    host, libvirt = source
    if plan.backup is None:
        return {disk.target: await _compared(disk, host, destination, on_event) for disk in plan.disks}
    named: dict[str, int] = {}
    if plan.backup.incremental:
        named = await libvirt.changed_since(plan.facts.source.domain.name, plan.backup.incremental)
    return {disk.target: named.get(disk.target) if disk.base else disk.image.data for disk in plan.disks}


async def _compared(disk: PlannedDisk, source: Host, destination: Host, on_event: OnEvent) -> int:
    """What differs between the source's image and what the destination has."""
    size = disk.image.virtual_size
    if disk.base is None or not size:
        return disk.image.data
    if disk.staged is not None:
        theirs = Side(destination, disk.at(disk.staged.part))
        end = size
    else:
        theirs = Side(destination, disk.base)
        end = min(size, disk.base.virtual_size)
    ours = Side(source, disk.source)

    def on_done(done: int) -> None:
        on_event(DiskProgress(Phase.COMPARE, disk.target, done, end))

    grown = await ours.data_in(((end, size),)) if size > end else 0
    return total(await differing(ours, theirs, ((0, end),), on_done)) + grown
