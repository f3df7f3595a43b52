"""Running a plan: what each step does, and what becomes of it when one fails.

The destination's agent journals every step before it changes anything (agent/stage.py), so that undoing and going on
need the journal alone: this process may do it, or the agent when this process is gone, or the next run when both are.
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

from kvm_clone import definition, domains, vms
from kvm_clone.agent import journal
from kvm_clone.content import Content, Totals
from kvm_clone.errors import InterruptedTransferError, KvmCloneError, LockedError
from kvm_clone.host import Host
from kvm_clone.placement import PlannedDisk
from kvm_clone.plan import (
    BeginStage,
    CheckSource,
    CopyDisks,
    CreateDisk,
    DefineDomain,
    DiscardStage,
    EndStage,
    FinishEarlier,
    Plan,
    ProveDisks,
    PublishDisk,
    RemoveExisting,
    RemoveReplaced,
    SettleStage,
    Step,
    StopDomain,
    VerifyExisting,
)
from kvm_clone.progress import Note, OnEvent, Phase, PhaseStarted
from kvm_clone.version import __version__

log = logging.getLogger(__name__)

_LOCK_PATIENCE_SECONDS = 75.0
"""How long we wait for agents of ours that were cut off to let go of their locks: longer than a receiver's patience."""

Reconnect = Callable[[], Awaitable[Host]]

OnStep = Callable[[str, str, float], None]
"""Hears of each step that was taken: its name, `done` or what went wrong, and the seconds that it took."""


@dataclass(frozen=True)
class Outcome:
    """What a run found out on its way."""

    totals: Totals
    warnings: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass
class _State:
    """How far a run is: what a failure means depends on it."""

    begun: bool = False
    defining: bool = False
    committed: bool = False
    stopped: bool = False
    kept: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


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
        on_step: OnStep,
    ) -> None:
        self._plan = plan
        self._source = source
        self._destination = destination
        self._libvirt = connection
        self._reconnect = reconnect
        self._on_event = on_event
        self._on_step = on_step
        self._content = Content(source, destination, plan.route, plan.options, on_event)
        self._state = _State()

    @property
    def kept(self) -> bool:
        """Whether staged data is there to go on with."""
        return self._state.kept

    async def run(self) -> Outcome:
        """Take every step. A failure is raised when what was written is undone, or kept if another try may mend it."""
        watch = [asyncio.create_task(host.wait_lost()) for host in (self._source, self._destination)]
        work = asyncio.create_task(self._steps())
        try:
            try:
                await asyncio.wait([work, *watch], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                await self._stop(work)
                if self._state.committed and not work.cancelled() and work.exception() is None:
                    return self._outcome()
                raise
            lost = next((task for task in watch if task.done()), None)
            if not work.done() and lost is not None:
                await self._stop(work)
                lost.result()
            await work
        except BaseException as error:
            await asyncio.shield(self._fail(error))
            raise
        finally:
            for task in watch:
                task.cancel()
            await asyncio.gather(*watch, return_exceptions=True)
        return self._outcome()

    def _outcome(self) -> Outcome:
        return Outcome(self._content.totals, tuple(self._state.warnings), tuple(self._state.removed))

    async def _stop(self, work: asyncio.Task[None]) -> None:
        """Stop the steps, but let the commit end: it is short, and half of it is nobody's wish."""
        if not self._state.defining:
            work.cancel()
        await asyncio.wait([work])

    async def _steps(self) -> None:
        for step in self._plan.steps:
            started = time.monotonic()
            try:
                await self._take(step)
            except BaseException as error:
                self._on_step(type(step).__name__, str(error) or type(error).__name__, time.monotonic() - started)
                raise
            self._on_step(type(step).__name__, "done", time.monotonic() - started)

    async def _take(self, step: Step) -> None:  # noqa: C901 - one line for each kind of step
        match step:
            case RemoveExisting():
                await self._remove_existing()
            case SettleStage(directory, committed):
                await self._call("settle", directory=directory, name=self._plan.name, committed=committed)
            case DiscardStage(directory):
                await self._call("recover", directory=directory, name=self._plan.name)
            case BeginStage(directory, resume):
                await self._begin(directory, resume)
            case CreateDisk(disk):
                await self._create(disk)
            case CopyDisks(disks):
                self._say(Phase.COPY, f"{self._plan.route} route: {self._plan.route_reason}")
                await self._content.copy(self._staged(disks))
            case ProveDisks(disks):
                self._say(Phase.PROVE, "digesting the disks on both hosts")
                await self._content.prove(self._staged(disks))
            case CheckSource(disks):
                await self._check_source(disks)
            case PublishDisk(disk):
                await self._call("publish", disk=disk.target, final=disk.final)
            case StopDomain():
                await self._stop_domain()
            case DefineDomain(remove, forget):
                await self._define(remove, forget)
            case RemoveReplaced(paths, forget):
                await self._after_commit(self._remove_replaced(paths, forget))
            case EndStage(directories):
                await self._end(directories)
            case FinishEarlier(directory):
                await self._call("finish_earlier", directory=directory, name=self._plan.name)
            case VerifyExisting(disks):
                self._say(Phase.PROVE, "digesting the finished clone and its source")
                await self._content.verify(disks)

    def _say(self, phase: Phase, text: str) -> None:
        self._on_event(PhaseStarted(phase, text))

    async def _call(self, call: str, /, **arguments: Any) -> Any:
        return await self._destination.call(call, **arguments)

    async def _on_libvirt(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        with domains.failing_as(what, self._plan.name):
            return await asyncio.to_thread(work, self._libvirt, *arguments)

    def _staged(self, disks: tuple[PlannedDisk, ...]) -> list[tuple[PlannedDisk, str]]:
        return [(disk, self._state.parts[disk.target]) for disk in disks]

    async def _begin(self, directory: str, resume: bool) -> None:
        plan = self._plan
        what = "going on with" if resume else "staging"
        self._say(Phase.PREPARE, f"{what} {plan.name} in {directory} on {self._destination.name}")
        source = plan.facts.source
        about = {
            "controller": platform.node(),
            "process": os.getpid(),
            "version": __version__,
            "source": {"host": source.host.hostname, "uuid": source.domain.uuid, "name": source.domain.name},
        }
        await _once_free(
            self._call,
            "stage",
            directory=directory,
            name=plan.name,
            operation=plan.identity.operation,
            about=about,
            resume=resume,
            keep=plan.options.keep_partial,
            patience=_LOCK_PATIENCE_SECONDS if plan.continues else 0.0,
        )
        self._state.begun = True

    async def _create(self, disk: PlannedDisk) -> None:
        if disk.staged is not None:
            self._state.parts[disk.target] = disk.staged.part
            return
        image = disk.image
        spec = {
            "format": image.format,
            "size": image.virtual_size,
            "options": dict(image.options),
            "mode": image.mode,
            "user": image.user,
            "group": image.group,
        }
        self._state.parts[disk.target] = await self._call("create", disk=disk.target, final=disk.final, spec=spec)

    async def _check_source(self, disks: tuple[PlannedDisk, ...]) -> None:
        for disk in disks:
            now = await self._source.call("fingerprint", path=disk.image.path)
            if not same_content(now, disk.image.fingerprint):
                raise InterruptedTransferError(
                    f"the source's image {disk.image.path} was changed while it was being copied",
                    subject=disk.target,
                    remedy="find out what writes to it",
                )

    async def _stop_domain(self) -> None:
        self._state.stopped = await self._on_libvirt("stopping the VM to replace", domains.stop, self._plan.name)

    async def _define(self, remove: tuple[str, ...], forget: tuple[str, ...]) -> None:
        self._say(Phase.COMMIT, f"defining {self._plan.name} on {self._destination.name}")
        xml = self._definition()
        if self._plan.decision.replace:
            await self._check_replaced()
        self._state.defining = True
        await self._note(journal.DEFINE, uuid=self._plan.uuid, remove=list(remove), forget=list(forget))
        await self._on_libvirt(f"{self._destination.name} refuses the definition", domains.define, xml)
        self._state.committed = True
        await self._after_commit(self._note(journal.COMMITTED))

    async def _check_replaced(self) -> None:
        """The VM that is replaced must still be the one that the plan was made for, and at rest."""
        planned = self._plan.facts.destination.existing
        now = await self._on_libvirt("looking at the VM to replace", domains.find, self._plan.name)
        if planned is None or now is None or (now.xml, now.state) != (planned.domain.xml, domains.SHUT_OFF):
            raise InterruptedTransferError(
                f"VM {self._plan.name} on {self._destination.name} was started or changed since the plan was made",
                subject=self._plan.name,
                remedy="look at it, and run the command again",
            )

    async def _remove_replaced(self, paths: tuple[str, ...], forget: tuple[str, ...]) -> None:
        self._state.removed += await self._on_libvirt(
            "tidying up after the old VM", domains.forget_state, self._plan.name, forget, paths
        )
        # Others may have come to use them since the plan, or since the run that is being finished.
        still = await vms.unused(self._destination, self._libvirt, paths)
        self._state.removed += await vms.remove_files(self._destination, still)

    async def _remove_existing(self) -> None:
        name = self._plan.name
        self._say(Phase.PREPARE, f"removing {name} from {self._destination.name}, as asked")
        self._state.removed += await vms.cleanup(self._destination, self._libvirt, name, stop=True)

    async def _end(self, directories: tuple[str, ...]) -> None:
        await self._after_commit(self._call("finish"))
        await self._after_commit(asyncio.to_thread(domains.refresh_pools, self._libvirt, set(directories)))

    async def _after_commit(self, work: Awaitable[Any]) -> None:
        """Past the commit the clone is whole: a failure is told, and changes nothing."""
        try:
            await work
        except (KvmCloneError, libvirt.libvirtError) as error:
            text = f"the clone is complete, but tidying up failed: {error}"
            self._state.warnings.append(text)
            self._on_event(Note(text, warning=True))

    async def _note(self, record: str, /, **fields: Any) -> None:
        await self._call("note", record=record, fields=fields)

    def _definition(self) -> str:
        plan = self._plan
        uuid = plan.uuid
        source, identity, options = plan.facts.source, plan.identity, plan.options
        provenance = definition.Provenance(
            operation=identity.operation,
            uuid=uuid,
            source_host=source.host.hostname,
            source_uuid=source.domain.uuid,
            source_name=source.domain.name,
            fingerprint=source.fingerprint,
            version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            verified=self._content.totals.verified,
        )
        change = definition.Change(
            new_name=plan.name,
            provenance=provenance,
            new_uuid=None if uuid == source.domain.uuid else uuid,
            new_macs=None if options.preserve_mac else identity.macs,
            disk_paths={disk.target: disk.final for disk in plan.disks},
        )
        return definition.rewrite(source.domain.xml, change)

    async def _fail(self, cause: BaseException) -> None:
        """Keep what is staged if another try may mend the failure, else undo everything; never hide what is left."""
        if not self._state.begun or self._state.committed:
            return
        interrupted = isinstance(cause, asyncio.CancelledError) or getattr(cause, "interrupted", False)
        if interrupted and self._plan.options.keep_partial:  # at the commit too: the next try asks libvirt about it
            await self._keep()
            return
        self._say(Phase.ROLL_BACK, f"undoing what was written on {self._destination.name}")
        try:
            left = await self._undo()
        except (KvmCloneError, libvirt.libvirtError) as error:
            left = [f"{error}; the next run of this command sees to it"]
        for text in left:
            self._on_event(Note(f"could not be undone: {text}", warning=True))
        if left and isinstance(cause, KvmCloneError):
            cause.remedy = "; ".join(filter(None, [cause.remedy, f"not undone: {', '.join(left)}"]))

    async def _keep(self) -> None:
        """Let go of the lock; an agent that cannot be told does so by itself."""
        self._state.kept = True
        self._on_event(Note(f"what was copied so far is kept on {self._destination.name}", warning=True))
        try:
            await self._call("release")
        except KvmCloneError as error:
            log.info("the agent lets go by itself: %s", error)

    async def _undo(self) -> list[str]:
        if self._destination.lost:
            directory = next(step.directory for step in self._plan.steps if isinstance(step, BeginStage))
            self._destination = await self._reconnect()
            return await _once_free(  # type: ignore[no-any-return]
                self._call,
                "recover",
                directory=directory,
                name=self._plan.name,
                patience=_LOCK_PATIENCE_SECONDS,
            )
        if self._state.defining and await self._was_defined():
            self._state.committed = True
            return [f"{self._plan.name} was defined before the failure, and is complete"]
        left: list[str] = await self._call("undo", past_commit=self._state.defining)
        if self._state.stopped:
            await self._on_libvirt("starting the old VM again", domains.start, self._plan.name)
        return left

    async def _was_defined(self) -> bool:
        name, operation = self._plan.name, self._plan.identity.operation
        return bool(await asyncio.to_thread(domains.defined_by, self._libvirt, name, operation))


async def _once_free(call: Callable[..., Awaitable[Any]], name: str, /, *, patience: float, **arguments: Any) -> Any:
    """Make a call, again and again for `patience` seconds while another process holds the operation's lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await call(name, **arguments)
        except LockedError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(1.0)


def same_content(one: str, other: str) -> bool:
    """Whether nothing was written between two fingerprints of agent.facts.

    The last field, ctime, also changes when libvirt gives a file to QEMU's user for a start that our lock then refuses.
    """
    return one.rpartition(":")[0] == other.rpartition(":")[0]
