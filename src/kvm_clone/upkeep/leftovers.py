"""What interrupted operations have left on a host, and its removal."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libvirt

from kvm_clone.agent.host import uses
from kvm_clone.definition import marks
from kvm_clone.errors import KvmCloneError, RefusedError, TransferError
from kvm_clone.execution import replica
from kvm_clone.hosts import connections, domains, live, vms
from kvm_clone.hosts.domains import Fenced
from kvm_clone.hosts.host import Host
from kvm_clone.planning import domain_facts
from kvm_clone.tasks import together


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


async def find(host: Host, connection: libvirt.virConnect, more: frozenset[str] = frozenset()) -> list[StagedData]:
    """Everything with our mark in the directories of the host's pools, and in `more`. Raises TransferError."""
    paths = sorted({*await _directories(host, connection), *more})
    answers = await host.agent.staged(directories=paths)
    return [_data(host.name, answer, tuple(paths)) for answer in answers]


async def _directories(host: Host, connection: libvirt.virConnect) -> list[str]:
    """The directories of the host's pools."""
    with domains.failing_as(f"asking libvirt on {host.name}", host.name):
        pools = await asyncio.to_thread(domains.pools, connection)
    return [pool.path for pool in pools if pool.path and pool.type in domain_facts.FILE_POOLS]


async def sweep(host: Host, connection: libvirt.virConnect) -> list[str]:
    """Remove what operations have left that ended before they had begun; the files. Raises TransferError."""
    return list(await host.agent.sweep(directories=await _directories(host, connection)))


def _data(host: str, answer: Mapping[str, Any], directories: tuple[str, ...]) -> StagedData:
    if "error" in answer:
        return StagedData(host, answer["directory"], answer["path"], error=answer["error"])
    return StagedData(
        host,
        answer["directory"],
        answer["path"],
        answer["operation"],
        answer["name"],
        answer.get("source", {}).get("host", ""),
        answer["active"],
        answer["defining"],
        sum(disk["allocated"] for disk in answer["disks"].values()),
        max(0.0, time.time() - answer["changed"]),
        committed=answer["committed"],
        kind=answer.get("kind", "clone"),
        published=tuple(answer["published"]),
        remove=tuple(answer["remove"]),
        foreign=answer["foreign"],
        directories=directories,
    )


async def remove(host: Host, connection: libvirt.virConnect, data: StagedData) -> str:
    """Undo the operation, or finish it if it has committed; what was done.

    Raises LockedError when it is running, RefusedError for what cannot be told to be safe, TransferError and its kinds.
    """
    if data.error:
        raise RefusedError(f"{data.path} on {host.name} was left as it is: {data.error}", subject=data.path)
    if data.foreign:
        return f"left to {data.foreign}, whose operation it is"
    if data.defining:
        with domains.failing_as(f"asking {host.name} for {data.name!r}", data.name):
            committed = await asyncio.to_thread(domains.defined_by, connection, data.name, data.operation)
        if not committed:
            await _check_unused(host, connection, data)
        await host.agent.settle(**data.where, committed=committed)
        if committed:
            return await _finish(host, connection, data)
    elif data.published:
        await _check_unused(host, connection, data)
    left = await host.agent.recover(**data.where)
    if left:
        raise TransferError(f"{data.name} on {host.name}: {'; '.join(left)}", subject=data.path)
    return "removed"


async def abandoned_jobs(host: Host, connection: libvirt.virConnect) -> list[live.OurJob]:
    """The backup jobs of ours on the host that nobody reads any more. Raises TransferError."""
    with domains.failing_as(f"asking libvirt on {host.name} for backup jobs", host.name):
        jobs = await asyncio.to_thread(live.our_jobs, connection)
    readers = await together(*(host.agent.reader(domain=job.uuid) for job in jobs))
    return [job for job, reader in zip(jobs, readers, strict=True) if not reader]


async def end_job(host: Host, connection: libvirt.virConnect, job: live.OurJob) -> None:
    """End such a job. Raises LockedError when somebody has begun to read the VM meanwhile, TransferError."""
    await host.agent.guard(domain=job.uuid, socket=job.files[0], operation="cleanup")
    try:
        with domains.failing_as(f"ending the backup job of {job.name} on {host.name}", job.name):
            await asyncio.to_thread(live.end, connection, job.name)
        await host.agent.remove_scratch(paths=list(job.files))
    finally:
        await host.agent.unguard()


async def _finish(host: Host, connection: libvirt.virConnect, data: StagedData) -> str:
    """Do what an operation that has committed left to do: its disks are merged, and its journal removed."""
    await host.agent.stage(**data.where, about={}, finishing=True)
    fenced: Fenced | None = None
    try:
        fenced = await connections.open_fenced(host)
        with domains.failing_as(f"asking {host.name} for {data.name!r}", data.name):
            domain = await asyncio.to_thread(domains.find, connection, data.name)
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
            await connections.close(fenced.connection)
        with contextlib.suppress(KvmCloneError):  # an agent that cannot be told lets go by itself
            await host.agent.release()
    return "; ".join(["it had committed: its journal was removed, the VM stays", *kept])


async def _check_unused(host: Host, connection: libvirt.virConnect, data: StagedData) -> None:
    """A VM that has got another name, or was undefined to be defined again, has its disks still.

    Where libvirt may have had the definition, what cannot be established counts as used.
    """
    known = await vms.users(host, connection)
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
