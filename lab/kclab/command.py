"""Running other programs, and the one error type of the lab."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

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
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, check=False, env=environment()
        )
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


def missing_programs(names: Sequence[str]) -> list[str]:
    """List those of the programs that are not installed."""
    return [name for name in names if which(name) is None]


def which(name: str) -> str | None:
    """Find a program in the lab's own PATH."""
    return shutil.which(name, path=PATH)
