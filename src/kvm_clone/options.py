"""The options of an operation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from kvm_clone.errors import UsageError


class Route(StrEnum):
    """The way that the data takes."""

    AUTO = "auto"
    DIRECT = "direct"
    RELAY = "relay"


class Retry(StrEnum):
    """What to do with a VM or an interrupted attempt at the destination; planning/decide.py has the table."""

    NONE = "none"
    IDEMPOTENT = "idempotent"
    FORCE = "force"
    CLEANUP_EXISTING = "cleanup-existing"
    RESUME = "resume"


class Verify(StrEnum):
    """What is proven equal before the commit: nothing, the parts that were sent, or every byte."""

    OFF = "off"
    SENT = "sent"
    FULL = "full"


class Quiesce(StrEnum):
    """Whether a running guest's filesystems are frozen at the point in time that is copied."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


@dataclass(frozen=True)
class TransferOptions:
    """How content is moved and proven.

    `parallel`: disks at once. `bandwidth_limit`: bytes per second over all disks together, None for no limit.

    Raises UsageError for a number that is out of range.
    """

    route: Route = Route.AUTO
    parallel: int = 2
    bandwidth_limit: int | None = None
    verify: Verify = Verify.FULL

    def __post_init__(self) -> None:
        _check_least("parallel", self.parallel, 1)
        _check_least("bandwidth_limit", self.bandwidth_limit, 1)


@dataclass(frozen=True)
class Options(TransferOptions):
    """What clone and sync share.

    `pool`: a storage pool of the destination. `timeout`: seconds for the whole operation, None for no limit.
    `retries`: how often the operation reconnects after a dropped connection. `keep_partial`: staged data outlives an
    interruption. `wait`: wait for another operation on the same VM instead of failing. `track`: leave a checkpoint on
    a running source, from which the next sync knows what has changed. `without_saved_state`: copy the disks of a VM
    that has a managed save, whose memory image is not copied.

    Raises UsageError for a number that is out of range, and for an empty name.
    """

    pool: str | None = None
    timeout: float | None = None
    retry: Retry = Retry.NONE
    retries: int = 3
    keep_partial: bool = True
    wait: bool = False
    quiesce: Quiesce = Quiesce.AUTO
    track: bool = False
    without_saved_state: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least("retries", self.retries, 0)
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(
                f"timeout cannot be {self.timeout:g} s", subject="timeout", remedy="name a time above zero"
            )
        for field in ("pool", "new_name", "target_name"):
            if getattr(self, field, None) == "":
                raise UsageError(f"{field} is empty", subject=field, remedy=f"give {field} a value, or leave it out")

    @property
    def transfer(self) -> TransferOptions:
        """The part that the data path takes."""
        return TransferOptions(**{field.name: getattr(self, field.name) for field in fields(TransferOptions)})

    def name_for(self, name: str) -> str:
        """The name that the VM gets at the destination."""
        raise NotImplementedError


@dataclass(frozen=True)
class CloneOptions(Options):
    """Options of a clone.

    `new_name`: None keeps the name. `verify_existing`: compare digests of a finished clone instead of fingerprints.
    """

    new_name: str | None = None
    preserve_uuid: bool = False
    preserve_mac: bool = False
    verify_existing: bool = False

    def name_for(self, name: str) -> str:
        """See Options."""
        return self.new_name or name


@dataclass(frozen=True)
class SyncOptions(Options):
    """Options of a sync.

    `target_name`: the replica's name, None for the VM's own. `create`: clone if there is no replica.
    """

    verify: Verify = Verify.SENT
    target_name: str | None = None
    create: bool = False

    def name_for(self, name: str) -> str:
        """See Options."""
        return self.target_name or name

    @property
    def as_clone(self) -> CloneOptions:
        """The options of the clone that creates the replica."""
        shared = {field.name: getattr(self, field.name) for field in fields(Options)}
        shared["verify"] = Verify.OFF if self.verify is Verify.OFF else Verify.FULL
        return CloneOptions(**shared, new_name=self.target_name)


def _check_least(field: str, number: int | None, least: int) -> None:
    if number is not None and number < least:
        raise UsageError(f"{field} cannot be {number}", subject=field, remedy=f"the least is {least}")
