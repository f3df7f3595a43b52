"""What a plan has to say: the one form that plans, errors and results share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding weighs: a blocking one keeps the plan from being run."""

    BLOCKING = "blocking"
    WARNING = "warning"
    INFO = "info"


EXISTS, LOCKED = "domain-exists", "locked"
"""The blocking findings with exit codes of their own."""

EXISTS_CODES = frozenset({EXISTS, "not-a-replica", "replica-changed", "replica-running"})
"""What is at the destination stands in the way, and a flag can say what is to become of it."""


@dataclass(frozen=True)
class Finding:
    """Something the user must know before the plan is run."""

    code: str
    severity: Severity
    subject: str
    text: str
    remedy: str = ""


def block(code: str, subject: str, text: str, remedy: str = "") -> Finding:
    """A blocking finding."""
    return Finding(code, Severity.BLOCKING, subject, text, remedy)
