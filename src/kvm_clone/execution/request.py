"""What an operation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvm_clone.options import CloneOptions, Options


@dataclass(frozen=True)
class Request:
    """What is to be cloned, or synced, between which hosts, and how."""

    source: str
    destination: str
    vm: str
    options: Options = field(default_factory=CloneOptions)
