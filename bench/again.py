"""What a second run costs: of a finished clone, and of one that was cut off at three quarters.

The first run is not timed. The cut is a SIGKILL of the command when the file at the destination has reached three
quarters of its size; the second command is timed to its end, and says how much content it sent.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arena import COPY, DESTINATION, IMAGES, LIMIT_SECONDS, SOURCE, Arena
from methods import clone_command, clone_environment
from processes import BenchError, Done, run

CUT = 0.75
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Second:
    """One second run: its time, and the content it sent in bytes."""

    seconds: float
    sent: int


def _finished(arena: Arena) -> Second:
    _clone(arena)
    return _second(arena, _clone(arena, "--idempotent"))


def _cut_off(arena: Arena) -> Second:
    needed = arena.outside(SOURCE, arena.image).stat().st_blocks * 512 * CUT

    def reached() -> bool:
        parts = arena.outside(DESTINATION, IMAGES).glob(".kvm-clone-*.part")
        return sum(part.stat().st_blocks * 512 for part in parts) >= needed

    _kill_when(clone_command(arena, "--route", "direct"), clone_environment(arena), reached)
    return _second(arena, _clone(arena, "--resume"))


def _rsync_cut_off(arena: Arena) -> Second:
    command = ["rsync", "-aS", "--partial", "--inplace", "--stats", arena.image, f"{DESTINATION}:{COPY}"]
    needed = arena.outside(SOURCE, arena.image).stat().st_size * CUT
    file = arena.outside(DESTINATION, COPY)
    _kill_when(
        arena.entered(SOURCE, *command), dict(os.environ), lambda: file.exists() and file.stat().st_size >= needed
    )
    done = arena.run(SOURCE, *command)
    arena.check(COPY)
    found = re.search(r"Total bytes sent: ([\d,]+)", done.output)
    return Second(done.seconds, int(found.group(1).replace(",", "")) if found else 0)


def _clone(arena: Arena, *flags: str) -> Done:
    return run(clone_command(arena, "--route", "direct", *flags), clone_environment(arena), LIMIT_SECONDS)


def _second(arena: Arena, done: Done) -> Second:
    result = json.loads(done.output)
    [disk] = result["disks"]
    arena.check(disk["destination"])
    return Second(done.seconds, result["bytes_sent"])


def _kill_when(argv: Sequence[str], environment: dict[str, str], reached: Callable[[], bool]) -> None:
    """Start a command and kill it, with its own children, when the condition holds."""
    null = subprocess.DEVNULL
    child = subprocess.Popen(argv, env=environment, stdin=null, stdout=null, stderr=null, start_new_session=True)
    deadline = time.monotonic() + LIMIT_SECONDS
    while child.poll() is None and not reached():
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    ended = child.poll() is not None
    if not ended:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if ended:
        raise BenchError(f"{Path(argv[0]).name} had ended before it could be cut off")


RUNS: tuple[tuple[str, Callable[[Arena], Second]], ...] = (
    ("kvm-clone --idempotent, finished and unchanged", _finished),
    ("kvm-clone --resume, cut off at 75 %", _cut_off),
    ("rsync --partial --inplace, cut off at 75 %", _rsync_cut_off),
)


def measure(arena: Arena, rounds: int) -> str:
    """Every second run, interleaved; the table."""
    found: dict[str, list[Second]] = {title: [] for title, _ in RUNS}
    for number in range(1, rounds + 1):
        for title, work in RUNS:
            arena.clear()
            second = work(arena)
            found[title].append(second)
            print(f"round {number}: {title} {second.seconds:.2f} s", file=sys.stderr, flush=True)
    lines = ["", f"{'second runs':<50} {'seconds':>8} {'MiB sent':>9}"]
    for title, runs in found.items():
        seconds = statistics.median(run.seconds for run in runs)
        sent = statistics.median(run.sent for run in runs) / (1 << 20)
        lines.append(f"{title:<50} {seconds:>8.2f} {sent:>9.0f}")
    return "\n".join(lines)
