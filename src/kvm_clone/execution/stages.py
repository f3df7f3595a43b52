"""How far a run is, and what an interruption or a failure means there: one table, which the run consults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Stage(StrEnum):
    """How far a run is, in the order in which a run goes through them; MERGING and POSTPONED are a sync's alone."""

    LOOKING = "looking"
    STAGING = "staging"
    COMMITTING = "committing"
    COMMITTED = "committed"
    MERGING = "merging"
    POSTPONED = "postponed"


class Cancelled(StrEnum):
    """When the steps of a cancelled run end."""

    AT_ONCE = "ends at once"
    ANSWERED = "ends when libvirt has answered"
    SOON = "ends soon: the rest gets a few seconds"


class Lost(StrEnum):
    """Whether a run needs the host that is lost."""

    ENDS = "ends"
    GOES_ON = "goes on"


class Failure(StrEnum):
    """What becomes of what was written when the steps have ended early, for whatever reason."""

    NOTHING = "nothing was written"
    KEPT_OR_UNDONE = "kept if another try may mend it, else undone"
    LIBVIRT_DECIDES = "kept if another try may mend it, else undone unless libvirt has the definition"
    COMPLETE = "complete: what is left is for the next run"


@dataclass(frozen=True)
class Row:
    """What the ways in which a run can end early mean at one stage."""

    cancelled: Cancelled
    source_lost: Lost
    destination_lost: Lost
    failure: Failure

    @property
    def is_complete(self) -> bool:
        """Whether the clone is whole already."""
        return self.failure is Failure.COMPLETE

    @property
    def is_before_commit(self) -> bool:
        """Whether libvirt was not asked to define anything yet."""
        return self.failure in (Failure.NOTHING, Failure.KEPT_OR_UNDONE)


TABLE: Mapping[Stage, Row] = MappingProxyType(
    {
        Stage.LOOKING: Row(Cancelled.AT_ONCE, Lost.ENDS, Lost.ENDS, Failure.NOTHING),
        Stage.STAGING: Row(Cancelled.AT_ONCE, Lost.ENDS, Lost.ENDS, Failure.KEPT_OR_UNDONE),
        Stage.COMMITTING: Row(Cancelled.ANSWERED, Lost.GOES_ON, Lost.ENDS, Failure.LIBVIRT_DECIDES),
        Stage.COMMITTED: Row(Cancelled.SOON, Lost.GOES_ON, Lost.ENDS, Failure.COMPLETE),
        Stage.MERGING: Row(Cancelled.AT_ONCE, Lost.GOES_ON, Lost.ENDS, Failure.COMPLETE),
        Stage.POSTPONED: Row(Cancelled.SOON, Lost.GOES_ON, Lost.ENDS, Failure.COMPLETE),
    }
)
"""A lost host ends the steps as a cancellation does; what was written is then up to `failure`."""
