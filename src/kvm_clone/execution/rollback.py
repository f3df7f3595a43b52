"""What becomes of what a run has written when its steps ended early, by the table of stages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution.context import Context
from kvm_clone.execution.stages import Failure
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.locks import LOCK_PATIENCE_SECONDS, once_free
from kvm_clone.planning import steps
from kvm_clone.progress import Note, Phase

log = logging.getLogger(__name__)

Reconnect = Callable[[], Awaitable[Host]]


async def end_early(run: Context, cause: BaseException, reconnect: Reconnect) -> bool:
    """Keep what is staged if another try may mend the failure, else undo everything; whether it is kept.

    What cannot be undone is reported, and added to the cause's remedy.
    """
    interrupted = isinstance(cause, asyncio.CancelledError) or getattr(cause, "interrupted", False)
    if run.row.is_complete:
        name, host = run.plan.name, run.destination.name
        run.on_event(Note(f"{name} on {host} is complete; what is left to tidy up is for the next run", True))
        return interrupted  # what comes after the commit is taken up by the next try
    await run.backup.give_up()
    if run.row.is_before_commit:
        await run.backup.forget()
    if run.row.failure is Failure.NOTHING:
        return False
    if interrupted and run.plan.options.keep_partial:  # at the commit too: the next try asks libvirt about it
        await _keep(run)
        return True
    await _roll_back(run, cause, reconnect)
    return False


async def _keep(run: Context) -> None:
    """Release the lock; an agent that cannot be reached does so by itself."""
    run.on_event(Note(f"what was copied so far is kept on {run.destination.name}", warning=True))
    try:
        await run.agent.release()
    except KvmCloneError as error:
        log.info("the agent releases its lock by itself: %s", error)


async def _roll_back(run: Context, cause: BaseException, reconnect: Reconnect) -> None:
    run.say(Phase.ROLL_BACK, f"undoing what was written on {run.destination.name}")
    defined = False
    try:
        defined = await _is_defined(run)
        left = await _undo(run, reconnect) if not defined else [_DEFINED.format(run.plan.name)]
    except KvmCloneError as error:
        left = [str(error)]
    if not defined and not left:
        await run.backup.forget()
    for text in left:
        run.on_event(Note(f"could not be undone: {text}", warning=True))
    if left and isinstance(cause, KvmCloneError):
        not_undone = f"not undone: {', '.join(left)}; the next run of this command sees to it"
        cause.remedy = "; ".join(filter(None, [cause.remedy, not_undone]))


_DEFINED = "{} was defined before the failure, and is complete"


async def _is_defined(run: Context) -> bool:
    """Whether libvirt has the definition already; a lost host is not asked."""
    if run.row.failure is not Failure.LIBVIRT_DECIDES or run.destination.link.lost:
        return False
    name, operation = run.plan.name, run.plan.identity.operation
    return await run.libvirt.defined_by(name, operation)


async def _undo(run: Context, reconnect: Reconnect) -> list[str]:
    """Undo by the journal; what could not be undone. Raises ConnectError, TransferError."""
    if run.destination.link.lost:
        return await _recover(run, reconnect)
    failed = []
    if run.stopped:
        try:
            await run.changing.start(run.plan.name)
        except KvmCloneError as error:
            failed.append(str(error))
    return failed + await run.agent.undo(past_commit=run.row.failure is Failure.LIBVIRT_DECIDES)


async def _recover(run: Context, reconnect: Reconnect) -> list[str]:
    """Undo by way of another agent, as the one that did the work is gone; what could not be undone."""
    directory = next(step.directory for step in run.plan.steps if isinstance(step, steps.BeginStage))
    run.destination = await reconnect()
    where = run.where(directory, run.plan.identity.operation)
    return await once_free(lambda: run.agent.recover(**where), patience=LOCK_PATIENCE_SECONDS)
