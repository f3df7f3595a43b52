"""Which function takes a step, by the step's class."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import assert_never

from kvm_clone.errors import RefusedError
from kvm_clone.execution import after_commit, commit, contents, staging
from kvm_clone.execution.context import Context
from kvm_clone.planning import steps
from kvm_clone.planning.steps import Step

Handler = Callable[[Context], Awaitable[None]]


def handlers(given: Sequence[Step]) -> list[tuple[str, Handler]]:
    """Each step's name and what takes it, in order. Raises RefusedError when one of them is not known."""
    for step in given:
        if not isinstance(step, Step):
            raise RefusedError(
                f"the plan has a step that this version cannot take: {type(step).__name__}",
                subject=type(step).__name__,
                remedy="make the plan and run it with one version of kvm-clone",
            )
    return [(type(step).__name__, handler(step)) for step in given]


def handler(step: Step) -> Handler:  # noqa: C901 - one line for each kind of step
    """What takes the step."""
    match step:
        case steps.TakeLock():
            return partial(staging.take_lock, step)
        case steps.ReleaseLock():
            return partial(staging.release_lock, step)
        case steps.SettleStage():
            return partial(staging.settle, step)
        case steps.DiscardStage():
            return partial(staging.discard, step)
        case steps.BeginStage():
            return partial(staging.begin, step)
        case steps.TakeUpCommitted():
            return partial(staging.take_up, step)
        case steps.RemoveExisting():
            return partial(staging.remove_existing, step)
        case steps.CreateDisk():
            return partial(staging.create, step)
        case steps.StopDomain():
            return partial(staging.stop_domain, step)
        case steps.BeginBackup():
            return partial(contents.begin_backup, step)
        case steps.CopyDisks():
            return partial(contents.copy, step)
        case steps.ProveDisks():
            return partial(contents.prove, step)
        case steps.EndBackup():
            return partial(contents.end_backup, step)
        case steps.CheckSource():
            return partial(contents.check_source, step)
        case steps.VerifyExisting():
            return partial(contents.verify_existing, step)
        case steps.PublishDisk():
            return partial(commit.publish, step)
        case steps.DefineDomain():
            return partial(commit.define, step)
        case steps.MergeDisks():
            return partial(after_commit.merge, step)
        case steps.RemoveReplaced():
            return partial(after_commit.remove_replaced, step)
        case steps.SealReplica():
            return partial(after_commit.seal, step)
        case steps.DropCheckpoints():
            return partial(after_commit.drop_checkpoints, step)
        case steps.EndStage():
            return partial(after_commit.end_stage, step)
        case _:
            assert_never(step)
