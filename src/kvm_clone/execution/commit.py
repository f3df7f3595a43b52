"""The commit: disks under their final names, and the definition of the VM."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.staging import records
from kvm_clone.definition import marks
from kvm_clone.errors import DomainExistsError, InterruptedTransferError
from kvm_clone.execution.context import Context
from kvm_clone.execution.stages import Stage
from kvm_clone.options import Verify
from kvm_clone.planning import domain_facts, steps
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.progress import Phase


async def publish(step: steps.PublishDisk, run: Context) -> None:
    """See steps.PublishDisk."""
    await run.agent.publish(step.disk.key, step.disk.place.path)


async def define(step: steps.DefineDomain, run: Context) -> None:
    """See steps.DefineDomain. Raises DomainExistsError, InterruptedTransferError when others have changed the VM."""
    name, host = run.plan.name, run.destination.name
    run.say(Phase.COMMIT, f"defining {name} on {host}")
    prints = await run.agent.fingerprints(step.remove) if step.remove else []
    pairs = zip(step.remove, prints, strict=True)
    run.contents = {path: ":".join(fingerprint.content(text)) for path, text in pairs if text}
    xml = _definition(run, marks.Pending(run.plan.identity.operation, step.remove, step.forget, run.contents))
    if run.plan.volumes:  # a VM starts on those alone that its pools know
        await run.changing.refresh_pools({disk.place.container for disk in run.plan.disks})
    await _check_name(run)
    run.stage = Stage.COMMITTING
    images = {disk.key: [disk.final, await run.agent.fingerprint(disk.final)] for disk in run.plan.disks}
    about = {"uuid": run.plan.uuid, "remove": list(step.remove), "forget": list(step.forget), "images": images}
    await run.note(records.DEFINE, **about, merge=_overlays(run))
    await run.changing.define(name, xml)
    run.stage = Stage.COMMITTED
    await run.after_commit(_forget_old_memory(run))
    await run.after_commit(run.note(records.COMMITTED))


def _definition(run: Context, pending: marks.Pending) -> str:
    point = run.backup.point_in_time
    mark = replace(
        planned_mark(run.plan),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verified=run.content.totals.proof is not Verify.OFF,
        consistency=point.consistency,
        frozen=f"{point.frozen_seconds:.3f}" if point.frozen_seconds else "",
        scratch=str(point.scratch_bytes) if point.scratch_bytes else "",
        checkpoint=point.checkpoint,
    )
    return clone_xml(run.plan, mark, pending)


def _overlays(run: Context) -> list[dict[str, str]]:
    """The overlays to be merged after the commit, as agent.staging.merge.Overlay has them."""
    return [
        {"disk": disk.key, "path": disk.final, "base": disk.below.path, "base_format": disk.below.format}
        for disk in run.plan.disks
        if disk.below is not None
    ]


async def _check_name(run: Context) -> None:
    """Look at name and UUID once more, right before the define: what others have made meanwhile is not replaced.

    Raises DomainExistsError for a VM that the plan does not know, and InterruptedTransferError when the one that it
    replaces was started or changed.
    """
    plan, host = run.plan, run.destination.name
    now = await run.changing.find(plan.name)
    if plan.decision.replace:
        planned = plan.facts.destination.existing
        if planned is None or now is None or (now.xml, now.state) != (planned.domain.xml, domain_facts.SHUT_OFF):
            raise InterruptedTransferError(
                f"VM {plan.name} on {host} was started or changed since the plan was made",
                subject=plan.name,
                remedy="look at it, and run the command again",
            )
        return
    other = await run.changing.with_uuid(plan.uuid)
    if now is not None or other:
        raise DomainExistsError(
            f"{host} has got a VM {plan.name if now is not None else other} since the plan was made",
            subject=plan.name,
            remedy="look at it; choose another --new-name, or run the command again with a flag that replaces it",
        )


async def _forget_old_memory(run: Context) -> None:
    """Remove what libvirt saved of the memory of a replica whose disks are not those of that moment any more."""
    bases = tuple(disk.base.path for disk in run.plan.disks if disk.base is not None)
    if bases:
        run.removed += await run.changing.forget_state(run.plan.name, (), bases)
