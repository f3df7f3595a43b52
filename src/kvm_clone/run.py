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

from kvm_clone import decide, domains, replica, rewrite, steps, vms
from kvm_clone.agent import journal
from kvm_clone.backup import Backup, Guarding, Taken
from kvm_clone.content import Content, Totals, Transfer
from kvm_clone.errors import InterruptedTransferError, KvmCloneError
from kvm_clone.host import LOCK_PATIENCE_SECONDS, Host, once_free
from kvm_clone.options import Verify
from kvm_clone.ownership import Provenance
from kvm_clone.placement import PlannedDisk
from kvm_clone.plan import Plan
from kvm_clone.progress import Note, OnEvent, Phase, PhaseStarted
from kvm_clone.version import __version__

log = logging.getLogger(__name__)

Connected = tuple[Host, libvirt.virConnect]
"""A host, and its libvirt."""

Reconnect = Callable[[], Awaitable[Host]]

OnStep = Callable[[str, str, float], None]
"""Hears of each step that was taken: its name, `done` or what went wrong, and the seconds that it took."""


@dataclass(frozen=True)
class Outcome:
    """What a run found out on its way. `hinted`: the disks, by target, whose changes a dirty bitmap named."""

    totals: Totals
    taken: Taken
    hinted: frozenset[str]
    warnings: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass
class _State:
    """How far a run is: what a failure means depends on it. `pending`: what is left is for the next run."""

    begun: bool = False
    pending: bool = False
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
        source: Connected,
        destination: Connected,
        reconnect: Reconnect,
        on_event: OnEvent,
        on_step: OnStep,
    ) -> None:
        self._plan = plan
        self._source, source_libvirt = source
        self._destination, self._libvirt = destination
        self._reconnect = reconnect
        self._on_event = on_event
        self._on_step = on_step
        moving = Transfer(plan.name, plan.route, plan.options.parallel, plan.options.bandwidth_limit)
        self._content = Content(self._source, self._destination, moving, on_event)
        self._backup = Backup(self._source, source_libvirt, plan.facts.source, on_event)
        self._state = _State()

    @property
    def kept(self) -> bool:
        """Whether staged data is there to go on with."""
        return self._state.kept

    async def run(self) -> Outcome:
        """Take every step. A failure is raised when what was written is undone, or kept if another try may mend it."""
        watch = [asyncio.create_task(host.wait_lost()) for host in (self._source, self._destination)]
        watch.append(asyncio.create_task(self._backup.watch()))
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
            await asyncio.gather(*watch, self._content.close(), return_exceptions=True)
        return self._outcome()

    def _outcome(self) -> Outcome:
        state, content = self._state, self._content
        hinted = frozenset(disk.target for disk in self._plan.disks if content.is_hinted(disk))
        return Outcome(content.totals, self._backup.taken, hinted, tuple(state.warnings), tuple(state.removed))

    async def _stop(self, work: asyncio.Task[None]) -> None:
        """Stop the steps, but let the commit end: it is short, and half of it is nobody's wish."""
        if not self._state.defining:
            work.cancel()
        await asyncio.wait([work])

    async def _steps(self) -> None:
        if any(isinstance(step, steps.CopyDisks) for step in self._plan.steps):
            self._content.prepare()  # logging in and loading agents takes longer than most steps before the copy
        for step in self._plan.steps:
            if self._state.pending:
                break
            started = time.monotonic()
            try:
                await self._take(step)
            except BaseException as error:
                self._on_step(type(step).__name__, str(error) or type(error).__name__, time.monotonic() - started)
                raise
            self._on_step(type(step).__name__, "done", time.monotonic() - started)

    async def _take(self, step: steps.Step) -> None:
        match step:
            case steps.BeginStage() | steps.TakeUpCommitted() | steps.EndStage():
                await self._take_staging(step)
            case steps.SettleStage() | steps.DiscardStage():
                await self._take_staging(step)
            case steps.BeginBackup() | steps.CopyDisks() | steps.ProveDisks() | steps.EndBackup():
                await self._take_content(step)
            case steps.CheckSource() | steps.VerifyExisting():
                await self._take_content(step)
            case steps.CreateDisk(disk):
                await self._create(disk)
            case steps.PublishDisk(disk):
                await self._call("publish", disk=disk.target, final=disk.final)
            case steps.RemoveExisting():
                await self._remove_existing()
            case steps.StopDomain():
                await self._stop_domain()
            case steps.DefineDomain(remove, forget):
                await self._define(remove, forget)
            case _:
                await self._take_after_commit(step)

    async def _take_staging(self, step: steps.Step) -> None:
        match step:
            case steps.SettleStage(directory, committed):
                await self._call("settle", directory=directory, name=self._plan.name, committed=committed)
            case steps.DiscardStage(directory):
                await self._call("recover", directory=directory, name=self._plan.name)
            case steps.BeginStage(directory, resume):
                await self._begin(directory, resume)
            case steps.TakeUpCommitted(directory):
                await self._take_up(directory)
            case steps.EndStage(directories):
                await self._end(directories)

    async def _take_content(self, step: steps.Step) -> None:
        match step:
            case steps.BeginBackup(job, quiesce, stale):
                patience = LOCK_PATIENCE_SECONDS if self._plan.continues else 0.0
                guard = Guarding(self._plan.identity.operation, patience)
                self._content.origins = await self._backup.begin(job, quiesce, stale, guard)
            case steps.CopyDisks(disks):
                self._say(Phase.COPY, f"{self._plan.route} route: {self._plan.route_reason}")
                await self._content.copy(self._staged(disks))
            case steps.ProveDisks(disks, proof):
                self._say(Phase.PROVE, "digesting the disks on both hosts")
                await self._content.prove(self._staged(disks), proof)
            case steps.EndBackup():
                await self._backup.end()
            case steps.CheckSource(disks):
                await self._check_source(disks)
            case steps.VerifyExisting(disks):
                self._say(Phase.PROVE, "digesting the finished clone and its source")
                await self._content.verify(disks)

    async def _take_after_commit(self, step: steps.Step) -> None:
        match step:
            case steps.MergeDisks():
                await self._merge()
            case steps.RemoveReplaced(paths, forget):
                await self._after_commit(self._remove_replaced(paths, forget))
            case steps.SealReplica():
                await self._after_commit(replica.seal(self._destination, self._libvirt, self._plan.name))
            case steps.DropCheckpoints(names):
                await self._after_commit(self._backup.drop(names))

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
            "kind": decide.SYNC if plan.decision.update else decide.CLONE,
        }
        await once_free(
            self._destination,
            "stage",
            directory=directory,
            name=plan.name,
            operation=plan.identity.operation,
            about=about,
            resume=resume,
            keep=plan.options.keep_partial,
            patience=LOCK_PATIENCE_SECONDS if plan.continues else 0.0,
        )
        self._state.begun = True

    async def _take_up(self, directory: str) -> None:
        staged = self._plan.facts.destination.staged
        assert staged is not None
        how = {"directory": directory, "name": self._plan.name, "operation": staged.operation, "about": {}}
        await once_free(self._destination, "stage", **how, finishing=True, patience=LOCK_PATIENCE_SECONDS)
        self._state.begun = self._state.committed = True

    async def _create(self, disk: PlannedDisk) -> None:
        if disk.staged is not None:
            self._state.parts[disk.target] = disk.staged.part
            return
        image = disk.image
        spec = {
            "format": disk.format,
            "size": image.virtual_size,
            "options": disk.options,
            "mode": image.mode if disk.base is None else disk.base.mode,
            "user": image.user if disk.base is None else disk.base.user,
            "group": image.group if disk.base is None else disk.base.group,
            "backing": [disk.below.path, disk.below.format] if disk.below is not None else None,
            "copy_of": disk.base.path if disk.base is not None and disk.shares else None,
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
        images = {disk.target: [disk.final, await self._fingerprint(disk.final)] for disk in self._plan.disks}
        about = {"uuid": self._plan.uuid, "remove": list(remove), "forget": list(forget), "images": images}
        await self._note(journal.DEFINE, **about, merge=self._overlays())
        await self._on_libvirt(f"{self._destination.name} refuses the definition", domains.define, xml)
        self._state.committed = True
        await self._after_commit(self._forget_old_memory())
        await self._after_commit(self._note(journal.COMMITTED))

    async def _forget_old_memory(self) -> None:
        """Remove what libvirt saved of the memory of a replica whose disks are not those of that moment any more."""
        bases = tuple(disk.base.path for disk in self._plan.disks if disk.base is not None)
        if bases:
            what = "removing the saved state of the replica"
            self._state.removed += await self._on_libvirt(what, domains.forget_state, self._plan.name, (), bases)

    async def _fingerprint(self, path: str) -> str:
        return str(await self._call("fingerprint", path=path))

    def _overlays(self) -> list[dict[str, str]]:
        """The overlays to be merged after the commit, as agent.merge.Overlay has them."""
        return [
            {"disk": disk.target, "path": disk.final, "base": disk.below.path, "base_format": disk.below.format}
            for disk in self._plan.disks
            if disk.below is not None
        ]

    async def _merge(self) -> None:
        """A replica that cannot be merged now boots from its overlays; the journal stays for the next run."""
        try:
            await replica.merge(self._destination, self._libvirt, self._plan.name)
        except KvmCloneError as error:
            if self._plan.decision.action is decide.Action.FINISH:
                raise  # there is nothing else that this run would have done
            self._state.pending = True
            self._warn(f"{self._plan.name} is complete, but its disks are not merged yet: {error}; {error.remedy}")
            await self._after_commit(self._call("release"))

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
        self._state.removed += await vms.remove_replaced(
            self._destination, self._libvirt, self._plan.name, paths, forget
        )

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
            self._warn(f"{self._plan.name} is complete, but tidying up failed: {error}")

    def _warn(self, text: str) -> None:
        self._state.warnings.append(text)
        self._on_event(Note(text, warning=True))

    async def _note(self, record: str, /, **fields: Any) -> None:
        await self._call("note", record=record, fields=fields)

    def _definition(self) -> str:
        plan = self._plan
        source = plan.facts.source
        change = rewrite.Change(
            new_name=plan.name,
            provenance=self._provenance(),
            new_uuid=None if plan.uuid == source.domain.uuid else plan.uuid,
            new_macs=plan.macs,
            disk_paths={disk.target: disk.final for disk in plan.disks},
            disk_formats={disk.target: disk.format for disk in plan.disks if disk.base is not None},
            disk_bases={
                disk.target: rewrite.Base(disk.below.path, disk.below.format)
                for disk in plan.disks
                if disk.below is not None
            },
        )
        return rewrite.rewrite(source.domain.xml, change)

    def _provenance(self) -> Provenance:
        plan, taken = self._plan, self._backup.taken
        source = plan.facts.source
        return Provenance(
            operation=plan.identity.operation,
            uuid=plan.uuid,
            source_host=source.host.hostname,
            source_uuid=source.domain.uuid,
            source_name=source.domain.name,
            fingerprint=source.fingerprint,
            version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            verified=self._content.totals.proof is not Verify.OFF,
            macs=" ".join(f"{own}={new}" for own, new in zip(source.xml.macs, plan.macs, strict=True)),
            consistency=taken.consistency,
            frozen=f"{taken.frozen:.3f}" if taken.frozen else "",
            scratch=str(taken.scratch) if taken.scratch else "",
            checkpoint=taken.checkpoint,
        )

    async def _fail(self, cause: BaseException) -> None:
        """Keep what is staged if another try may mend the failure, else undo everything; never hide what is left."""
        interrupted = isinstance(cause, asyncio.CancelledError) or getattr(cause, "interrupted", False)
        if self._state.committed:
            self._state.kept = interrupted  # what comes after the commit is taken up by the next try
            return
        await self._backup.give_up()
        if not self._state.defining:
            await self._backup.forget()
        if not self._state.begun:
            return
        if interrupted and self._plan.options.keep_partial:  # at the commit too: the next try asks libvirt about it
            await self._keep()
            return
        self._say(Phase.ROLL_BACK, f"undoing what was written on {self._destination.name}")
        try:
            left = await self._undo()
        except (KvmCloneError, libvirt.libvirtError) as error:
            left = [str(error)]
        if not self._state.committed and not left:
            await self._backup.forget()
        for text in left:
            self._on_event(Note(f"could not be undone: {text}", warning=True))
        if left and isinstance(cause, KvmCloneError):
            not_undone = f"not undone: {', '.join(left)}; the next run of this command sees to it"
            cause.remedy = "; ".join(filter(None, [cause.remedy, not_undone]))

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
            directory = next(step.directory for step in self._plan.steps if isinstance(step, steps.BeginStage))
            self._destination = await self._reconnect()
            return await once_free(  # type: ignore[no-any-return]
                self._destination,
                "recover",
                directory=directory,
                name=self._plan.name,
                patience=LOCK_PATIENCE_SECONDS,
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


def same_content(one: str, other: str) -> bool:
    """Whether nothing was written between two fingerprints of agent.facts.

    The last field, ctime, also changes when libvirt gives a file to QEMU's user for a start that our lock then refuses.
    """
    return one.rpartition(":")[0] == other.rpartition(":")[0]
