"""Progress on stderr: bars on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from kvm_clone.progress import DiskProgress, Event, Meter, Note, OnEvent, PhaseStarted
from kvm_clone.units import format_bytes, format_duration, format_rate

_LINE_SECONDS = 3.0


@contextmanager
def watcher(*, quiet: bool) -> Iterator[OnEvent]:
    """A callback that shows events while the block runs. Warnings are shown even when quiet."""
    if quiet:
        yield _warnings_only
    elif sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars.on_event
        finally:
            bars.stop()
    else:
        yield _Lines(sys.stderr).on_event


def _warnings_only(event: Event) -> None:
    if isinstance(event, Note) and event.warning:
        print(f"warning: {event.text}", file=sys.stderr)


def _said(event: PhaseStarted | Note) -> str:
    if isinstance(event, PhaseStarted):
        return f"{event.phase}: {event.text}"
    return f"warning: {event.text}" if event.warning else event.text


class _Watcher(ABC):
    """Shows events one by one."""

    def on_event(self, event: Event) -> None:
        """Show the event."""
        if isinstance(event, DiskProgress):
            self._advance(event)
            return
        if isinstance(event, PhaseStarted):
            self._begin_phase()
        self._say(event)

    @abstractmethod
    def _advance(self, event: DiskProgress) -> None:
        """Show how far a disk is."""

    @abstractmethod
    def _begin_phase(self) -> None:
        """Forget how far disks were in the phase before."""

    @abstractmethod
    def _say(self, event: PhaseStarted | Note) -> None:
        """Show a line of text."""


class _Bars(_Watcher):
    """A bar for each disk and one for all."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._state: dict[str, tuple[int, int]] = {}

    def _begin_phase(self) -> None:
        self.stop()

    def _say(self, event: PhaseStarted | Note) -> None:
        self._console.print(escape(_said(event)), highlight=False, style="yellow" if _warns(event) else "")

    def _advance(self, event: DiskProgress) -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
            self._progress = Progress(*columns, SpeedColumn(), TimeRemainingColumn(), console=self._console)
            self._progress.start()
        self._state[event.disk] = (event.done, event.total)
        self._set(event.disk, event.done, event.total)
        if len(self._state) > 1:
            done, total = (sum(values) for values in zip(*self._state.values(), strict=True))
            self._set("all", done, total)

    def _set(self, name: str, done: int, total: int) -> None:
        assert self._progress is not None
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(escape(f"  {name}"), total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def stop(self) -> None:
        """Stop updating the bars; they stay on the screen."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._tasks.clear()
        self._state.clear()


def _warns(event: PhaseStarted | Note) -> bool:
    return isinstance(event, Note) and event.warning


class _Lines(_Watcher):
    """A line for each phase, and one every few seconds within."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._state: dict[str, tuple[int, int]] = {}
        self._meters: dict[str, Meter] = {}
        self._printed = 0.0

    def _begin_phase(self) -> None:
        self._state.clear()
        self._meters.clear()
        self._printed = time.monotonic()

    def _say(self, event: PhaseStarted | Note) -> None:
        print(_said(event), file=self._out, flush=True)

    def _advance(self, event: DiskProgress) -> None:
        self._state[event.disk] = (event.done, event.total)
        self._meters.setdefault(event.disk, Meter()).update(event.done)
        done, total = (sum(values) for values in zip(*self._state.values(), strict=True))
        self._meters.setdefault("all", Meter()).update(done)
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS:
            self._printed = now
            parts = [self._part(name, *state) for name, state in self._state.items()]
            if len(parts) > 1:
                parts.append(self._part("all", done, total))
            print(f"{event.phase}: {' | '.join(parts)}", file=self._out, flush=True)

    def _part(self, name: str, done: int, total: int) -> str:
        meter = self._meters[name]
        left = meter.remaining(total)
        eta = "" if left is None or done >= total else f", {format_duration(left)} left"
        return f"{name} {format_bytes(done)} of {format_bytes(total)}, {format_rate(meter.rate)}{eta}"
