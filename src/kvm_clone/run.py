"""Running a plan: what each step does, and how all of it is undone.

The destination's agent journals every step before it changes anything (agent/stage.py), so that undoing needs the
journal alone: this process may undo, or the agent when this process is gone, or the next run when both are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import libvirt

from kvm_clone import definition, domains, transport
from kvm_clone.agent import journal
from kvm_clone.agent.digest import SEGMENT
from kvm_clone.errors import KvmCloneError, LockedError, TransferError, VerificationError
from kvm_clone.host import Host
from kvm_clone.plan import (
    BeginStage,
    CheckSource,
    CopyDisks,
    CreateDisk,
    DefineDomain,
    EndStage,
    Plan,
    PlannedDisk,
    ProveDisks,
    PublishDisk,
    Step,
)
from kvm_clone.progress import DiskProgress, Note, OnEvent, Phase, PhaseStarted
from kvm_clone.tasks import together
from kvm_clone.version import __version__

log = logging.getLogger(__name__)

_LOCK_PATIENCE_SECONDS = 45.0
"""How long a roll-back waits for a cut-off agent to let go of its lock: longer than that agent's own patience."""

Reconnect = Callable[[], Awaitable[Host]]


@dataclass
class Outcome:
    """What a run found out on its way."""

    sent: int = 0
    verified: bool = False
    copy_seconds: float = 0.0
    prove_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class Run:
    """One run of one plan."""

    def __init__(
        self,
        plan: Plan,
        source: Host,
        destination: Host,
        connection: libvirt.virConnect,
        reconnect: Reconnect,
        on_event: OnEvent,
    ) -> None:
        self._plan = plan
        self._source = source
        self._destination = destination
        self._libvirt = connection
        self._reconnect = reconnect
        self._on_event = on_event
        self._outcome = Outcome()
        self._parts: dict[str, str] = {}
        self._begun = False
        self._defining = False

    async def run(self) -> Outcome:
        """Take every step; on any failure or cancellation undo them all and raise what went wrong."""
        watch = [asyncio.create_task(host.wait_lost()) for host in (self._source, self._destination)]
        try:
            work = asyncio.create_task(self._steps())
            try:
                await asyncio.wait([work, *watch], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                await self._stop(work)
                if not work.cancelled() and work.exception() is None:
                    return self._outcome  # it was past the commit already
                raise
            lost = next((task for task in watch if task.done()), None)
            if not work.done() and lost is not None:
                await self._stop(work)
                lost.result()
            await work
        except BaseException as error:
            await asyncio.shield(self._roll_back(error))
            raise
        finally:
            for task in watch:
                task.cancel()
            await asyncio.gather(*watch, return_exceptions=True)
        return self._outcome

    async def _stop(self, work: asyncio.Task[None]) -> None:
        """Stop the steps, but let the commit end: it is short, and half of it is nobody's wish."""
        if not self._defining:
            work.cancel()
        await asyncio.wait([work])

    async def _steps(self) -> None:
        for step in self._plan.steps:
            log.info("%s", step)
            await self._take(step)

    async def _take(self, step: Step) -> None:
        match step:
            case BeginStage(directory):
                await self._begin(directory)
            case CreateDisk(disk):
                await self._create(disk)
            case CopyDisks(disks):
                await self._copy(disks)
            case ProveDisks(disks):
                await self._prove(disks)
            case CheckSource(disks):
                await self._check_source(disks)
            case PublishDisk(disk):
                await self._destination.call("publish", disk=disk.target, final=disk.final)
            case DefineDomain(uuid):
                await self._define(uuid)
            case EndStage(directories):
                await self._end(directories)

    async def _begin(self, directory: str) -> None:
        self._on_event(PhaseStarted(Phase.PREPARE, f"staging in {directory} on {self._destination.name}"))
        name, operation = self._plan.name, self._plan.identity.operation
        await settle_earlier(self._destination, self._libvirt, directory, name)
        about = {"controller": platform.node(), "process": os.getpid(), "version": __version__}
        await self._destination.call("stage", directory=directory, name=name, operation=operation, about=about)
        self._begun = True

    async def _create(self, disk: PlannedDisk) -> None:
        image = disk.image
        spec = {
            "format": image.format,
            "size": image.virtual_size,
            "options": dict(image.options),
            "mode": image.mode,
            "user": image.user,
            "group": image.group,
        }
        part = await self._destination.call("create", disk=disk.target, final=disk.final, spec=spec)
        self._parts[disk.target] = part

    async def _copy(self, disks: tuple[PlannedDisk, ...]) -> None:
        total = sum(disk.image.data for disk in disks)
        self._on_event(PhaseStarted(Phase.COPY, f"{self._plan.route} route: {self._plan.route_reason}"))
        jobs = [transport.Job(disk.image.path, self._parts[disk.target], disk.image.format) for disk in disks]

        def on_written(written: list[int]) -> None:
            self._outcome.sent = sum(written)
            for disk, done in zip(disks, written, strict=True):
                self._on_event(DiskProgress(Phase.COPY, disk.target, done, disk.image.data))

        started = time.monotonic()
        on_written([0] * len(disks))
        options = self._plan.options
        await transport.copy(
            self._source,
            self._destination,
            self._plan.route,
            jobs,
            parallel=options.parallel,
            rate=options.bandwidth_limit,
            on_written=on_written,
        )
        self._outcome.copy_seconds = time.monotonic() - started
        log.info("copied %d of %d bytes", self._outcome.sent, total)
        for disk in disks:
            await self._note(journal.COPIED, disk=disk.target, bytes=disk.image.data)

    async def _prove(self, disks: tuple[PlannedDisk, ...]) -> None:
        self._on_event(PhaseStarted(Phase.PROVE, "digesting the disks on both hosts"))
        started = time.monotonic()
        room = asyncio.Semaphore(self._plan.options.parallel)
        for disk in disks:
            self._on_event(DiskProgress(Phase.PROVE, disk.target, 0, disk.image.virtual_size))

        async def one(disk: PlannedDisk) -> None:
            async with room:
                await self._prove_disk(disk)

        await together(*(one(disk) for disk in disks))
        self._outcome.verified = True
        self._outcome.prove_seconds = time.monotonic() - started

    async def _prove_disk(self, disk: PlannedDisk) -> None:
        size = disk.image.virtual_size
        state = [0, 0]

        def progress_of(end: int) -> Callable[[dict[str, Any]], None]:
            def progress(answer: dict[str, Any]) -> None:
                state[end] = answer["done"]
                self._on_event(DiskProgress(Phase.PROVE, disk.target, min(state), size))

            return progress

        format_ = disk.image.format
        ours, theirs = await together(
            self._source.call("digest", progress_of(0), path=disk.image.path, image_format=format_),
            self._destination.call("digest", progress_of(1), path=self._parts[disk.target], image_format=format_),
        )
        differing = compare(ours, theirs)
        if differing:
            where = ", ".join(f"{start}" for start in differing[:5])
            raise VerificationError(
                f"disk {disk.target} differs after the copy in {len(differing)} of {len(ours)} segments, the first at "
                f"byte {where}",
                subject=disk.image.path,
                remedy="check the memory and storage of both hosts; then run the command again",
            )
        await self._note(journal.PROVEN, disk=disk.target)

    async def _check_source(self, disks: tuple[PlannedDisk, ...]) -> None:
        for disk in disks:
            now = await self._source.call("fingerprint", path=disk.image.path)
            if not same_content(now, disk.image.fingerprint):
                raise TransferError(
                    f"the source's image {disk.image.path} was changed while it was being copied",
                    subject=disk.target,
                    remedy="find out what writes to it, then run the command again",
                )

    async def _define(self, uuid: str) -> None:
        self._on_event(PhaseStarted(Phase.COMMIT, f"defining {self._plan.name} on {self._destination.name}"))
        xml = self._definition()
        self._defining = True
        await self._note(journal.DEFINE, uuid=uuid)
        with domains.failing_as(f"{self._destination.name} refuses the definition", self._plan.name):
            await asyncio.to_thread(domains.define, self._libvirt, xml)
        await self._after_commit(self._note(journal.COMMITTED))

    async def _end(self, directories: tuple[str, ...]) -> None:
        await self._after_commit(self._destination.call("finish"))
        await self._after_commit(asyncio.to_thread(domains.refresh_pools, self._libvirt, set(directories)))

    async def _after_commit(self, work: Awaitable[Any]) -> None:
        """Past the commit the clone is whole: a failure is told, and changes nothing."""
        try:
            await work
        except (KvmCloneError, libvirt.libvirtError) as error:
            text = f"the clone is complete, but tidying up failed: {error}"
            self._outcome.warnings.append(text)
            self._on_event(Note(text, warning=True))

    async def _note(self, record: str, /, **fields: Any) -> None:
        await self._destination.call("note", record=record, fields=fields)

    def _definition(self) -> str:
        plan = self._plan
        source, identity, options = plan.facts.source, plan.identity, plan.options
        provenance = definition.Provenance(
            operation=identity.operation,
            source_host=source.host.hostname,
            source_uuid=source.domain.uuid,
            source_name=source.domain.name,
            fingerprint=";".join(f"{image.target}={image.fingerprint}" for image in source.images),
            version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            verified=self._outcome.verified,
        )
        change = definition.Change(
            new_name=plan.name,
            provenance=provenance,
            new_uuid=None if options.preserve_uuid else identity.uuid,
            new_macs=None if options.preserve_mac else identity.macs,
            disk_paths={disk.target: disk.final for disk in plan.disks},
        )
        return definition.rewrite(source.domain.xml, change)

    async def _roll_back(self, cause: BaseException) -> None:
        """Undo everything, newest first. What cannot be undone is added to the error's remedy, never hidden."""
        if not self._begun:
            return
        self._on_event(PhaseStarted(Phase.ROLL_BACK, f"undoing what was written on {self._destination.name}"))
        try:
            left = await self._undo()
        except (KvmCloneError, libvirt.libvirtError) as error:
            left = [f"{error}; the next run of this command undoes it first"]
        for text in left:
            self._on_event(Note(f"could not be undone: {text}", warning=True))
        if left and isinstance(cause, KvmCloneError):
            cause.remedy = "; ".join(filter(None, [cause.remedy, f"not undone: {', '.join(left)}"]))

    async def _undo(self) -> list[str]:
        if self._destination.lost:
            self._destination = await self._reconnect()
            directory = next(step.directory for step in self._plan.steps if isinstance(step, BeginStage))
            return await self._undo_from_journal(directory)
        if self._defining and await self._committed():
            return [f"{self._plan.name} was defined before the failure, and is complete"]
        left: list[str] = await self._destination.call("undo", past_commit=self._defining)
        return left

    async def _committed(self) -> bool:
        name, operation = self._plan.name, self._plan.identity.operation
        return await asyncio.to_thread(domains.defined_by, self._libvirt, name, operation)

    async def _undo_from_journal(self, directory: str) -> list[str]:
        """Undo through a new agent what an agent that is gone had begun, once its lock is free."""
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                return await self._destination.call("recover", directory=directory, name=self._plan.name)  # type: ignore[no-any-return]
            except LockedError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1.0)


def compare(ours: list[str], theirs: list[str]) -> list[int]:
    """Where two lists of segment digests differ: the segments' first bytes."""
    count = max(len(ours), len(theirs))
    return [number * SEGMENT for number in range(count) if ours[number : number + 1] != theirs[number : number + 1]]


def same_content(one: str, other: str) -> bool:
    """Whether nothing was written between two fingerprints of agent.facts.

    The last field, ctime, also changes when libvirt gives a file to QEMU's user for a start that our lock then refuses.
    """
    return one.rpartition(":")[0] == other.rpartition(":")[0]


async def settle_earlier(host: Host, connection: libvirt.virConnect, directory: str, name: str) -> None:
    """End an earlier operation that was interrupted at its commit: libvirt knows on which side of it."""
    earlier = await host.call("unsettled", directory=directory, name=name)
    if earlier is not None:
        committed = earlier["committed"] or await asyncio.to_thread(
            domains.defined_by, connection, name, earlier["operation"]
        )
        await host.call("settle", directory=directory, name=name, committed=committed)
