"""The steps about what the disks hold: the source's point in time, the copy, the proof."""

from __future__ import annotations

from kvm_clone.agent.disks import fingerprint
from kvm_clone.errors import InterruptedTransferError
from kvm_clone.execution.backup import Guarding
from kvm_clone.execution.context import Context
from kvm_clone.hosts.locks import LOCK_PATIENCE_SECONDS
from kvm_clone.planning import steps
from kvm_clone.progress import Phase


async def begin_backup(step: steps.BeginBackup, run: Context) -> None:
    """See steps.BeginBackup."""
    patience = LOCK_PATIENCE_SECONDS if run.plan.continues else 0.0
    guard = Guarding(run.plan.identity.operation, patience)
    run.content.offers = await run.backup.begin(step.job, step.quiesce, step.stale, guard)


async def copy(step: steps.CopyDisks, run: Context) -> None:
    """See steps.CopyDisks."""
    run.say(Phase.COPY, f"{run.plan.route} route: {run.plan.route_reason}")
    await run.content.copy(run.staged(step.disks))


async def prove(step: steps.ProveDisks, run: Context) -> None:
    """See steps.ProveDisks."""
    run.say(Phase.PROVE, "digesting the disks on both hosts")
    await run.content.prove(run.staged(step.disks), step.proof)


async def end_backup(_: steps.EndBackup, run: Context) -> None:
    """See steps.EndBackup."""
    await run.backup.end()


async def check_source(step: steps.CheckSource, run: Context) -> None:
    """See steps.CheckSource. Raises InterruptedTransferError for an image that has changed."""
    for disk in step.disks:
        now = await run.source.agent.fingerprint(disk.source.path, disk.source.format)
        if fingerprint.content(now) != fingerprint.content(disk.fingerprint):
            raise InterruptedTransferError(
                f"the source's image {disk.source.path} was changed while it was being copied",
                subject=disk.key,
                remedy="find out what writes to it",
            )


async def verify_existing(step: steps.VerifyExisting, run: Context) -> None:
    """See steps.VerifyExisting."""
    run.say(Phase.PROVE, "digesting the finished clone and its source")
    await run.content.verify(step.disks)
