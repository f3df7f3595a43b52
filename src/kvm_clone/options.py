"""What a user can ask of an operation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Route(StrEnum):
    """Which way the data takes."""

    AUTO = "auto"
    DIRECT = "direct"
    RELAY = "relay"


class Retry(StrEnum):
    """What to do with what the destination already has; decide.py holds the table."""

    NONE = "none"
    IDEMPOTENT = "idempotent"
    FORCE = "force"
    CLEANUP_EXISTING = "cleanup-existing"
    RESUME = "resume"


@dataclass(frozen=True)
class CloneOptions:
    """Options of a clone.

    `new_name`: None keeps the name. `pool`: a storage pool of the destination. `parallel`: disks at once.
    `bandwidth_limit`: bytes a second over all disks together, None for no limit. `timeout`: seconds for the whole
    operation, None for no limit. `retries`: how often a dropped connection is taken up again. `keep_partial`: what is
    staged outlives an interruption. `wait`: wait for another operation on the same VM instead of failing.
    `verify_existing`: digest a finished clone instead of trusting its fingerprint.
    """

    new_name: str | None = None
    preserve_uuid: bool = False
    preserve_mac: bool = False
    pool: str | None = None
    route: Route = Route.AUTO
    verify: bool = True
    parallel: int = 2
    bandwidth_limit: int | None = None
    timeout: float | None = None
    retry: Retry = Retry.NONE
    retries: int = 3
    keep_partial: bool = True
    wait: bool = False
    verify_existing: bool = False
