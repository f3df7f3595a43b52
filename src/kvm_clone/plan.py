"""The plan of a clone: facts and options in, findings and steps out. Pure: no I/O, no clock, no chance."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace

from kvm_clone.checks import destination_findings, estimate, source_findings, space_findings
from kvm_clone.decide import Action, Decision, decide
from kvm_clone.errors import DomainExistsError, KvmCloneError, LockedError, RefusedError
from kvm_clone.facts import Facts, Staged
from kvm_clone.findings import EXISTS, LOCKED, Finding, Severity, block
from kvm_clone.options import CloneOptions, Route
from kvm_clone.placement import PlannedDisk, place, stage_directory


@dataclass(frozen=True)
class Identity:
    """What chance decides, decided before planning: the operation's name, and the clone's UUID and MACs."""

    operation: str
    uuid: str
    macs: tuple[str, ...]


@dataclass(frozen=True)
class RemoveExisting:
    """Remove the VM of that name before copying, as --cleanup-existing asks. Undo: none, by the user's own choice."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class SettleStage:
    """Journal on which side of its commit point an earlier attempt ended. Undo: none needed."""

    directory: str
    committed: bool


@dataclass(frozen=True)
class DiscardStage:
    """Undo an earlier attempt whose journal lies elsewhere. Undo: none needed."""

    directory: str


@dataclass(frozen=True)
class BeginStage:
    """Take the destination's lock, and begin the journal in `directory` or go on with it. Undo: remove it, let go."""

    directory: str
    resume: bool


@dataclass(frozen=True)
class CreateDisk:
    """Make the empty staged image. Undo: remove it."""

    disk: PlannedDisk


@dataclass(frozen=True)
class CopyDisks:
    """Send every disk's content. Undo: nothing of its own, the staged images go."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class ProveDisks:
    """Digest every disk at both ends and compare. Undo: nothing."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class CheckSource:
    """Make sure that the source's images are as they were when the plan was made. Undo: nothing."""

    disks: tuple[PlannedDisk, ...]


@dataclass(frozen=True)
class PublishDisk:
    """Give the staged image its final name. Undo: remove it."""

    disk: PlannedDisk


@dataclass(frozen=True)
class StopDomain:
    """Stop the VM that is about to be replaced. Undo: start it again."""


@dataclass(frozen=True)
class DefineDomain:
    """Define the clone: the commit point. Undo: none; a definition that libvirt refuses changes nothing.

    `remove`, `forget`: what RemoveReplaced is to remove, journalled for whoever has to do it.
    """

    remove: tuple[str, ...]
    forget: tuple[str, ...]


@dataclass(frozen=True)
class RemoveReplaced:
    """Remove what only the replaced VM had: files, snapshots and checkpoints by name.

    After the commit: a failure here is a warning.
    """

    paths: tuple[str, ...]
    forget: tuple[str, ...]


@dataclass(frozen=True)
class EndStage:
    """Remove the journal and let go of the lock. After the commit: a failure here is a warning."""

    directories: tuple[str, ...]


@dataclass(frozen=True)
class FinishEarlier:
    """Remove the journal of an earlier run that has committed."""

    directory: str


@dataclass(frozen=True)
class VerifyExisting:
    """Digest a finished clone against its source."""

    disks: tuple[PlannedDisk, ...]


Step = (
    RemoveExisting
    | SettleStage
    | DiscardStage
    | BeginStage
    | CreateDisk
    | CopyDisks
    | ProveDisks
    | CheckSource
    | PublishDisk
    | StopDomain
    | DefineDomain
    | RemoveReplaced
    | EndStage
    | FinishEarlier
    | VerifyExisting
)


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order, and what there is to say about it.

    `continues`: it takes up what this very run was doing when a connection dropped.
    """

    name: str
    facts: Facts
    options: CloneOptions
    identity: Identity
    decision: Decision
    route: Route
    route_reason: str
    disks: tuple[PlannedDisk, ...]
    findings: tuple[Finding, ...]
    steps: tuple[Step, ...]
    continues: bool = False

    @property
    def uuid(self) -> str:
        """The clone's UUID: that of the VM it replaces or already is, the source's if it is kept, else a new one."""
        existing = self.facts.destination.existing
        if existing is not None and (self.decision.replace or self.decision.action in _DONE_ALREADY):
            return existing.domain.uuid
        return self.facts.source.xml.uuid if self.options.preserve_uuid else self.identity.uuid

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """The findings that keep the plan from being run."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.BLOCKING)

    def refusal(self) -> KvmCloneError | None:
        """The error that a plan with blocking findings ends with, None for one that can be run."""
        if not self.blocking:
            return None
        codes = {finding.code for finding in self.blocking}
        exists = DomainExistsError if codes == {EXISTS} else RefusedError
        kind = LockedError if LOCKED in codes else exists  # what else there is may be that operation's doing
        text = "; ".join(finding.text.rstrip(".") for finding in self.blocking)
        remedies = dict.fromkeys(finding.remedy for finding in self.blocking if finding.remedy)
        return kind(text, subject=self.name, remedy="; ".join(remedies), findings=self.blocking)


_DONE_ALREADY = (Action.NOTHING, Action.FINISH)


def make_plan(facts: Facts, options: CloneOptions, identity: Identity, own_operation: str | None = None) -> Plan:
    """Plan a clone. Every finding is reported, not only the first.

    `own_operation`: the operation of this very run that a dropped connection has interrupted.
    """
    name = options.new_name or facts.source.domain.name
    decision = decide(facts, options.retry, name, own_operation)
    staged = facts.destination.staged if decision.action is Action.RESUME else None
    disks, placing = place(facts, options, name, staged)
    if decision.action in _DONE_ALREADY:
        disks, placing = _existing_disks(facts), ()
    findings = tuple([decision.finding] if decision.finding else [])
    route = Route.DIRECT if facts.route.direct and options.route is not Route.RELAY else Route.RELAY
    if decision.action not in _DONE_ALREADY:
        findings += (*source_findings(facts.source), *destination_findings(facts, options, name, decision), *placing)
        findings += tuple(space_findings(facts.destination, disks)) if not decision.remove_first else ()
        findings += (*_route_findings(facts, options), *estimate(facts, options, route, disks))
    if staged is not None:
        identity = replace(identity, operation=staged.operation)
    refused = any(one.severity is Severity.BLOCKING for one in findings)
    directory = stage_directory(facts, options, disks, staged)
    steps = () if refused else _steps(facts, options, decision, disks, directory)
    return Plan(
        name,
        facts,
        options,
        identity,
        decision,
        route,
        facts.route.reason,
        disks,
        findings,
        steps,
        continues=own_operation is not None,
    )


def _route_findings(facts: Facts, options: CloneOptions) -> list[Finding]:
    if options.route is not Route.DIRECT or facts.route.direct:
        return []
    text = f"The direct route cannot be taken: {facts.route.reason}"
    remedy = "let the source host connect to the destination by SSH, or use --route relay"
    return [block("route", facts.destination.host.name, text, remedy)]


def _steps(
    facts: Facts,
    options: CloneOptions,
    decision: Decision,
    disks: tuple[PlannedDisk, ...],
    directory: str,
) -> tuple[Step, ...]:
    staged = facts.destination.staged
    if decision.action is Action.FINISH:
        assert staged is not None
        return (
            SettleStage(staged.directory, committed=True),
            RemoveReplaced(staged.remove, staged.forget),
            FinishEarlier(staged.directory),
        )
    if decision.action is Action.NOTHING:
        return (VerifyExisting(disks),) if options.verify_existing else ()
    existing = facts.destination.existing
    removable = existing.removable if existing is not None else ()
    steps = _before(staged, decision, directory)
    steps.append(BeginStage(directory, decision.action is Action.RESUME))
    if decision.remove_first:
        steps.append(RemoveExisting(removable))
    steps += map(CreateDisk, disks)
    if disks:
        steps += [CopyDisks(disks), *([ProveDisks(disks)] if options.verify else [])]
    steps += [CheckSource(disks), *map(PublishDisk, disks)]
    if decision.replace:
        steps += [StopDomain()] if decision.stop else []
        forget = existing.beside if existing is not None else ()
        steps += [DefineDomain(removable, forget), RemoveReplaced(removable, forget)]
    else:
        steps.append(DefineDomain((), ()))
    steps.append(EndStage(tuple(sorted({posixpath.dirname(disk.final) for disk in disks}))))
    return tuple(steps)


def _before(staged: Staged | None, decision: Decision, directory: str) -> list[Step]:
    """What an earlier attempt leaves to do."""
    steps: list[Step] = []
    if staged is not None and staged.defining:
        steps.append(SettleStage(staged.directory, committed=False))
    if staged is not None and decision.discard and staged.directory != directory:
        steps.append(DiscardStage(staged.directory))
    return steps


def _existing_disks(facts: Facts) -> tuple[PlannedDisk, ...]:
    """The source's disks with the files that the finished clone has for them."""
    existing = facts.destination.existing
    assert existing is not None
    paths = {disk.target: disk.path or "" for disk in existing.xml.own_disks}
    return tuple(PlannedDisk(image, paths[image.target]) for image in facts.source.images if image.target in paths)
