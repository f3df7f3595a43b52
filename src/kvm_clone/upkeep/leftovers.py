"""What interrupted operations have left on a host, and its removal."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from kvm_clone.agent.host import uses
from kvm_clone.definition import marks, variables
from kvm_clone.errors import KvmCloneError, RefusedError, TransferError
from kvm_clone.execution import replica
from kvm_clone.gather import together
from kvm_clone.hosts import connections, live, vms
from kvm_clone.hosts.answers import Journalled
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import FencedLibvirt, LibvirtHost
from kvm_clone.planning import domain_facts


@dataclass(frozen=True)
class StagedData:
    """One operation's journal and staged files. `size` in bytes on disk, `age` in seconds since it last changed.

    `kind`: clone or sync. `committed`: libvirt is known to have had the definition. `published`: the files that have
    their final names already. `remove`: files of the VM that it replaces, as the journal has them. `foreign`: the other
    host that it belongs to. `directories`: where its files may lie.
    """

    host: str
    directory: str
    path: str
    operation: str = ""
    name: str = ""
    source: str = ""
    active: bool = False
    defining: bool = False
    size: int = 0
    age: float = 0.0
    error: str = ""
    kind: str = "clone"
    committed: bool = False
    published: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    foreign: str = ""
    directories: tuple[str, ...] = ()

    @property
    def where(self) -> dict[str, Any]:
        """The operation, as calls of the agent name it."""
        known = {"directory": self.directory, "name": self.name, "operation": self.operation}
        return {**known, "directories": list(self.directories)}


async def find(host: Host, libvirt: LibvirtHost, more: frozenset[str] = frozenset()) -> list[StagedData]:
    """Everything with our mark in the directories of the host's pools, and in `more`. Raises TransferError."""
    paths = sorted({*await _directories(libvirt), *more})
    answers = await host.agent.staged(directories=paths)
    return [_data(host.name, answer, tuple(paths)) for answer in answers]


async def _directories(libvirt: LibvirtHost) -> list[str]:
    """The directories of the host's pools, and where UEFI variables are."""
    pools = [pool.path for pool in await libvirt.pools() if pool.path and pool.type in domain_facts.FILE_POOLS]
    return [*pools, variables.DIRECTORY]


async def sweep(host: Host, libvirt: LibvirtHost) -> list[str]:
    """Remove what operations have left that ended before they had begun; the files. Raises TransferError."""
    return list(await host.agent.sweep(directories=await _directories(libvirt)))


def _data(host: str, one: Journalled, directories: tuple[str, ...]) -> StagedData:
    if one.error:
        return StagedData(host, one.directory, one.path, error=one.error)
    return StagedData(
        host,
        one.directory,
        one.path,
        one.operation,
        one.name,
        one.source.host,
        one.active,
        one.defining,
        sum(disk.allocated for disk in one.disks.values()),
        max(0.0, time.time() - one.changed),
        committed=one.committed,
        kind=one.kind,
        published=one.published,
        remove=one.remove,
        foreign=one.foreign,
        directories=directories,
    )


async def remove(host: Host, libvirt: LibvirtHost, data: StagedData) -> str:
    """Undo the operation, or finish it if it has committed; what was done.

    Raises LockedError when it is running, RefusedError for what is not known to be safe, TransferError and its kinds.
    """
    if data.error:
        raise RefusedError(f"{data.path} on {host.name} was left as it is: {data.error}", subject=data.path)
    if data.foreign:
        return f"left to {data.foreign}, whose operation it is"
    if data.defining:
        committed = await libvirt.defined_by(data.name, data.operation)
        if not committed:
            await _check_unused(host, libvirt, data)
        await host.agent.record_outcome(**data.where, committed=committed)
        if committed:
            return await _finish(host, libvirt, data)
    elif data.published:
        await _check_unused(host, libvirt, data)
    left = await host.agent.recover(**data.where)
    if left:
        raise TransferError(f"{data.name} on {host.name}: {'; '.join(left)}", subject=data.path)
    return "removed"


async def abandoned_jobs(host: Host, libvirt: LibvirtHost) -> list[live.OurJob]:
    """The backup jobs of ours on the host that nobody reads any more. Raises TransferError."""
    jobs = await libvirt.our_jobs()
    readers = await together(*(host.agent.reader(domain=job.uuid) for job in jobs))
    return [job for job, reader in zip(jobs, readers, strict=True) if not reader]


async def end_job(host: Host, libvirt: LibvirtHost, job: live.OurJob) -> None:
    """End such a job. Raises LockedError when somebody has begun to read the VM meanwhile, TransferError."""
    await host.agent.guard(domain=job.uuid, socket=job.files[0], operation="cleanup")
    try:
        await libvirt.end_job(job.name)
        await host.agent.remove_scratch(paths=list(job.files))
    finally:
        await host.agent.unguard()


async def _finish(host: Host, libvirt: LibvirtHost, data: StagedData) -> str:
    """Do what an operation that has committed left to do: its disks are merged, and its journal removed."""
    await host.agent.stage(**data.where, about={}, finishing=True)
    fenced: FencedLibvirt | None = None
    try:
        fenced = await connections.open_fenced(host)
        domain = await libvirt.find(data.name)
        pending = marks.read_pending(domain.xml) if domain is not None else None
        await replica.merge(host, fenced, data.name)
        kept: tuple[str, ...] = ()
        if pending is not None and pending.operation == data.operation:
            kept = (
                await vms.remove_replaced(
                    host, fenced, data.name, pending.remove, pending.forget, contents=pending.contents
                )
            ).kept
        await replica.seal(host, fenced, data.name)
        await host.agent.finish()
    finally:
        if fenced is not None:
            await fenced.close()
        with contextlib.suppress(KvmCloneError):  # an agent that cannot be reached releases it by itself
            await host.agent.release()
    return "; ".join(["it had committed: its journal was removed, the VM stays", *kept])


async def _check_unused(host: Host, libvirt: LibvirtHost, data: StagedData) -> None:
    """A VM that has got another name, or was undefined to be defined again, has its disks still.

    Where libvirt may have had the definition, what cannot be established counts as used.
    """
    known = await vms.users(libvirt)
    found = await vms.judge(host, known, data.published, processes=True)
    doubtful = (uses.USED, uses.UNKNOWN) if data.defining else (uses.USED,)
    used = [f"{use.path}: {use.why}" for use in found if use.state in doubtful]
    if used:
        why, remedy = "; ".join(used), f"give the VM that has it the name {data.name} again, or remove it"
    elif data.committed and data.published:
        why = f"VM {data.name} was complete, and is gone; {', '.join(data.published)} may be all that is left of it"
        remedy = "define it again, or remove the journal and those files by hand"
    else:
        return
    raise RefusedError(f"{data.path} on {host.name} was left as it is: {why}", subject=data.path, remedy=remedy)
