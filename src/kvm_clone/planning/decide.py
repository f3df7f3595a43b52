"""What a clone does with what the destination already has: the table of the retry flags. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvm_clone.findings import EXISTS, LOCKED, Finding, Severity
from kvm_clone.options import Retry
from kvm_clone.planning.domain_facts import SHUT_OFF
from kvm_clone.planning.facts import Existing, Facts, Staged


class Action(StrEnum):
    """What a plan does as a whole."""

    CLONE = "clone"
    RESUME = "resume"
    NOTHING = "nothing to do"
    FINISH = "finish"
    SYNC = "sync"
    STOP_REPLICA = "stop the replica"
    REFUSE = "stop here"


@dataclass(frozen=True)
class Decision:
    """The action and its details.

    `discard`: an interrupted attempt is undone first. `replace`: the commit replaces the existing VM. `stop`: the
    existing VM is stopped right before that. `remove_first`: the existing VM is removed before the copy, as the user
    asked. `update`: the existing VM is brought up to date, and keeps its UUID, formats and MAC addresses.
    """

    action: Action
    discard: bool = False
    replace: bool = False
    stop: bool = False
    remove_first: bool = False
    update: bool = False
    finding: Finding | None = None


def decide(
    facts: Facts, retry: Retry, name: str, own_operation: str | None = None, *, digested: bool = False
) -> Decision:
    """Return what the table says of these facts and this retry flag.

    `digested`: a clone whose source is unchanged is digested, whether or not it was used. `own_operation`: the
    operation of this run that a dropped connection has interrupted; it is resumed whatever the flag.
    """
    existing, staged = facts.destination.existing, facts.destination.staged
    first = unfinished(facts, name, own_operation)
    if first is not None:
        return first
    if own_operation is not None and staged is None and _made_by(existing, own_operation):
        return Decision(Action.NOTHING)  # the connection was lost after the last step
    if staged is not None and staged.kind != CLONE and retry not in (Retry.FORCE, Retry.CLEANUP_EXISTING):
        text = f"An interrupted sync of {name} is kept on {facts.destination.host.name}."
        remedy = "resume with kvm-clone sync --resume, or start over with --force"
        return _refuse("other-attempt", name, text, remedy)
    own = staged is not None and staged.operation == own_operation
    if own and (existing is None or retry is Retry.FORCE):
        return Decision(Action.RESUME, replace=existing is not None, stop=_is_running(existing))
    if existing is not None and not (staged is not None and retry is Retry.RESUME):
        return _with_existing(facts, existing, staged, retry, name, digested=digested)
    if staged is not None:
        return _with_staged(facts, existing, staged, retry, name)
    if retry is Retry.RESUME:
        text = f"There is no interrupted attempt to clone {name} on {facts.destination.host.name}."
        return _refuse("nothing-to-resume", name, text, "leave out --resume")
    return Decision(Action.CLONE)


CLONE, SYNC = "clone", "sync"
"""Kinds of operation, as journals name them."""


def unfinished(facts: Facts, name: str, own_operation: str | None) -> Decision | None:
    """Return the decision where another operation on the VM is under way, or committed and unfinished; else None."""
    existing, staged = facts.destination.existing, facts.destination.staged
    if staged is not None and staged.holder and staged.operation != own_operation:
        text = f"Another operation on {name} is under way on {facts.destination.host.name}: {staged.holder}."
        return _refuse(LOCKED, name, text, "wait until it has ended, or let --wait do so")
    if staged is not None and staged.foreign:
        text = f"{staged.directory} has an interrupted attempt at {name} on {staged.foreign}, which sees it too."
        remedy = f"resume it there, or discard it there (kvm-clone cleanup {staged.foreign}); or name another pool"
        return _refuse("foreign-attempt", name, text, remedy)
    if staged is not None and staged.defining and _made_by(existing, staged.operation):
        return Decision(Action.FINISH)
    if staged is not None and staged.in_use:  # by the VM that it was defined as, under another name now
        used = ", ".join(staged.in_use)
        text = f"A VM on {facts.destination.host.name} uses what an earlier attempt has left: {used}."
        return _refuse("attempt-in-use", name, text, f"give that VM the name {name} again, or remove it")
    return None


def _is_running(existing: Existing | None) -> bool:
    return existing is not None and existing.domain.state != SHUT_OFF


def _made_by(existing: Existing | None, operation: str) -> bool:
    return existing is not None and existing.mark is not None and existing.mark.operation == operation


def _is_current(facts: Facts, existing: Existing) -> bool:
    """Whether the VM is our complete clone of this source, and the source has not changed since."""
    source, mark = facts.source, existing.mark
    lacking = {disk.target for disk in source.xml.own_disks} - {disk.target for disk in existing.xml.own_disks}
    ours = mark is not None and mark.source_uuid == source.xml.uuid and not lacking
    return ours and existing.whole and mark is not None and mark.fingerprint == source.fingerprint


def _with_staged(facts: Facts, existing: Existing | None, staged: Staged, retry: Retry, name: str) -> Decision:
    """Return the decision where there is an interrupted attempt, and perhaps the VM that it was to replace."""
    host = facts.destination.host.name
    if retry in (Retry.FORCE, Retry.CLEANUP_EXISTING):
        return Decision(Action.CLONE, discard=True)
    if retry is Retry.NONE:
        text = f"An interrupted attempt to clone {name} is kept on {host}."
        return _refuse(EXISTS, name, text, "resume with --resume or --idempotent, or start over with --force")
    if staged.source_uuid != facts.source.xml.uuid:
        text = f"The interrupted attempt to clone {name} on {host} is of another VM, {staged.source_name}."
        return _refuse("other-attempt", name, text, f"drop it: kvm-clone cleanup {host}, or start over with --force")
    if existing is not None and _is_running(existing):
        return _in_use(existing, name, host)
    return Decision(Action.RESUME, replace=existing is not None)


def _with_existing(
    facts: Facts, existing: Existing, staged: Staged | None, retry: Retry, name: str, *, digested: bool
) -> Decision:
    host, running = facts.destination.host.name, _is_running(existing)
    if retry in (Retry.NONE, Retry.RESUME):
        kept = staged is not None
        text = f"{host} already has a VM named {name}" + (
            ", and an interrupted attempt to replace it." if kept else "."
        )
        remedy = "resume with --resume, or start over with --force" if kept else _REMEDY
        return _refuse(EXISTS, name, text, remedy)
    if retry is Retry.CLEANUP_EXISTING:
        return Decision(Action.CLONE, discard=staged is not None, remove_first=True, stop=running)
    if retry is Retry.FORCE:
        return Decision(Action.CLONE, discard=staged is not None, replace=True, stop=running)
    if staged is None and _is_current(facts, existing) and (existing.disks_untouched or digested):
        return Decision(Action.NOTHING)
    if running:
        return _in_use(existing, name, host)
    if staged is not None:
        return _with_staged(facts, existing, staged, retry, name)
    return Decision(Action.CLONE, replace=True)


_REMEDY = (
    "choose another --new-name; --idempotent accepts a clone that is up to date and replaces another VM that is shut "
    "off; --force replaces it in any case"
)


def _in_use(existing: Existing, name: str, host: str) -> Decision:
    text = f"VM {name} on {host} is {existing.domain.state}; it is not replaced while it is in use."
    return _refuse("existing-running", name, text, "shut it down, or let --force stop and replace it")


def _refuse(code: str, subject: str, text: str, remedy: str) -> Decision:
    return Decision(Action.REFUSE, finding=Finding(code, Severity.BLOCKING, subject, text, remedy))
