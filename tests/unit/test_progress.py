"""progress.py with a clock that is set by hand, and what the command line shows of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest

from kvm_clone.cli import progress as shown
from kvm_clone.cli.progress import watcher
from kvm_clone.progress import DiskProgress, Event, Meter, Note, Phase, PhaseStarted

MIB = 1 << 20


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("readings", "rate", "remaining"),
    [
        ([], 0, None),
        ([(0, 0)], 0, None),
        ([(0, 500)], 0, None),
        ([(0, 0), (0, 100)], 0, None),
        ([(0, 0), (1, 0)], 0, None),
        ([(0, 0), (2, 100)], 50, 18),
        ([(0, 500), (2, 600)], 50, 8),
        ([(0, 0), (1, 10), (2, 20), (4, 400)], 100, 6),
        ([(0, 0), (10, 1000)], 100, 0),
        ([(0, 0), (10, 2000)], 200, 0),
        ([(0, 0), (1, 500), (11, 600)], 10, 40),  # the first second is out of the window
        ([(0, 0), (100, 500)], 5, 100),  # two readings are kept however old they are
        ([(0, 0), (5, 500), (20, 500), (30, 500)], 0, None),
        ([(0, 500), (1, 100)], 0, None),
    ],
)
def test_meter(readings: list[tuple[float, int]], rate: float, remaining: float | None) -> None:
    clock = Clock()
    meter = Meter(clock)
    for at, done in readings:
        clock.now = 1000.0 + at
        meter.update(done)
    assert meter.rate == rate
    assert meter.remaining(1000) == remaining


def test_a_meter_keeps_the_window_only() -> None:
    clock = Clock()
    meter = Meter(clock)
    for second in range(1000):
        clock.now += 1
        meter.update(second * second)
    assert meter.rate == (999**2 - 989**2) / 10


Show = Callable[..., list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Show events, each at its second, elsewhere than on a terminal; the lines."""
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(shown, "Meter", lambda: Meter(clock))

    def show(*events: tuple[float, Event]) -> list[str]:
        with redirect_stderr(out), watcher(quiet=False) as on_event:
            for at, event in events:
                clock.now = 1000.0 + at
                on_event(event)
        return out.getvalue().splitlines()

    return show


def copy(disk: str, done: int, total: int = 100 * MIB) -> DiskProgress:
    return DiskProgress(Phase.COPY, disk, done, total)


COPYING = PhaseStarted(Phase.COPY, "direct route: kc-a can connect to kc-b")


def test_phases_and_notes_are_a_line_each(lines: Show) -> None:
    events = [
        (0.0, PhaseStarted(Phase.CONNECT, "connecting to kc-a and kc-b")),
        (0.1, Note("the VM may not start", warning=True)),
        (0.2, Note("worth [red]knowing[/red]")),
        (0.3, PhaseStarted(Phase.ROLL_BACK, "undoing what was written on kc-b")),
    ]
    assert lines(*events) == [
        "connect: connecting to kc-a and kc-b",
        "warning: the VM may not start",
        "worth [red]knowing[/red]",
        "roll back: undoing what was written on kc-b",
    ]


def test_a_line_every_three_seconds(lines: Show) -> None:
    events: list[tuple[float, Event]] = [(0, COPYING)]
    events += [(tenth / 10, copy("vda", tenth * MIB)) for tenth in range(1, 100)]
    assert lines(*events) == [
        "copy: direct route: kc-a can connect to kc-b",
        "copy: vda 30.0 MiB of 100.0 MiB, 10.0 MiB/s, 7s left",
        "copy: vda 60.0 MiB of 100.0 MiB, 10.0 MiB/s, 4s left",
        "copy: vda 90.0 MiB of 100.0 MiB, 10.0 MiB/s, 1s left",
    ]


def test_several_disks_have_a_sum(lines: Show) -> None:
    events = [
        (0, COPYING),
        (0, copy("vda", 0)),
        (0, copy("vdb", 0, 50 * MIB)),
        (2, copy("vda", 20 * MIB)),
        (4, copy("vdb", 10 * MIB, 50 * MIB)),
    ]
    assert lines(*events)[1:] == [
        "copy: vda 20.0 MiB of 100.0 MiB, 10.0 MiB/s, 8s left | vdb 10.0 MiB of 50.0 MiB, 2.5 MiB/s, 16s left"
        " | all 30.0 MiB of 150.0 MiB, 7.5 MiB/s, 16s left"
    ]


def test_no_time_is_left_of_what_is_done_or_stands_still(lines: Show) -> None:
    events = [
        (0, COPYING),
        (0, copy("vda", 0)),
        (4, copy("vda", 100 * MIB)),
        (5, PhaseStarted(Phase.PROVE, "digesting")),
        (5, DiskProgress(Phase.PROVE, "vda", 10, 1000)),
        (9, DiskProgress(Phase.PROVE, "vda", 10, 1000)),
    ]
    assert lines(*events)[1:] == [
        "copy: vda 100.0 MiB of 100.0 MiB, 25.0 MiB/s",
        "prove: digesting",
        "prove: vda 10 B of 1000 B, 0 B/s",
    ]


def test_a_phase_begins_with_its_own_counts(lines: Show) -> None:
    events = [
        (0, COPYING),
        (0, copy("vda", 0)),
        (1, copy("vdb", 100 * MIB)),
        (2, PhaseStarted(Phase.PROVE, "digesting")),
        (2, DiskProgress(Phase.PROVE, "vda", 0, 1000)),
        (6, DiskProgress(Phase.PROVE, "vda", 400, 1000)),
    ]
    assert lines(*events)[-1] == "prove: vda 400 B of 1000 B, 100 B/s, 6s left"


def test_a_count_that_falls_is_no_error(lines: Show) -> None:
    events = [(0, COPYING), (0, copy("vda", 50 * MIB)), (4, copy("vda", 10 * MIB))]
    assert lines(*events)[-1] == "copy: vda 10.0 MiB of 100.0 MiB, 0 B/s"


def test_an_empty_disk_is_no_error(lines: Show) -> None:
    events = [(0, COPYING), (0, copy("vda", 0, 0)), (4, copy("vda", 0, 0))]
    assert lines(*events)[-1] == "copy: vda 0 B of 0 B, 0 B/s"


EVERYTHING: list[Event] = [
    PhaseStarted(Phase.CONNECT, "connecting to [bold]kc-a[/bold] and kc-b"),
    Note("worth [red]knowing", warning=False),
    Note("[/] closes nothing", warning=True),
    COPYING,
    copy("vda", 0),
    copy("vd[b]", 0, 0),
    copy("vda", 50 * MIB),
    Note("while bars are shown", warning=True),
    copy("vda", 100 * MIB),
    copy("vd[b]", 0, 0),
    PhaseStarted(Phase.PROVE, "digesting"),
    DiskProgress(Phase.PROVE, "vda", 1, 3),
    DiskProgress(Phase.PROVE, "vda", 0, 3),
    PhaseStarted(Phase.ROLL_BACK, "undoing"),
]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_leaves_warnings(terminal: bool) -> None:
    out = Terminal() if terminal else io.StringIO()
    with redirect_stderr(out), watcher(quiet=True) as on_event:
        for event in EVERYTHING:
            on_event(event)
    assert out.getvalue() == "warning: [/] closes nothing\nwarning: while bars are shown\n"


class Terminal(io.StringIO):
    """What takes text and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_bars_on_a_terminal(terminal: Terminal) -> None:
    with redirect_stderr(terminal), watcher(quiet=False) as on_event:
        for event in EVERYTHING:
            on_event(event)
    text = terminal.getvalue()
    said = ["connect: connecting to [bold]kc-a[/bold] and kc-b", "worth [red]knowing", "warning: [/] closes nothing"]
    bars = ["vda", "vd[b]", "all", "100.0/100.0 MiB", "warning: while bars are shown", "0/3 bytes"]
    assert [part for part in (*said, *bars, "roll back: undoing") if part not in text] == []


def test_one_disk_needs_no_sum(terminal: Terminal) -> None:
    with redirect_stderr(terminal), watcher(quiet=False) as on_event:
        on_event(copy("vda", 50 * MIB))
    assert "50.0/100.0 MiB" in terminal.getvalue()
    assert "all" not in terminal.getvalue()


def test_the_terminal_is_left_in_order_after_a_failure(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError), redirect_stderr(terminal), watcher(quiet=False) as on_event:
        on_event(copy("vda", 50 * MIB))
        raise ZeroDivisionError
    shown_again, hidden = "\x1b[?25h", "\x1b[?25l"
    assert terminal.getvalue().rindex(shown_again) > terminal.getvalue().rindex(hidden)
