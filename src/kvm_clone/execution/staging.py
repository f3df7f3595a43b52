"""The steps before the commit that need the destination alone: its lock, its journal, the staged images."""

from __future__ import annotations

import os
import platform
import posixpath

from kvm_clone.errors import RefusedError
from kvm_clone.execution.context import Context
from kvm_clone.execution.removal import fingerprints_at_source
from kvm_clone.execution.stages import Stage
from kvm_clone.hosts import vms
from kvm_clone.hosts.locks import LOCK_PATIENCE_SECONDS, once_free
from kvm_clone.planning import decide, steps
from kvm_clone.progress import Phase
from kvm_clone.version import __version__


async def take_lock(_: steps.TakeLock, run: Context) -> None:
    """See steps.TakeLock."""
    await run.agent.hold(run.plan.name, {"operation": run.plan.identity.operation})
    await run.open_fence()


async def release_lock(_: steps.ReleaseLock, run: Context) -> None:
    """See steps.ReleaseLock."""
    await run.agent.release()


async def settle(step: steps.SettleStage, run: Context) -> None:
    """See steps.SettleStage."""
    await run.agent.record_outcome(**run.where(step.directory, step.operation), committed=step.committed)


async def discard(step: steps.DiscardStage, run: Context) -> None:
    """See steps.DiscardStage."""
    await run.agent.recover(**run.where(step.directory, step.operation))


async def begin(step: steps.BeginStage, run: Context) -> None:
    """See steps.BeginStage. Raises LockedError; RefusedError when the source sees its own disks there."""
    plan = run.plan
    what = "resuming" if step.resume else "staging"
    run.say(Phase.PREPARE, f"{what} {plan.name} in {step.directory} on {run.destination.name}")
    source = plan.facts.source
    about = {
        "controller": platform.node(),
        "process": os.getpid(),
        "version": __version__,
        "source": {"host": source.host.hostname, "uuid": source.domain.uuid, "name": source.domain.name},
        "kind": decide.SYNC if plan.decision.update else decide.CLONE,
    }
    await once_free(
        lambda: run.agent.stage(
            **run.where(step.directory, plan.identity.operation),
            about=about,
            resume=step.resume,
            discards=step.discards,
            marks=step.marks,
            keep=plan.options.keep_partial,
        ),
        patience=LOCK_PATIENCE_SECONDS if plan.continues else 0.0,
    )
    run.stage = Stage.STAGING
    await run.open_fence()
    if step.marks:
        await _check_marks(step.marks, run)
        await run.agent.unmark()


async def _check_marks(marked: tuple[str, ...], run: Context) -> None:
    """Raise RefusedError if the source sees a marked directory, and in it a file that is about to go as its own.

    Inode and times have said so already where the filesystem tells them alike to all hosts; not all do.
    """
    facts, name = run.plan.facts, run.plan.name
    mine = sorted({posixpath.dirname(path) for path in facts.source.files})
    seen = await run.source.agent.marks(run.plan.identity.operation, mine)
    one = {there: here for here, there in zip(mine, seen, strict=True) if there in marked}
    existing = facts.destination.existing
    for path in existing.files if existing is not None else ():
        ours = posixpath.join(one.get(posixpath.dirname(path), "/dev/null"), posixpath.basename(path))
        if ours in facts.source.files:
            raise RefusedError(
                f"{path} on {run.destination.name} is {ours} on {run.source.name}: both see one directory, and "
                f"the VM {name} has the source's own disk",
                subject=name,
                remedy="choose another name for the copy",
            )


async def take_up(step: steps.TakeUpCommitted, run: Context) -> None:
    """See steps.TakeUpCommitted."""
    where = run.where(step.directory, step.operation)
    await once_free(lambda: run.agent.stage(**where, about={}, finishing=True), patience=LOCK_PATIENCE_SECONDS)
    run.stage = Stage.COMMITTED
    await run.open_fence()


async def create(step: steps.CreateDisk, run: Context) -> None:
    """See steps.CreateDisk."""
    disk = step.disk
    if disk.staged is not None:
        run.parts[disk.key] = disk.staged.part
        return
    run.parts[disk.key] = await run.agent.create(disk.key, disk.place.path, disk.spec)


async def remove_existing(_: steps.RemoveExisting, run: Context) -> None:
    """See steps.RemoveExisting."""
    name, elsewhere = run.plan.name, await fingerprints_at_source(run)
    run.say(Phase.PREPARE, f"removing {name} from {run.destination.name}, as asked")
    run.count_removed(await vms.cleanup(run.destination, run.changing, name, stop=True, elsewhere=elsewhere))


async def stop_domain(_: steps.StopDomain, run: Context) -> None:
    """See steps.StopDomain."""
    run.stopped = await run.changing.stop(run.plan.name)
