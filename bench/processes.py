"""Children of the benchmark: each has a session of its own, a time limit, and an end by its own process id."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPT_SECONDS = 15.0
_KILL_SECONDS = 5.0


class BenchError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True)
class Done:
    """A command that succeeded: how long it took from its start to its end, and what it printed."""

    seconds: float
    output: str


def ignore_ending_signals() -> None:
    """From now on nothing disturbs what puts things in order."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(argv: Sequence[str], environment: Mapping[str, str], limit: float) -> Done:
    """Run a command. Raises BenchError when it fails or takes longer than `limit` seconds."""
    started = time.perf_counter()
    process = _start(argv, environment)
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{_shown(argv)}: not done after {limit:.0f} s") from None
    finally:
        end(process)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise BenchError(f"{_shown(argv)}: {_last_words(errors or output, process.returncode)}")
    return Done(seconds, output)


@contextlib.contextmanager
def running(argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Have a command run in the background, and end it."""
    process = _start(argv, environment)
    try:
        yield process
    finally:
        end(process)


def check_running(process: subprocess.Popen[str]) -> None:
    """Raise BenchError when a background command has ended."""
    if process.poll() is not None:
        assert process.stderr is not None
        raise BenchError(f"{_shown(process.args)}: {_last_words(process.stderr.read(), process.returncode)}")


def _start(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(environment),
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt a child and all below it, as Ctrl-C on a terminal would; kill what stays."""
    if process.poll() is not None:
        return
    with contextlib.ExitStack() as stack:
        # Descriptors of processes cannot come to mean other processes, as process ids can.
        family = []
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                family.append(os.pidfd_open(pid))
                stack.callback(os.close, family[-1])
        for number, patience in ((signal.SIGINT, _INTERRUPT_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            for descriptor in family:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
            family = _left_after(family, patience)
    process.wait(timeout=_KILL_SECONDS)


def _left_after(family: list[int], seconds: float) -> list[int]:
    """Those of the processes that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while family and (left := deadline - time.monotonic()) > 0:
        ended, _, _ = select.select(family, [], [], left)
        family = [descriptor for descriptor in family if descriptor not in ended]
    return family


def children() -> dict[int, list[int]]:
    """The children of every process."""
    found: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[parent].append(int(entry.name))
    return found


def descendants(root: int) -> list[int]:
    """Every process below `root`, parents before their children."""
    known = children()
    found = list(known.get(root, []))
    for pid in found:
        found.extend(known.get(pid, []))
    return found


def _shown(argv: object) -> str:
    words = [str(word) for word in argv] if isinstance(argv, (list, tuple)) else [str(argv)]
    # What enters a host stands before the command itself.
    if "--" in words and words[0] == "nsenter":
        words = words[words.index("--") + 1 :]
    return " ".join(words)


def _last_words(said: str, status: int) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"ended with status {status}"
