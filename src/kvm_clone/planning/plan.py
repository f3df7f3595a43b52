"""The plan of a clone: facts and options in, findings and steps out. Pure: no I/O, no clock, nothing random."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace

from kvm_clone.definition.volumes import Volume
from kvm_clone.errors import DomainExistsError, KvmCloneError, LockedError, RefusedError
from kvm_clone.findings import EXISTS_CODES, LOCKED, Finding, Severity, block
from kvm_clone.image import Image
from kvm_clone.options import CloneOptions, Options, Retry, Route, Verify
from kvm_clone.planning.assets import Place
from kvm_clone.planning.checks import destination_findings, estimate, source_findings
from kvm_clone.planning.decide import Action, Decision, decide
from kvm_clone.planning.domain_facts import BackupJob
from kvm_clone.planning.facts import Facts, ImageFacts, Staged
from kvm_clone.planning.host_paths import renames
from kvm_clone.planning.identity_checks import SAME_VM, duplicate_findings, identity_findings
from kvm_clone.planning.live_checks import backup_job, live_findings, stale_checkpoints
from kvm_clone.planning.placement import Names, PlannedDisk, place, stage_directory, variables_image, volumes_of
from kvm_clone.planning.steps import (
    BeginBackup,
    BeginStage,
    CheckSource,
    CopyDisks,
    CreateDisk,
    DefineDomain,
    DiscardStage,
    DropCheckpoints,
    EndBackup,
    EndStage,
    MergeDisks,
    ProveDisks,
    PublishDisk,
    RemoveExisting,
    RemoveReplaced,
    SealReplica,
    SettleStage,
    Step,
    StopDomain,
    TakeUpCommitted,
    VerifyExisting,
)
from kvm_clone.planning.storage import storage_findings


@dataclass(frozen=True)
class Identity:
    """What is random, drawn before planning: the operation's name; the clone's UUID, MACs and generation ID."""

    operation: str
    uuid: str
    macs: tuple[str, ...]
    genid: str | None = None


@dataclass(frozen=True)
class Plan:
    """The findings about an operation, and its steps in order; none where a finding blocks it.

    `continues`: it resumes what this run was doing when a connection dropped. `backup`: the job that offers a running
    source's disks. `no_bitmap_reason`: why no dirty bitmap is used, nothing where one is.
    """

    name: str
    facts: Facts
    options: Options
    identity: Identity
    decision: Decision
    route: Route
    route_reason: str
    disks: tuple[PlannedDisk, ...]
    findings: tuple[Finding, ...]
    steps: tuple[Step, ...]
    continues: bool = False
    backup: BackupJob | None = None
    no_bitmap_reason: str = ""

    @property
    def uuid(self) -> str:
        """The clone's UUID: that of the VM it replaces or already is, the source's if it is kept, else a new one."""
        existing = self.facts.destination.existing
        if existing is not None and (self.decision.replace or self.decision.action in DONE_ALREADY):
            return existing.domain.uuid
        preserve = isinstance(self.options, CloneOptions) and self.options.preserve_uuid
        return self.facts.source.xml.uuid if preserve else self.identity.uuid

    @property
    def macs(self) -> tuple[str, ...]:
        """The clone's MAC addresses: those it has for the source's already, the source's if they are kept, else new."""
        existing, own = self.facts.destination.existing, self.facts.source.xml.macs
        if isinstance(self.options, CloneOptions) and self.options.preserve_mac:
            return own
        mark = existing.mark if existing is not None and self.decision.update else None
        known = mark.mac_pairs if mark is not None else {}
        return tuple(known.get(mac, new) for mac, new in zip(own, self.identity.macs, strict=True))

    @property
    def host_paths(self) -> dict[str, str]:
        """The new paths of the VM's logs and sockets that another VM of the destination has."""
        return renames(self.facts, self.name)

    @property
    def volumes(self) -> dict[str, Volume]:
        """The pool and volume by which the definition names a disk, by target; the others are named by their paths."""
        return volumes_of(self.facts, self.disks)

    @property
    def variables(self) -> Image | None:
        """The file of UEFI variables that the definition shall name; None where libvirt names it, or there is none."""
        names = Names(self.facts.source.domain.name, self.name, self.identity.operation)
        return variables_image(self.facts, names, self.disks)

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """The findings for which the plan is not run."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.BLOCKING)

    def refusal(self) -> KvmCloneError | None:
        """Return the error that a plan with blocking findings ends with; None for a plan that can be run."""
        if not self.blocking:
            return None
        codes = {finding.code for finding in self.blocking}
        asked = self.options.retry is not Retry.NONE  # without a flag the VM only has the name that was wanted
        exists = DomainExistsError if codes <= EXISTS_CODES | (set() if asked else {SAME_VM}) else RefusedError
        kind = LockedError if LOCKED in codes else exists  # the other findings may come from that operation
        text = "; ".join(finding.text.rstrip(".") for finding in self.blocking)
        remedies = dict.fromkeys(finding.remedy for finding in self.blocking if finding.remedy)
        return kind(text, subject=self.name, remedy="; ".join(remedies), findings=self.blocking)


DONE_ALREADY = (Action.NOTHING, Action.FINISH)


def make_plan(facts: Facts, options: CloneOptions, identity: Identity, own_operation: str | None = None) -> Plan:
    """Plan a clone. Every finding is reported, not only the first.

    `own_operation`: the operation of this run that a dropped connection has interrupted.
    """
    name = options.name_for(facts.source.domain.name)
    decision = decide(facts, options.retry, name, own_operation, digested=options.verify_existing)
    staged = facts.destination.staged if decision.action is Action.RESUME else None
    names = Names(facts.source.domain.name, name, identity.operation)
    disks, placing = place(facts, options, names, staged)
    if decision.action in DONE_ALREADY:
        disks, placing = existing_disks(facts), ()
    findings = tuple([decision.finding] if decision.finding else [])
    route = route_of(facts, options)
    same = tuple(identity_findings(facts, name))
    if same:
        findings = same  # nothing else matters
    elif decision.action not in DONE_ALREADY:
        findings += (
            *source_findings(facts.source, options),
            *duplicate_findings(facts),
            *live_findings(facts.source, options, own_operation),
        )
        findings += (*destination_findings(facts, options, name, decision), *placing)
        findings += tuple(storage_findings(facts, disks, room=not decision.remove_first))
        findings += (*route_findings(facts, options), *estimate(facts, options, route, disks))
    if staged is not None:
        identity = replace(identity, operation=staged.operation)
    plan = Plan(
        name,
        facts,
        options,
        identity,
        decision,
        route,
        facts.route.reason,
        disks,
        findings,
        (),
        continues=own_operation is not None,
        backup=backup_job(facts, options, name, identity.operation, since=""),
    )
    directory = stage_directory(facts, options, disks, staged)
    return plan if plan.blocking else replace(plan, steps=_steps(plan, options, directory))


def route_of(facts: Facts, options: Options) -> Route:
    """Return the route that the data takes."""
    return Route.DIRECT if facts.route.direct and options.route is not Route.RELAY else Route.RELAY


def route_findings(facts: Facts, options: Options) -> list[Finding]:
    """Return a finding where the route that the user asked for cannot be taken."""
    if options.route is not Route.DIRECT or facts.route.direct:
        return []
    text = f"The direct route cannot be taken: {facts.route.reason}"
    remedy = "let the source host connect to the destination by SSH, or use --route relay"
    return [block("route", facts.destination.host.name, text, remedy)]


def _steps(plan: Plan, options: CloneOptions, directory: str) -> tuple[Step, ...]:
    facts, decision, disks = plan.facts, plan.decision, plan.disks
    if decision.action is Action.FINISH:
        return finishing_steps(facts)
    if decision.action is Action.NOTHING:
        return (VerifyExisting(disks),) if options.verify_existing else ()
    existing = facts.destination.existing
    removable = existing.removable if existing is not None else ()
    steps = before(facts.destination.staged, decision, directory)
    steps.append(begin_step(plan, directory))
    if decision.remove_first:
        steps.append(RemoveExisting(removable))
    steps += map(CreateDisk, disks)
    steps += content_steps(plan)
    steps += map(PublishDisk, disks)
    forget = existing.beside if existing is not None and decision.replace else ()
    removed = removable if decision.replace else ()
    steps += [StopDomain()] if decision.stop and decision.replace else []
    steps.append(DefineDomain(removed, forget))
    steps += [RemoveReplaced(removed, forget)] if decision.replace else []
    return (*steps, *last_steps(plan))


def begin_step(plan: Plan, directory: str) -> BeginStage:
    """Return the step that begins the stage. It discards the attempt that the plan has seen, and no other."""
    staged, decision = plan.facts.destination.staged, plan.decision
    here = staged is not None and staged.directory == directory
    discards = staged.operation if staged is not None and here and decision.discard else ""
    existing = plan.facts.destination.existing
    replaced = existing.files if existing is not None and (decision.replace or decision.remove_first) else {}
    marks = tuple(sorted({posixpath.dirname(path) for path in replaced}))
    return BeginStage(directory, decision.action is Action.RESUME, discards, marks)


def content_steps(plan: Plan) -> list[Step]:
    """Return the steps that copy and prove, and those that make sure that one state of the source is copied."""
    disks, backup = plan.disks, plan.backup
    steps: list[Step] = []
    if disks and backup is not None:
        stale = stale_checkpoints(plan.facts, plan.name, backup.incremental)
        steps.append(BeginBackup(backup, plan.options.quiesce, stale))
    if disks:
        steps.append(CopyDisks(disks))
        steps += [ProveDisks(disks, plan.options.verify)] if plan.options.verify is not Verify.OFF else []
    offered = {one.target for one in backup.disks} if backup is not None else set()
    read_directly = tuple(disk for disk in disks if disk.key not in offered)
    if backup is None or read_directly:
        steps.append(CheckSource(read_directly))
    if disks and backup is not None:
        steps.append(EndBackup())
    return steps


def last_steps(plan: Plan) -> list[Step]:
    """Return the last steps of every operation, after its commit."""
    containers = {disk.place.container for disk in plan.disks}
    steps: list[Step] = [SealReplica(), EndStage(tuple(sorted(containers)))]
    if plan.backup is not None:
        used = plan.backup.incremental
        steps += [DropCheckpoints((used,))] if used else []
    return steps


def finishing_steps(facts: Facts) -> tuple[Step, ...]:
    """Return the steps that finish an earlier run, which has committed."""
    staged = facts.destination.staged
    assert staged is not None
    return (
        SettleStage(staged.directory, staged.operation, committed=True),
        TakeUpCommitted(staged.directory, staged.operation),
        MergeDisks(),
        RemoveReplaced(*_pending(facts)),
        SealReplica(),
        EndStage(()),
    )


def _pending(facts: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the commit left to be removed, by libvirt's definition: nothing is removed for a journal alone."""
    existing, staged = facts.destination.existing, facts.destination.staged
    pending = existing.pending if existing is not None else None
    if pending is None or staged is None or pending.operation != staged.operation:
        return (), ()
    return pending.remove, pending.forget


def before(staged: Staged | None, decision: Decision, directory: str) -> list[Step]:
    """Return the steps that an earlier attempt requires first."""
    steps: list[Step] = []
    if staged is not None and staged.defining:
        steps.append(SettleStage(staged.directory, staged.operation, committed=False))
    if staged is not None and decision.discard and staged.directory != directory:
        steps.append(DiscardStage(staged.directory, staged.operation))
    return steps


def existing_disks(facts: Facts) -> tuple[PlannedDisk, ...]:
    """Return the source's disks with the files that the finished clone has for them."""
    existing = facts.destination.existing
    assert existing is not None
    theirs = {
        disk.target: ImageFacts(disk.path or "", disk.format, target=disk.target) for disk in existing.xml.own_disks
    }
    return tuple(
        PlannedDisk(image, Place.of_file(theirs[image.target].path), base=theirs[image.target], shares=True)
        for image in facts.source.images
        if image.target in theirs
    )
