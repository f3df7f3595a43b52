"""What the user has agreed to with a command: what its first plan stops, replaces, removes or discards. Pure.

The command plans again by itself after a dropped connection. What was not there when the first plan was made is then
left alone, whatever the flags: the user gave them for what was there.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvm_clone.errors import DomainExistsError, KvmCloneError
from kvm_clone.planning.decide import Action
from kvm_clone.planning.domain_facts import SHUT_OFF
from kvm_clone.planning.plan import Plan


@dataclass(frozen=True)
class Consent:
    """What the destination had at the first plan: the VM's definition, whether it ran, and the interrupted attempt."""

    existing: str | None
    running: bool
    attempt: str | None

    def refusal(self, plan: Plan) -> KvmCloneError | None:
        """Return the error for a later plan of the same command that goes beyond this; None if it does not."""
        decision, now = plan.decision, consent_of(plan)
        name, host = plan.name, plan.facts.destination.host.name
        touches = decision.replace or decision.remove_first or decision.action is Action.STOP_REPLICA
        if touches and now.existing is not None and now.existing != self.existing:
            return _exceeded(name, f"VM {name} on {host} is another one than when this command began")
        if (decision.stop or decision.action is Action.STOP_REPLICA) and now.running and not self.running:
            return _exceeded(name, f"VM {name} on {host} was started since this command began")
        if decision.discard and now.attempt not in (self.attempt, plan.identity.operation):
            return _exceeded(name, f"another attempt at {name} was made on {host} since this command began")
        return None


def consent_of(plan: Plan) -> Consent:
    """Return what the plan has found at the destination."""
    existing, staged = plan.facts.destination.existing, plan.facts.destination.staged
    return Consent(
        existing.domain.xml if existing is not None else None,
        existing is not None and existing.domain.state != SHUT_OFF,
        staged.operation if staged is not None else None,
    )


def _exceeded(name: str, text: str) -> KvmCloneError:
    return DomainExistsError(
        f"{text}; it was left as it is", subject=name, remedy="look at it, and run the command again"
    )
