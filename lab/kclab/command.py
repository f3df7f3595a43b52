"""Running other programs, and the one error type of the lab."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

WAIT_SECONDS = 60.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LabError(Exception):
    """Something the user has to know; its text is one line that says what to do."""


def environment() -> dict[str, str]:
    """Give the environment of every program the lab starts: the user's own settings stay outside."""
    kept = {name: os.environ[name] for name in ("TERM",) if name in os.environ}
    return {"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8", **kept}


def run(*argv: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program and return its output; a failure is a LabError with the program's last line."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=environment())
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is missing: run scripts/install lab") from error
    if check and done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise LabError(f"{' '.join(argv)}: {lines[-1]}")
    return done


def kill(pid: int) -> None:
    """Kill one process, which may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def started_at(pid: int | str) -> str | None:
    """Tell when a process was started, as the kernel counts, or None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def running(pid_file: Path) -> int | None:
    """Return the process that the file names by id and start time, or None when it has ended."""
    try:
        pid, started = pid_file.read_text().split()
    except (OSError, ValueError):
        return None
    # A process id that was given to another process since has another start time.
    return int(pid) if started_at(pid) == started else None


def wait_until(condition: Callable[[], bool], failure: str) -> None:
    """Poll until the condition holds; LabError with the given text when it does not in time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(failure)
        time.sleep(0.03)


def missing_programs(names: Sequence[str]) -> list[str]:
    """List those of the programs that are not installed."""
    return [name for name in names if which(name) is None]


def which(name: str) -> str | None:
    """Find a program in the lab's own PATH."""
    return shutil.which(name, path=PATH)
