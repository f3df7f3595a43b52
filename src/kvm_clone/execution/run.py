"""Running a plan: its steps one after the other, while both hosts are watched.

The destination's agent journals every step before it changes anything (agent/staging/stage.py), so that undoing and
resuming need the journal alone: this process may do it, or the agent when this process is gone, or the next run when
both are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvm_clone.execution.backup import Backup, PointInTime
from kvm_clone.execution.context import Context
from kvm_clone.execution.handlers import Handler, handlers
from kvm_clone.execution.rollback import Reconnect, end_early
from kvm_clone.execution.stages import Cancelled, Lost, Stage
from kvm_clone.hosts.pool import Connected
from kvm_clone.planning import steps
from kvm_clone.planning.plan import Plan
from kvm_clone.progress import OnEvent
from kvm_clone.transfer.content import Content, Totals

OnStep = Callable[[str, str, float], None]
"""Hears of each step that was taken: its name, `done` or what went wrong, and the seconds that it took."""


@dataclass(frozen=True)
class Outcome:
    """What a run found out on its way. `hinted`: the disks, by target, whose changes a dirty bitmap named."""

    totals: Totals
    point_in_time: PointInTime
    hinted: frozenset[str]
    warnings: tuple[str, ...]
    removed: tuple[str, ...]


_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 5.0
"""How long a cancelled run continues with what comes after its commit, unless it merges: that may take long."""


class Run:
    """One run of one plan. `kept`: it has failed, and left staged data that another try can resume."""

    def __init__(
        self,
        plan: Plan,
        source: Connected,
        destination: Connected,
        reconnect: Reconnect,
        on_event: OnEvent,
        on_step: OnStep,
    ) -> None:
        self.kept = False
        transfer = replace(plan.options.transfer, route=plan.route)
        content = Content(source[0], destination[0], plan.name, transfer, on_event)
        backup = Backup(*source, plan.facts.source, on_event)
        self._context = Context(plan, source[0], destination[0], destination[1], content, backup, on_event)
        self._reconnect = reconnect
        self._on_step = on_step

    @property
    def has_written(self) -> bool:
        """Whether the run has got as far as changing something at the destination."""
        return self._context.stage is not Stage.LOOKING

    async def run(self) -> Outcome:
        """Take every step. A failure is raised when what was written is undone, or kept if another try may mend it.

        Raises RefusedError, before anything is done, for a plan with a step that is not known.
        """
        taken_by = handlers(self._context.plan.steps)
        run = self._context
        watch = {asyncio.create_task(run.source.link.wait_lost()), asyncio.create_task(run.backup.watch())}
        destination = asyncio.create_task(run.destination.link.wait_lost())
        work = asyncio.create_task(self._take(taken_by))
        try:
            try:
                await self._wait(work, destination, watch)
            except asyncio.CancelledError:
                await self._stop(work)
                if run.row.is_complete and not work.cancelled() and work.exception() is None:
                    return self._outcome()
                raise
            await work
        except BaseException as error:
            await asyncio.shield(self._fail(error))
            raise
        finally:
            for task in (*watch, destination):
                task.cancel()
            await asyncio.gather(*watch, destination, run.content.close(), return_exceptions=True)
            await run.close_fence()
        return self._outcome()

    async def _wait(
        self, work: asyncio.Task[None], destination: asyncio.Task[None], watch: set[asyncio.Task[None]]
    ) -> None:
        """Wait for the steps' end. Raises what a watcher finds, when the steps have stopped for it."""
        running = {destination, *watch}
        found: list[asyncio.Task[None]] = []
        while not work.done():
            await asyncio.wait([work, *running], return_when=asyncio.FIRST_COMPLETED)
            over = {task for task in running if task.done()}
            running -= over
            found += sorted(over, key=lambda task: task is not destination)
            lost = next((task for task in found if self._ends_for(task, destination)), None)
            if not work.done() and lost is not None:
                await self._stop(work)
                lost.result()

    def _ends_for(self, lost: asyncio.Task[None], destination: asyncio.Task[None]) -> bool:
        row = self._context.row
        return (row.destination_lost if lost is destination else row.source_lost) is Lost.ENDS

    def _outcome(self) -> Outcome:
        run = self._context
        hinted = frozenset(disk.key for disk in run.plan.disks if run.content.follows_bitmap(disk))
        return Outcome(run.content.totals, run.backup.point_in_time, hinted, tuple(run.warnings), tuple(run.removed))

    async def _stop(self, work: asyncio.Task[None]) -> None:
        """Stop the steps when the stage allows it."""
        while self._context.row.cancelled is Cancelled.ANSWERED and not work.done():
            await asyncio.wait([work], timeout=_LOOK_SECONDS)
        if self._context.row.cancelled is Cancelled.SOON:
            await asyncio.wait([work], timeout=_GRACE_SECONDS)
        if not work.done():
            work.cancel()
        await asyncio.wait([work])
        work.cancelled() or work.exception()  # what stopped them is raised, not what came of that

    async def _take(self, taken_by: list[tuple[str, Handler]]) -> None:
        run = self._context
        if any(isinstance(step, steps.CopyDisks) for step in run.plan.steps):
            run.content.prepare()  # logging in and loading agents takes longer than most steps before the copy
        for name, take in taken_by:
            if run.stage is Stage.POSTPONED:
                break
            started = time.monotonic()
            try:
                await take(run)
            except BaseException as error:
                self._on_step(name, str(error) or type(error).__name__, time.monotonic() - started)
                raise
            self._on_step(name, "done", time.monotonic() - started)

    async def _fail(self, cause: BaseException) -> None:
        self.kept = await end_early(self._context, cause, self._reconnect)
