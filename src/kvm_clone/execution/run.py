"""Running a plan: what each step does, and what becomes of it when one fails.

The destination's agent journals every step before it changes anything (agent/staging/stage.py), so that undoing and
resuming need the journal alone: this process may do it, or the agent when this process is gone, or the next run when
both are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import posixpath
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import libvirt

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.staging import records
from kvm_clone.definition import marks
from kvm_clone.errors import DomainExistsError, InterruptedTransferError, KvmCloneError, RefusedError
from kvm_clone.execution import replica
from kvm_clone.execution.backup import Backup, Guarding, Taken
from kvm_clone.hosts import connections, domains, vms
from kvm_clone.hosts.domains import Fenced
from kvm_clone.hosts.host import LOCK_PATIENCE_SECONDS, Host, once_free
from kvm_clone.hosts.survey import fingerprints
from kvm_clone.options import Verify
from kvm_clone.planning import decide, domain_facts, steps
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.plan import Plan
from kvm_clone.progress import Note, OnEvent, Phase, PhaseStarted
from kvm_clone.transfer.content import Content, Totals, Transfer
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


class Stage(IntEnum):
    """How far a run is: what a cancellation, a lost host or a failure means depends on it.

    | stage | cancelled | source lost | destination lost, or a failure |
    |---|---|---|---|
    | LOOKING | ends | ends | ends: nothing was written |
    | STAGING | ends, kept | ends, kept | ends: kept if another try may mend it, else undone |
    | COMMITTING | ends after libvirt's answer | goes on | as in STAGING, once libvirt has been asked |
    | COMMITTED | ends soon | goes on | ends: complete, what is left is for the next run |

    With `keep_partial` off, what would be kept is undone.
    """

    LOOKING = 0
    STAGING = 1
    COMMITTING = 2
    COMMITTED = 3


@dataclass
class _State:
    """How far a run is, and what came of it. `pending`: what is left is for the next run.

    `contents`: inode, size and mtime of the files that the replaced VM had, as they were at the commit.
    """

    stage: Stage = Stage.LOOKING
    pending: bool = False
    merging: bool = False
    stopped: bool = False
    kept: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)


_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 5.0
"""How long a cancelled run goes on with what comes after its commit, unless it merges: that may take long."""


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
        self._fenced: Fenced | None = None
        self._reconnect = reconnect
        self._on_event = on_event
        self._on_step = on_step
        moving = Transfer(plan.name, plan.route, plan.options.parallel, plan.options.bandwidth_limit)
        self._content = Content(self._source, self._destination, moving, on_event)
        self._backup = Backup(self._source, source_libvirt, plan.facts.source, on_event)
        self._directories = sorted(plan.facts.destination.directories)
        self._state = _State()

    @property
    def kept(self) -> bool:
        """Whether staged data is there to go on with."""
        return self._state.kept

    async def run(self) -> Outcome:
        """Take every step. A failure is raised when what was written is undone, or kept if another try may mend it."""
        watch = {asyncio.create_task(self._source.wait_lost()), asyncio.create_task(self._backup.watch())}
        destination = asyncio.create_task(self._destination.wait_lost())
        work = asyncio.create_task(self._steps())
        try:
            try:
                await self._wait(work, destination, watch)
            except asyncio.CancelledError:
                await self._stop(work)
                if self._state.stage is Stage.COMMITTED and not work.cancelled() and work.exception() is None:
                    return self._outcome()
                raise
            await work
        except BaseException as error:
            await asyncio.shield(self._fail(error))
            raise
        finally:
            for task in (*watch, destination):
                task.cancel()
            await asyncio.gather(*watch, destination, self._content.close(), return_exceptions=True)
            if self._fenced is not None:
                await connections.close(self._fenced.connection)
        return self._outcome()

    async def _wait(
        self, work: asyncio.Task[None], destination: asyncio.Task[None], watch: set[asyncio.Task[None]]
    ) -> None:
        """Wait for the steps' end. Raises what a watcher finds, when the steps have stopped for it.

        From the commit on the source is not needed any more.
        """
        running = set(watch)
        while not work.done():
            await asyncio.wait([work, destination, *running], return_when=asyncio.FIRST_COMPLETED)
            over = {task for task in running if task.done()}
            running -= over
            lost = [destination] if destination.done() else list(over)
            if not work.done() and lost and (destination.done() or self._state.stage < Stage.COMMITTING):
                await self._stop(work)
                lost[0].result()

    def _outcome(self) -> Outcome:
        state, content = self._state, self._content
        hinted = frozenset(disk.key for disk in self._plan.disks if content.follows_bitmap(disk))
        return Outcome(content.totals, self._backup.taken, hinted, tuple(state.warnings), tuple(state.removed))

    async def _stop(self, work: asyncio.Task[None]) -> None:
        """Stop the steps, but let the commit end, and what comes after it if that is short."""
        while self._state.stage is Stage.COMMITTING and not work.done():
            await asyncio.wait([work], timeout=_LOOK_SECONDS)
        if self._state.stage is Stage.COMMITTED and not self._state.merging:
            await asyncio.wait([work], timeout=_GRACE_SECONDS)
        if not work.done():
            work.cancel()
        await asyncio.wait([work])
        work.cancelled() or work.exception()  # what stopped them is raised, not what came of that

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
            case steps.SettleStage() | steps.DiscardStage() | steps.TakeLock() | steps.ReleaseLock():
                await self._take_staging(step)
            case steps.BeginBackup() | steps.CopyDisks() | steps.ProveDisks() | steps.EndBackup():
                await self._take_content(step)
            case steps.CheckSource() | steps.VerifyExisting():
                await self._take_content(step)
            case steps.CreateDisk(disk):
                await self._create(disk)
            case steps.PublishDisk(disk):
                await self._call("publish", disk=disk.key, final=disk.place.path)
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
            case steps.SettleStage(directory, operation, committed):
                await self._call("settle", **self._where(directory, operation), committed=committed)
            case steps.DiscardStage(directory, operation):
                await self._call("recover", **self._where(directory, operation))
            case steps.TakeLock():
                await self._call("hold", name=self._plan.name, about={"operation": self._plan.identity.operation})
                self._fenced = await connections.open_fenced(self._destination)
            case steps.ReleaseLock():
                await self._call("release")
            case steps.BeginStage():
                await self._begin(step)
            case steps.TakeUpCommitted(directory, operation):
                await self._take_up(directory, operation)
            case steps.EndStage(directories):
                await self._end(directories)

    async def _take_content(self, step: steps.Step) -> None:
        match step:
            case steps.BeginBackup(job, quiesce, stale):
                patience = LOCK_PATIENCE_SECONDS if self._plan.continues else 0.0
                guard = Guarding(self._plan.identity.operation, patience)
                self._content.offers = await self._backup.begin(job, quiesce, stale, guard)
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
                await self._after_commit(replica.seal(self._destination, self._changing, self._plan.name))
            case steps.DropCheckpoints(names):
                await self._after_commit(self._backup.drop(names))

    def _say(self, phase: Phase, text: str) -> None:
        self._on_event(PhaseStarted(phase, text))

    async def _call(self, call: str, /, **arguments: Any) -> Any:
        return await self._destination.call(call, **arguments)

    @property
    def _changing(self) -> Fenced:
        """Libvirt at the destination, to change something there: the agent holds the operation's lock."""
        assert self._fenced is not None, "a step that changes the destination comes after the lock"
        return self._fenced

    async def _on_libvirt(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        with domains.failing_as(what, self._plan.name):
            return await asyncio.to_thread(work, *arguments)

    def _where(self, directory: str, operation: str) -> dict[str, Any]:
        """The operation that is meant, and where its files may lie."""
        name, directories = self._plan.name, sorted({*self._directories, directory})
        return {"directory": directory, "name": name, "operation": operation, "directories": directories}

    def _staged(self, disks: tuple[Asset, ...]) -> list[tuple[Asset, str]]:
        return [(disk, self._state.parts[disk.key]) for disk in disks]

    async def _begin(self, step: steps.BeginStage) -> None:
        plan = self._plan
        what = "going on with" if step.resume else "staging"
        self._say(Phase.PREPARE, f"{what} {plan.name} in {step.directory} on {self._destination.name}")
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
            **self._where(step.directory, plan.identity.operation),
            about=about,
            resume=step.resume,
            discards=step.discards,
            marks=step.marks,
            keep=plan.options.keep_partial,
            patience=LOCK_PATIENCE_SECONDS if plan.continues else 0.0,
        )
        self._state.stage = Stage.STAGING
        self._fenced = await connections.open_fenced(self._destination)
        if step.marks:
            await self._check_marks(step.marks)
            await self._call("unmark")

    async def _check_marks(self, marked: tuple[str, ...]) -> None:
        """Raise RefusedError if the source sees a marked directory, and in it a file that is about to go as its own.

        Inode and times have said so already where the filesystem tells them alike to all hosts; not all do.
        """
        facts = self._plan.facts
        mine = sorted({posixpath.dirname(path) for path in facts.source.files})
        seen = await self._source.call("marks", operation=self._plan.identity.operation, directories=mine)
        one = {there: here for here, there in zip(mine, seen, strict=True) if there in marked}
        existing = facts.destination.existing
        for path in existing.files if existing is not None else ():
            ours = posixpath.join(one.get(posixpath.dirname(path), "/dev/null"), posixpath.basename(path))
            if ours in facts.source.files:
                raise RefusedError(
                    f"{path} on {self._destination.name} is {ours} on {self._source.name}: both see one directory, and "
                    f"the VM {self._plan.name} has the source's own disk",
                    subject=self._plan.name,
                    remedy="choose another name for the copy",
                )

    async def _take_up(self, directory: str, operation: str) -> None:
        where = self._where(directory, operation)
        patience = LOCK_PATIENCE_SECONDS
        await once_free(self._destination, "stage", **where, about={}, finishing=True, patience=patience)
        self._state.stage = Stage.COMMITTED
        self._fenced = await connections.open_fenced(self._destination)

    async def _create(self, disk: Asset) -> None:
        if disk.staged is not None:
            self._state.parts[disk.key] = disk.staged.part
            return
        final, spec = disk.place.path, disk.spec
        self._state.parts[disk.key] = await self._call("create", disk=disk.key, final=final, spec=spec)

    async def _check_source(self, disks: tuple[Asset, ...]) -> None:
        for disk in disks:
            now = await self._source.call("fingerprint", path=disk.source.path)
            if fingerprint.content(now) != fingerprint.content(disk.fingerprint):
                raise InterruptedTransferError(
                    f"the source's image {disk.source.path} was changed while it was being copied",
                    subject=disk.key,
                    remedy="find out what writes to it",
                )

    async def _stop_domain(self) -> None:
        what, name = "stopping the VM to replace", self._plan.name
        self._state.stopped = await self._on_libvirt(what, domains.stop, self._changing, name)

    async def _define(self, remove: tuple[str, ...], forget: tuple[str, ...]) -> None:
        self._say(Phase.COMMIT, f"defining {self._plan.name} on {self._destination.name}")
        prints = await self._call("fingerprints", paths=list(remove)) if remove else []
        pairs = zip(remove, prints, strict=True)
        self._state.contents = {path: ":".join(fingerprint.content(text)) for path, text in pairs if text}
        xml = self._definition(marks.Pending(self._plan.identity.operation, remove, forget, self._state.contents))
        await self._check_name()
        self._state.stage = Stage.COMMITTING
        images = {disk.key: [disk.final, await self._fingerprint(disk.final)] for disk in self._plan.disks}
        about = {"uuid": self._plan.uuid, "remove": list(remove), "forget": list(forget), "images": images}
        await self._note(records.DEFINE, **about, merge=self._overlays())
        what = f"defining {self._plan.name} on {self._destination.name}"
        await self._on_libvirt(what, domains.define, self._changing, xml)
        self._state.stage = Stage.COMMITTED
        await self._after_commit(self._forget_old_memory())
        await self._after_commit(self._note(records.COMMITTED))

    async def _forget_old_memory(self) -> None:
        """Remove what libvirt saved of the memory of a replica whose disks are not those of that moment any more."""
        bases = tuple(disk.base.path for disk in self._plan.disks if disk.base is not None)
        if bases:
            what, name = "removing the saved state of the replica", self._plan.name
            self._state.removed += await self._on_libvirt(what, domains.forget_state, self._changing, name, (), bases)

    async def _fingerprint(self, path: str) -> str:
        return str(await self._call("fingerprint", path=path))

    def _overlays(self) -> list[dict[str, str]]:
        """The overlays to be merged after the commit, as agent.staging.merge.Overlay has them."""
        return [
            {"disk": disk.key, "path": disk.final, "base": disk.below.path, "base_format": disk.below.format}
            for disk in self._plan.disks
            if disk.below is not None
        ]

    async def _merge(self) -> None:
        """A replica that cannot be merged now boots from its overlays; the journal stays for the next run."""
        self._state.merging = True
        try:
            await replica.merge(self._destination, self._changing, self._plan.name)
        except KvmCloneError as error:
            if self._plan.decision.action is decide.Action.FINISH:
                raise  # there is nothing else that this run would have done
            self._state.pending = True
            self._warn(f"{self._plan.name} is complete, but its disks are not merged yet: {error}; {error.remedy}")
            await self._after_commit(self._call("release"))
        finally:
            self._state.merging = False

    async def _check_name(self) -> None:
        """Look at name and UUID once more, right before the define: what others have made meanwhile is not replaced.

        Raises DomainExistsError for a VM that the plan does not know, and InterruptedTransferError when the one that it
        replaces was started or changed.
        """
        plan, host, connection = self._plan, self._destination.name, self._changing.connection
        what = f"looking for {plan.name} on {host}"
        now = await self._on_libvirt(what, domains.find, connection, plan.name)
        if plan.decision.replace:
            planned = plan.facts.destination.existing
            if planned is None or now is None or (now.xml, now.state) != (planned.domain.xml, domain_facts.SHUT_OFF):
                raise InterruptedTransferError(
                    f"VM {plan.name} on {host} was started or changed since the plan was made",
                    subject=plan.name,
                    remedy="look at it, and run the command again",
                )
            return
        other = await self._on_libvirt(what, domains.with_uuid, connection, plan.uuid)
        if now is not None or other:
            raise DomainExistsError(
                f"{host} has got a VM {plan.name if now is not None else other} since the plan was made",
                subject=plan.name,
                remedy="look at it; choose another --new-name, or run the command again with a flag that replaces it",
            )

    async def _elsewhere(self) -> list[str]:
        """The fingerprints of the source VM's files: now, or when they were last seen."""
        source = self._plan.facts.source
        try:
            return list((await fingerprints(self._source, source.xml)).values())
        except KvmCloneError:  # the source is lost; what it had it has
            return list(source.files.values())

    async def _remove_replaced(self, paths: tuple[str, ...], forget: tuple[str, ...]) -> None:
        name, elsewhere = self._plan.name, await self._elsewhere()
        existing = self._plan.facts.destination.existing
        pending = existing.pending if existing is not None else None  # an earlier run's commit
        contents = self._state.contents or (pending.contents if pending is not None else {})
        fenced = self._changing
        done = await vms.remove_replaced(self._destination, fenced, name, paths, forget, elsewhere, contents=contents)
        self._tell(done)

    async def _remove_existing(self) -> None:
        name, elsewhere = self._plan.name, await self._elsewhere()
        self._say(Phase.PREPARE, f"removing {name} from {self._destination.name}, as asked")
        self._tell(await vms.cleanup(self._destination, self._changing, name, stop=True, elsewhere=elsewhere))

    def _tell(self, done: vms.Removal) -> None:
        self._state.removed += done.removed
        for text in done.kept:
            self._warn(text)

    async def _end(self, directories: tuple[str, ...]) -> None:
        refreshed = asyncio.to_thread(domains.refresh_pools, self._changing, set(directories))
        await self._after_commit(refreshed)
        await self._after_commit(self._call("finish"))

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

    def _definition(self, pending: marks.Pending) -> str:
        taken = self._backup.taken
        mark = replace(
            planned_mark(self._plan),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            verified=self._content.totals.proof is not Verify.OFF,
            consistency=taken.consistency,
            frozen=f"{taken.frozen:.3f}" if taken.frozen else "",
            scratch=str(taken.scratch) if taken.scratch else "",
            checkpoint=taken.checkpoint,
        )
        return clone_xml(self._plan, mark, pending)

    async def _fail(self, cause: BaseException) -> None:
        """Keep what is staged if another try may mend the failure, else undo everything; never hide what is left."""
        interrupted = isinstance(cause, asyncio.CancelledError) or getattr(cause, "interrupted", False)
        if self._state.stage is Stage.COMMITTED:
            self._state.kept = interrupted  # what comes after the commit is taken up by the next try
            name, host = self._plan.name, self._destination.name
            self._on_event(Note(f"{name} on {host} is complete; what is left to tidy up is for the next run", True))
            return
        await self._backup.give_up()
        if self._state.stage < Stage.COMMITTING:
            await self._backup.forget()
        if self._state.stage is Stage.LOOKING:
            return
        if interrupted and self._plan.options.keep_partial:  # at the commit too: the next try asks libvirt about it
            await self._keep()
            return
        self._say(Phase.ROLL_BACK, f"undoing what was written on {self._destination.name}")
        try:
            left = await self._undo()
        except (KvmCloneError, libvirt.libvirtError) as error:
            left = [str(error)]
        if self._state.stage < Stage.COMMITTED and not left:
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
                **self._where(directory, self._plan.identity.operation),
                patience=LOCK_PATIENCE_SECONDS,
            )
        defining = self._state.stage is Stage.COMMITTING
        if defining and await self._was_defined():
            self._state.stage = Stage.COMMITTED
            return [f"{self._plan.name} was defined before the failure, and is complete"]
        failed = []
        if self._state.stopped:
            try:
                await self._on_libvirt("starting the old VM again", domains.start, self._changing, self._plan.name)
            except KvmCloneError as error:
                failed.append(str(error))
        left: list[str] = await self._call("undo", past_commit=defining)
        return failed + left

    async def _was_defined(self) -> bool:
        name, operation = self._plan.name, self._plan.identity.operation
        return bool(await asyncio.to_thread(domains.defined_by, self._libvirt, name, operation))
