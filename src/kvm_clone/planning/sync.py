"""The plan of a sync: bring a replica to its source's state by sending what differs. Pure, like plan.py.

What changed lands in an overlay on each of the replica's images, or in a copy that shares its blocks where the
filesystem can do that. One define onto those is the commit; after it overlays are merged down, which can be interrupted
and repeated at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.disks.image import QCOW2
from kvm_clone.definition.domain_xml import FORMATS
from kvm_clone.findings import EXISTS, Finding, block
from kvm_clone.options import Retry, SyncOptions, Verify
from kvm_clone.planning.assets import Place
from kvm_clone.planning.checks import has_subclusters, host_findings, source_findings
from kvm_clone.planning.decide import SYNC, Action, Decision, unfinished
from kvm_clone.planning.domain_facts import SHUT_OFF
from kvm_clone.planning.facts import Existing, Facts, ImageFacts, Staged, files_in
from kvm_clone.planning.identity_checks import duplicate_findings, identity_findings, replica_findings
from kvm_clone.planning.live_checks import backup_job, chain_by_uuid, chain_of, live_findings
from kvm_clone.planning.placement import Names, PlannedDisk, overlay_place, place, stage_directory, successor_place
from kvm_clone.planning.plan import (
    DONE_ALREADY,
    Identity,
    Plan,
    before,
    begin_step,
    content_steps,
    existing_disks,
    finishing_steps,
    last_steps,
    make_plan,
    route_findings,
    route_of,
)
from kvm_clone.planning.steps import (
    CreateDisk,
    DefineDomain,
    MergeDisks,
    PublishDisk,
    ReleaseLock,
    RemoveReplaced,
    Step,
    StopDomain,
    TakeLock,
    VerifyExisting,
)
from kvm_clone.planning.storage import storage_findings
from kvm_clone.units import format_bytes


def make_sync_plan(facts: Facts, options: SyncOptions, identity: Identity, own_operation: str | None = None) -> Plan:
    """Plan a sync. Every finding is reported, not only the first.

    `own_operation`: the operation of this run that a dropped connection has interrupted.
    """
    name = options.name_for(facts.source.domain.name)
    staged = facts.destination.staged
    if facts.destination.existing is None and (options.create or (staged is not None and staged.kind != SYNC)):
        return make_plan(facts, options.as_clone, identity, own_operation)
    decision = _decide(facts, options, name, own_operation)
    resumed = staged if decision.action is Action.RESUME else None
    if resumed is not None:
        identity = replace(identity, operation=resumed.operation)
    disks, findings = _disks(facts, options, name, identity, resumed)
    if decision.action in DONE_ALREADY:
        disks, findings = existing_disks(facts), []
    found = [*([decision.finding] if decision.finding else [])]
    same = [*identity_findings(facts, name)]
    if same:
        found = same  # nothing else matters
    elif decision.action in (Action.SYNC, Action.RESUME, Action.REFUSE, Action.STOP_REPLICA):
        found += [*source_findings(facts.source, options), *duplicate_findings(facts), *replica_findings(facts)]
        found += [*live_findings(facts.source, options, own_operation)]
        found += [*host_findings(facts, name), *storage_findings(facts, disks)]
        found += findings if decision.action is not Action.REFUSE else []
        found += route_findings(facts, options)
    since, no_bitmap_reason = _since(facts, name)
    plan = Plan(
        name,
        facts,
        options,
        identity,
        decision,
        route_of(facts, options),
        facts.route.reason,
        disks,
        tuple(found),
        (),
        continues=own_operation is not None,
        backup=backup_job(facts, options, name, identity.operation, since),
        no_bitmap_reason=no_bitmap_reason,
    )
    directory = stage_directory(facts, options, disks, resumed)
    return plan if plan.blocking else replace(plan, steps=_steps(plan, directory))


def _decide(facts: Facts, options: SyncOptions, name: str, own_operation: str | None) -> Decision:
    existing, staged = facts.destination.existing, facts.destination.staged
    host, vm = facts.destination.host.name, facts.source.domain.name
    first = unfinished(facts, name, own_operation)
    in_use = existing is not None and existing.domain.state != SHUT_OFF
    if first is not None and not (first.action is Action.FINISH and in_use):
        return first
    if existing is None:
        text = f"{host} has no VM named {name} to bring up to date."
        remedy = f"clone it first: kvm-clone clone {facts.source.host.name} {host} {vm}; or let --create do so"
        return _refuse("replica-missing", name, text, remedy)
    if existing.mark is None or existing.mark.source_uuid != facts.source.xml.uuid:
        text = f"VM {name} on {host} is no replica of {vm}: kvm-clone did not make it from that VM."
        return _refuse("not-a-replica", name, text, "choose another --target-name, or replace it with clone --force")
    refused = _refuse_used_replica(existing, options, name, host)
    if refused is not None:
        return refused
    if staged is not None:
        return _with_staged(facts, staged, options, name, own_operation)
    if options.retry is Retry.RESUME:
        text = f"There is no interrupted sync of {name} on {host}."
        return _refuse("nothing-to-resume", name, text, "leave out --resume")
    unchanged = existing.unused and existing.mark.fingerprint == facts.source.fingerprint
    compared = options.verify is Verify.FULL and facts.source.live is not None  # which takes a point in time to compare
    if unchanged and not compared and options.retry is not Retry.FORCE:
        return Decision(Action.NOTHING)
    return Decision(Action.SYNC, replace=True, update=True)


def _refuse_used_replica(existing: Existing, options: SyncOptions, name: str, host: str) -> Decision | None:
    """Return the refusal of a replica that somebody uses or has used, or what --force does with it; else None."""
    forced = options.retry is Retry.FORCE
    if existing.domain.state != SHUT_OFF:
        if forced:
            return Decision(Action.STOP_REPLICA)
        text = f"The replica {name} on {host} is {existing.domain.state}."
        return _refuse("replica-running", name, text, "shut it down, or let --force stop and overwrite it")
    if not existing.unused and not forced:
        text = f"The replica {name} on {host} was started or changed since it was last brought up to date."
        remedy = "look at what it has that the source has not; --force overwrites it"
        return _refuse("replica-changed", name, text, remedy)
    return None


def _with_staged(facts: Facts, staged: Staged, options: SyncOptions, name: str, own_operation: str | None) -> Decision:
    host = facts.destination.host.name
    resume = Decision(Action.RESUME, replace=True, update=True)
    if staged.operation == own_operation:
        return resume
    if options.retry is Retry.FORCE:
        return Decision(Action.SYNC, discard=True, replace=True, update=True)
    if staged.kind != SYNC:
        text = f"An interrupted attempt to clone {name} is kept on {host}."
        remedy = "resume with kvm-clone clone --resume, or start over with --force"
        return _refuse("other-attempt", name, text, remedy)
    if staged.source_uuid != facts.source.xml.uuid:
        text = f"The interrupted sync of {name} on {host} is from another VM, {staged.source_name}."
        return _refuse("other-attempt", name, text, f"drop it: kvm-clone cleanup {host}, or start over with --force")
    if options.retry is Retry.NONE:
        text = f"An interrupted sync of {name} is kept on {host}."
        return _refuse(EXISTS, name, text, "resume with --resume or --idempotent, or start over with --force")
    return resume


def _refuse(code: str, subject: str, text: str, remedy: str) -> Decision:
    return Decision(Action.REFUSE, finding=block(code, subject, text, remedy))


def _disks(
    facts: Facts, options: SyncOptions, name: str, identity: Identity, staged: Staged | None
) -> tuple[tuple[PlannedDisk, ...], list[Finding]]:
    """Return an overlay for each image that the replica has and a whole file for each other, in the source's order.

    UEFI variables are small, and copied whole.
    """
    existing = facts.destination.existing
    bases = {image.target: image for image in existing.images} if existing is not None else {}
    findings: list[Finding] = []
    whole: list[ImageFacts] = []
    for image in facts.source.images:
        base = bases.get(image.target)
        reasons = list(_unusable(base)) if base is not None else []
        if base is not None and existing is not None and not base.error and base.path not in existing.removable:
            reasons.append(f"must not be written into: {dict(existing.kept).get(base.path, 'it is gone')}")
        if base is not None and image.virtual_size < base.virtual_size:
            reasons.append(f"is larger ({format_bytes(base.virtual_size)}) than the source's has become")
        if reasons and options.retry is not Retry.FORCE:
            text = f"Disk {image.target} of the replica ({base.path if base else ''}) {' and '.join(reasons)}."
            findings.append(block("replica-disk", image.target, text, "let --force copy it anew"))
        if base is None or reasons:
            whole.append(image)
    names = Names(facts.source.domain.name, name, identity.operation)
    placed, placing = place(facts, options, names, staged, tuple(whole))
    new = {disk.target: disk for disk in placed}
    disks = [
        new.get(image.target) or _updated(facts, image, bases[image.target], identity.operation, staged)
        for image in facts.source.images
        if image.target in new or (image.target in bases and image not in whole)
    ]
    return tuple(disks), [*findings, *placing]


def _unusable(base: ImageFacts) -> Iterator[str]:
    """Yield why an image of the replica cannot be brought up to date."""
    if base.error:
        yield f"cannot be read: {base.error}"
    elif not base.regular or base.format not in FORMATS:
        yield f"is no image file of the formats {' and '.join(FORMATS)}"
    elif base.below or base.data_file or base.encrypted or base.snapshots:
        yield "has a backing file, a data file, internal snapshots or encryption"


def _updated(facts: Facts, image: ImageFacts, base: ImageFacts, operation: str, staged: Staged | None) -> PlannedDisk:
    """Return the disk whose changes go into an overlay on the replica's image, or into a copy that shares blocks."""
    directory = facts.destination.directories.get(Place.of_file(base.path).container)
    shares = directory is not None and directory.reflink
    longest = directory.longest if directory is not None else 0
    new = successor_place(base, operation, longest) if shares else overlay_place(base, operation, image.target)
    kept = staged.disks.get(image.target) if staged is not None else None
    wanted = ("", base.format) if shares else (base.path, QCOW2)
    if kept is not None and (
        not kept.durable or (kept.backing, kept.format) != wanted or kept.size != image.virtual_size
    ):
        kept = None  # nothing to resume, or it was made for another image
    fine = not shares and has_subclusters(facts.destination.host.qemu_img)
    return PlannedDisk(image, Place.of_file(kept.final) if kept else new, kept, base, shares, fine)


def _since(facts: Facts, name: str) -> tuple[str, str]:
    """Return the checkpoint since which a dirty bitmap names what the replica lacks, or why there is none."""
    existing = facts.destination.existing
    mark = existing.mark if existing is not None else None
    if mark is None or existing is None or not mark.checkpoint:
        return "", "the replica's state was made without --track"
    if facts.source.live is None:
        return "", "the source is shut off"
    if not existing.unused:
        return "", "the replica was used since"
    if not mark.verified:
        return "", "the replica's state was not proven"
    if moved := _moved(facts, existing, mark.fingerprint):
        return "", f"{moved} is another file than at the last sync"
    if not mark.checkpoint.startswith((chain_of(facts, name), chain_by_uuid(facts, name))):
        return "", f"the checkpoint {mark.checkpoint} is of another chain"
    if mark.checkpoint not in facts.source.domain.checkpoints:
        return "", f"the source lacks the checkpoint {mark.checkpoint}"
    return mark.checkpoint, ""


def _moved(facts: Facts, existing: Existing, source: str) -> str:
    """Return the first disk of the replica that the source now has in another file; nothing when there is none.

    A bitmap belongs to its file: it does not say what the replica of another file lacks.
    """
    then = files_in(source)
    ours = {image.target for image in existing.images}
    moved = (image.target for image in facts.source.images if image.target in ours and not _is_same(image, then))
    return next(moved, "")


def _is_same(image: ImageFacts, then: Mapping[str, str]) -> bool:
    """Whether the image is in the same file, by its inode: a device may get another number at a reboot.

    An inode of 0 identifies nothing: see agent/disks/filesystem.py.
    """
    inode = fingerprint.content(image.fingerprint)[:1]
    return inode not in ((), ("0",)) and fingerprint.content(then.get(image.target, ""))[:1] == inode


def _steps(plan: Plan, directory: str) -> tuple[Step, ...]:
    facts, decision = plan.facts, plan.decision
    if decision.action is Action.FINISH:
        return finishing_steps(facts)
    if decision.action is Action.STOP_REPLICA:
        return (TakeLock(), StopDomain(), ReleaseLock())
    if decision.action is Action.NOTHING:
        return (VerifyExisting(plan.disks),) if plan.options.verify is Verify.FULL else ()
    existing = facts.destination.existing
    assert existing is not None
    kept = {disk.below.path for disk in plan.disks if disk.below is not None}
    removed = tuple(path for path in existing.removable if path not in kept)
    steps = before(facts.destination.staged, decision, directory)
    steps.append(begin_step(plan, directory))
    steps += map(CreateDisk, plan.disks)
    steps += content_steps(plan)
    steps += map(PublishDisk, plan.disks)
    forget = existing.beside if removed else ()
    merging = [MergeDisks()] if kept else []
    return (*steps, DefineDomain(removed, forget), *merging, RemoveReplaced(removed, forget), *last_steps(plan))
