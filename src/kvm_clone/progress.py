"""The events of an operation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """The parts of an operation, in order."""

    CONNECT = "connect"
    INSPECT = "inspect"
    PREPARE = "prepare"
    COMPARE = "compare"
    COPY = "copy"
    PROVE = "prove"
    COMMIT = "commit"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins; `text` says what it is about."""

    phase: Phase
    text: str


@dataclass(frozen=True)
class DiskProgress:
    """How far one disk is in the copy or prove phase; `done` and `total` in bytes."""

    phase: Phase
    disk: str
    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """A sentence worth reading: a warning of the plan, the route taken, something that could not be undone."""

    text: str
    warning: bool = False


Event = PhaseStarted | DiskProgress | Note
OnEvent = Callable[[Event], None]

_WINDOW_SECONDS = 10.0


class Meter:
    """The rate over the last seconds, and the time that the rest will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> None:
        """Take a reading, in bytes since the beginning."""
        now = self._clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def rate(self) -> float:
        """Bytes a second; 0 until it can be known, and when a count begins anew."""
        if len(self._samples) < 2:
            return 0.0
        (then, before), (now, done) = self._samples[0], self._samples[-1]
        return max(0, done - before) / (now - then) if now > then else 0.0

    def remaining(self, total: int) -> float | None:
        """Seconds until `total` bytes are done, None while it cannot be known."""
        if not self._samples or not self.rate:
            return None
        return max(0, total - self._samples[-1][1]) / self.rate
