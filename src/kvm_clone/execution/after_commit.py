"""The steps past the commit: the VM is complete, and what fails here is a warning."""

from __future__ import annotations

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution import replica
from kvm_clone.execution.context import Context
from kvm_clone.execution.removal import fingerprints_at_source
from kvm_clone.execution.stages import Stage
from kvm_clone.hosts import vms
from kvm_clone.planning import decide, steps


async def merge(_: steps.MergeDisks, run: Context) -> None:
    """See steps.MergeDisks. A replica that cannot be merged now boots from its overlays; the journal stays.

    Raises TransferError and its kinds where merging was all that the run had to do.
    """
    run.stage = Stage.MERGING
    try:
        await replica.merge(run.destination, run.changing, run.plan.name)
    except KvmCloneError as error:
        if run.plan.decision.action is decide.Action.FINISH:
            raise  # there is nothing else that this run would have done
        run.stage = Stage.POSTPONED
        run.warn(f"{run.plan.name} is complete, but its disks are not merged yet: {error}; {error.remedy}")
        await run.after_commit(run.agent.release())
    finally:
        if run.stage is Stage.MERGING:
            run.stage = Stage.COMMITTED


async def remove_replaced(step: steps.RemoveReplaced, run: Context) -> None:
    """See steps.RemoveReplaced."""
    await run.after_commit(_remove_replaced(step, run))


async def _remove_replaced(step: steps.RemoveReplaced, run: Context) -> None:
    name, elsewhere = run.plan.name, await fingerprints_at_source(run)
    existing = run.plan.facts.destination.existing
    pending = existing.pending if existing is not None else None  # an earlier run's commit
    contents = run.contents or (pending.contents if pending is not None else {})
    done = await vms.remove_replaced(
        run.destination, run.changing, name, step.paths, step.forget, elsewhere, contents=contents
    )
    run.count_removed(done)


async def seal(_: steps.SealReplica, run: Context) -> None:
    """See steps.SealReplica."""
    await run.after_commit(replica.seal(run.destination, run.changing, run.plan.name))


async def drop_checkpoints(step: steps.DropCheckpoints, run: Context) -> None:
    """See steps.DropCheckpoints."""
    await run.after_commit(run.backup.drop(step.names))


async def end_stage(step: steps.EndStage, run: Context) -> None:
    """See steps.EndStage."""
    await run.after_commit(run.changing.refresh_pools(set(step.directories)))
    await run.after_commit(run.agent.finish())
