"""A running source's point in time: the backup job that offers it, the guest's freeze around its start, its scratch.

The source's agent watches meanwhile (agent/watchdog.py): should this process die, it thaws the guest and ends the job.
"""

from __future__ import annotations

import asyncio
import posixpath
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from kvm_clone.agent.disks import nbd
from kvm_clone.agent.disks.image import NBD
from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.errors import InterruptedTransferError, KvmCloneError, RefusedError, TransferError
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.locks import once_free
from kvm_clone.image import Image
from kvm_clone.options import Quiesce
from kvm_clone.planning import domain_facts
from kvm_clone.planning.domain_facts import BackupJob
from kvm_clone.planning.facts import SourceFacts
from kvm_clone.planning.live_checks import stale_files
from kvm_clone.progress import Note, OnEvent
from kvm_clone.transfer.compare import aligned
from kvm_clone.transfer.content import Offer
from kvm_clone.units import format_bytes

_WATCH_SECONDS = 0.5
_LEAST_FREE = 32 << 20
"""Bytes that have to stay free where scratch lies: with none left QEMU would fail the guest's own writes."""

_LOOKS_AHEAD = 4
"""So many times what was used up since the last look has to stay free as well: a guest may write faster yet."""

_THAW_SECONDS = 30.0
_THAW_PAUSE = 0.5
"""How long thawing is tried, and the pause between two tries."""


class Consistency(StrEnum):
    """What the copied state is: of a VM that was shut down, with frozen filesystems, or as after a power cut."""

    OFFLINE = "offline"
    FILESYSTEM = "filesystem"
    CRASH = "crash"


@dataclass(frozen=True)
class PointInTime:
    """What is known of the source's point in time.

    `frozen_seconds`: for how long the guest's filesystems were frozen for it; `scratch_bytes`: what its backup job
    took. `checkpoint`: what was left on the source for the next sync. `no_bitmap_reason`: why no dirty bitmap was used.
    """

    consistency: Consistency = Consistency.OFFLINE
    frozen_seconds: float = 0.0
    scratch_bytes: int = 0
    checkpoint: str = ""
    no_bitmap_reason: str = ""


@dataclass(frozen=True)
class Guarding:
    """For which operation the source's agent keeps watch, and how long its lock is waited for, in seconds."""

    operation: str
    patience: float = 0.0


class Backup:
    """One backup job of one running source."""

    def __init__(self, host: Host, libvirt: LibvirtHost, source: SourceFacts, on_event: OnEvent) -> None:
        self._host = host
        self._libvirt = libvirt
        self._source = source
        self._on_event = on_event
        self._job: BackupJob | None = None
        self._guarded = False
        self._can_thaw = False
        self._frozen = False
        at_rest = Consistency.CRASH if source.domain.managed_save else Consistency.OFFLINE
        self.point_in_time = PointInTime(at_rest)

    def _know(self, **found: Any) -> None:
        self.point_in_time = replace(self.point_in_time, **found)

    async def begin(
        self, job: BackupJob, quiesce: Quiesce, stale: tuple[str, ...], guarding: Guarding
    ) -> dict[str, Offer]:
        """Begin the job; where each disk is read. Raises LockedError, RefusedError, TransferError and its kinds."""
        name = self._source.domain.name
        watched = self._source.domain.uuid, job.socket, guarding.operation
        self._can_thaw = await once_free(lambda: self._host.agent.guard(*watched), patience=guarding.patience)
        self._guarded = True
        await self._libvirt.end_job(name)
        await self._host.agent.remove_scratch(paths=stale_files(self._source))
        await self._delete(stale)
        self._job = job
        frozen = await self._freeze(quiesce)
        started = time.monotonic()
        lasted = False
        try:
            self._job = await self._start(job)
        finally:
            if frozen:
                lasted = await self._thaw(frozen)
                self._know(frozen_seconds=time.monotonic() - started)
        self._know(consistency=Consistency.FILESYSTEM if lasted else Consistency.CRASH)
        if frozen and not lasted:
            self._thawed_early(quiesce)
        self._on_event(Note(f"{name} is copied while it runs: {self._describe()}"))
        return {disk.target: await self._origin(disk) for disk in self._job.disks}

    def _thawed_early(self, quiesce: Quiesce) -> None:
        """The guest was thawed by somebody else, perhaps before the point in time."""
        name = self._source.domain.name
        text = f"the guest of {name} was thawed before it was asked to: the copy is crash-consistent"
        if quiesce is Quiesce.REQUIRE:
            raise RefusedError(text, subject=name, remedy="run the command again, or use --quiesce auto")
        self._on_event(Note(text, warning=True))

    def _describe(self) -> str:
        if self.point_in_time.consistency is Consistency.FILESYSTEM:
            return f"its filesystems were frozen for {self.point_in_time.frozen_seconds:.2f} s"
        return "crash-consistent, as after a power cut"

    async def _start(self, job: BackupJob) -> BackupJob:
        """Begin the job with the bitmap if libvirt has a good one, else without."""
        self._know(checkpoint=job.checkpoint)
        if job.incremental:
            refusal = await self._libvirt.try_job(self._source.domain.name, job)
            if not refusal:
                return job
            self._know(no_bitmap_reason=f"libvirt has no good bitmap: {refusal}")
        plain = BackupJob(job.socket, job.disks, checkpoint=job.checkpoint)
        await self._libvirt.begin_job(self._source.domain.name, plain)
        return plain

    async def _freeze(self, quiesce: Quiesce) -> int:
        """Freeze the guest's filesystems, if that is wanted and can be had; how many."""
        assert self._source.live is not None
        if quiesce is Quiesce.OFF or not self._source.live.agent:
            return 0
        name = self._source.domain.name
        if not self._can_thaw:
            text = f"{self._host.name} has no virsh, by which the guest of {name} would be thawed if this process died"
            if quiesce is Quiesce.REQUIRE:
                raise RefusedError(text, subject=name, remedy=f"install libvirt-clients on {self._host.name}")
            self._on_event(Note(f"{text}: it is not frozen, and the copy is crash-consistent", warning=True))
            return 0
        await self._host.agent.freezing(frozen=True)
        self._frozen = True
        try:
            found = await self._libvirt.freeze(name)
        except BaseException:
            await self._thaw_what_may_be()
            raise
        if found.refusal:
            await self._thaw_what_may_be(found.perhaps)
            text = f"the guest of {name} cannot be frozen: {found.refusal}"
            if quiesce is Quiesce.REQUIRE:
                raise RefusedError(text, subject=name, remedy="use --quiesce auto")
            self._on_event(Note(text, warning=True))
        elif not found.count:
            await self._thaw(0)
            self._on_event(Note(f"the guest of {name} has no filesystem that can be frozen"))
        return found.count

    async def _thaw_what_may_be(self, perhaps: bool = True) -> None:
        """After a freeze that came to no good end: one that took too long may still come about."""
        try:
            if perhaps:
                await self._thaw(None)
            else:
                await self._thawed()
        except TransferError as error:
            self._on_event(Note(f"{error}; {error.remedy}", warning=True))

    async def _thaw(self, count: int | None) -> bool:
        """Thaw the guest, whatever happens; whether it was frozen until now.

        `count`: how many filesystems were frozen, None if that is not known.
        """
        name, deadline = self._source.domain.name, time.monotonic() + _THAW_SECONDS
        while (found := await self._libvirt.thaw(name, count)).trouble:
            if time.monotonic() >= deadline:
                raise TransferError(
                    f"the guest of {name} does not say that it is thawed: {found.trouble}",
                    subject=name,
                    remedy=f"thaw it: virsh domfsthaw {name}",
                )
            await asyncio.sleep(_THAW_PAUSE)
        await self._thawed()
        return found.lasted

    async def _thawed(self) -> None:
        self._frozen = False
        await self._host.agent.freezing(frozen=False)

    async def _origin(self, disk: domain_facts.BackupDisk) -> Offer:
        assert self._job is not None
        uri = nbd.uri(self._job.socket, disk.target)
        image = Image(uri, NBD)
        size = next(one.virtual_size for one in self._source.images if one.target == disk.target)
        if not (self._job.incremental and disk.trackable):
            return Offer(image)
        try:
            found = await self._host.agent.dirty(uri=uri, bitmap=f"backup-{disk.target}")
        except AgentCallError as error:
            if error.kind != kinds.MISSING:
                raise
            self._know(no_bitmap_reason=f"the bitmap of {disk.target} cannot be read: {error}")
            return Offer(image)
        return Offer(image, aligned(found, size))

    async def watch(self) -> None:
        """Return never; raise InterruptedTransferError when scratch runs out, before the guest feels it."""
        before: dict[str, int] = {}
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for directory in {posixpath.dirname(disk.scratch) for disk in (self._job.disks if self._job else ())}:
                free = await self._host.agent.free(path=directory)
                used = before.get(directory, free) - free
                before[directory] = free
                if free < max(_LEAST_FREE, _LOOKS_AHEAD * used):
                    raise InterruptedTransferError(
                        f"{directory} on {self._host.name} has only {format_bytes(free)} left for what the guest "
                        "writes meanwhile; the copy was ended before that could hurt it",
                        subject=self._source.domain.name,
                        remedy="make room there, or copy when the guest writes less",
                    )

    async def end(self) -> None:
        """End the job, and remove scratch and socket, which a killed QEMU leaves; without a job nothing."""
        if self._frozen:
            await self._thaw_what_may_be()
        if self._job is not None:
            self._know(scratch_bytes=await self._libvirt.end_job(self._source.domain.name))
            job, self._job = self._job, None
            await self._host.agent.remove_scratch(paths=[job.socket, *(disk.scratch for disk in job.disks)])
        if self._guarded:
            self._guarded = False
            await self._host.agent.unguard()

    async def give_up(self) -> None:
        """End what was begun after a failure; what cannot be reached now, the source's agent or the next run ends."""
        try:
            await self.end()
        except KvmCloneError as error:
            self._on_event(Note(f"the backup job is left to the next run: {error}", warning=True))

    async def forget(self) -> None:
        """Delete the checkpoint that this run has made: no replica has its state."""
        if self.point_in_time.checkpoint:
            made = self.point_in_time.checkpoint
            self._know(checkpoint="")
            await self._delete((made,))

    async def _delete(self, names: tuple[str, ...]) -> None:
        """Delete checkpoints that nothing rests on; one that cannot be deleted harms nobody, and the next run tries."""
        try:
            await self.drop(names)
        except KvmCloneError as error:
            self._on_event(Note(f"a checkpoint is left to the next run: {error}", warning=True))

    async def drop(self, names: tuple[str, ...]) -> None:
        """Delete checkpoints of ours that nothing rests on any more. Raises TransferError."""
        await self._libvirt.delete_checkpoints(self._source.domain.name, names)
