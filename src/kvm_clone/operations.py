"""The log of every operation that this machine has run: what it was, each step with its result, and its end.

One file for each operation in $XDG_STATE_HOME/kvm-clone/operations, a JSON object on each line. It is a pointer and a
log: what can be gone on with is known by the journal at the destination alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNING, DONE, KEPT, FAILED = "running", "done", "interrupted", "failed"


def directory() -> Path:
    """Where the logs lie."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "kvm-clone" / "operations"


class OperationLog:
    """The log of one operation, being written. A log that cannot be written is no reason to fail."""

    def __init__(self, operation: str, **about: Any) -> None:
        self._path = directory() / f"{operation}.log"
        self._write(event="begin", operation=operation, pid=os.getpid(), process=_started(os.getpid()), **about)

    def step(self, step: str, result: str, seconds: float) -> None:
        """A step was taken, or failed."""
        self._write(event="step", step=step, result=result, seconds=round(seconds, 3))

    def end(self, state: str, text: str = "") -> None:
        """The operation is over, for this run."""
        self._write(event="end", state=state, text=text)

    def _write(self, **entry: Any) -> None:
        _append(self._path, **entry)


def _append(path: Path, **entry: Any) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **entry}) + "\n")


@dataclass(frozen=True)
class Operation:
    """One operation of this machine. `changed`: seconds since the epoch of its last entry.

    `command`: clone or sync.
    """

    operation: str
    source: str
    destination: str
    vm: str
    name: str
    state: str
    text: str
    changed: float
    entries: tuple[dict[str, Any], ...]
    command: str = "clone"


def operations() -> list[Operation]:
    """Every operation, the newest last."""
    found = [operation for path in directory().glob("*.log") if (operation := read(path.stem)) is not None]
    return sorted(found, key=lambda one: one.changed)


def read(operation: str) -> Operation | None:
    """The operation of that name, None when this machine has not run it."""
    entries = tuple(_entries(directory() / f"{operation}.log"))
    begins = [entry for entry in entries if entry.get("event") == "begin"]
    if not begins:
        return None
    begin, last = begins[-1], entries[-1]
    alive = _started(begin.get("pid", 0)) == begin.get("process") is not None
    ended = last.get("event") == "end"
    state = last["state"] if ended else RUNNING if alive else KEPT
    text = last.get("text", "") if ended else "" if alive else "its process is gone"
    values = {key: str(begin.get(key, "")) for key in ("source", "destination", "vm", "name")}
    return Operation(
        operation,
        **values,
        state=state,
        text=text,
        changed=last["time"],
        entries=entries,
        command=begin.get("command", "clone"),
    )


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    if "/" in path.stem or not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(entry, dict):
            yield entry


def end(operation: str, state: str, text: str) -> None:
    """Write into the log of an operation whose process is gone what has become of it since."""
    _append(directory() / f"{operation}.log", event="end", state=state, text=text)


def _started(pid: int) -> str | None:
    """When the process was started, in the kernel's clock: a number may be used again, the pair is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
