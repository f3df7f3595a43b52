"""The log of every operation that this machine has run: what it was, each step with its result, and its end.

One file for each operation in $XDG_STATE_HOME/kvm-clone/operations, a JSON object on each line. It is a pointer and a
log: what can be resumed is known by the journal at the destination alone. What lies there and is no such file, and
a line that is none of ours, is passed over.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNING, DONE, KEPT, FAILED = "running", "done", "interrupted", "failed"

_NAME = re.compile("[0-9a-f]{12}")
_HEAD, _TAIL = 64 * 1024, 1024 * 1024
"""How much of a log is read, from its beginning and from its end: a whole one has a few KiB."""

_LATEST = 1e11
"""No time in a log, in seconds since the epoch, is later: a date can be made of it."""

_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "begin": {"pid": int},
    "step": {"step": str, "result": str, "seconds": (int, float)},
    "end": {"state": str, "text": str},
}
"""What an entry has beside its time, by its event."""


def is_name(text: str) -> bool:
    """Whether an operation may have that name."""
    return _NAME.fullmatch(text) is not None


def directory() -> Path | None:
    """Where the logs lie; None where no home directory is known."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        # The XDG specification wants relative values ignored.
        base = state if state.is_absolute() else Path("~/.local/state").expanduser()
    except RuntimeError:  # no $HOME, and no such user
        return None
    return base / "kvm-clone" / "operations"


def _path(operation: str) -> Path | None:
    """Where the operation's log is. A name that is none may come from a journal, and leads to no other place."""
    base = directory()
    return base / f"{operation}.log" if base is not None and is_name(operation) else None


class OperationLog:
    """The log of one operation, being written. A log that cannot be written is no reason to fail."""

    def __init__(self, operation: str, **about: Any) -> None:
        self._path = _path(operation)
        self._write(event="begin", operation=operation, pid=os.getpid(), process=_started(os.getpid()), **about)

    def step(self, step: str, result: str, seconds: float) -> None:
        """A step was taken, or failed."""
        self._write(event="step", step=step, result=result, seconds=round(seconds, 3))

    def end(self, state: str, text: str = "") -> None:
        """The operation is over, for this run."""
        self._write(event="end", state=state, text=text)

    def _write(self, **entry: Any) -> None:
        _append(self._path, **entry)


def _append(path: Path | None, **entry: Any) -> None:
    if path is None:
        return
    line = json.dumps({"time": time.time(), **entry}).encode() + b"\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as log:
            size = os.fstat(log).st_size
            # A disk that was full has left a part of a line, which must not spoil this one.
            torn = size > 0 and os.pread(log, 1, size - 1) != b"\n"
            os.write(log, b"\n" + line if torn else line)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The file's descriptor. Raises OSError, also where there is a link, which is not followed, or a FIFO."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Operation:
    """One operation of this machine. `changed`: seconds since the epoch of its last entry.

    `command`: clone or sync. `directories`: every directory of the destination that it could stage data in; empty in
    a log of version 0.1.
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
    directories: tuple[str, ...] = ()


def joined(directories: Iterable[str]) -> str:
    """The directories as one value of an entry: a list would make older versions pass over it."""
    return json.dumps(sorted(directories))


def _split(value: object) -> tuple[str, ...]:
    """The directories that `joined` has written; none of a value that it would not write."""
    try:
        found = json.loads(value) if isinstance(value, str) else []
    except (ValueError, RecursionError):
        return ()
    right = isinstance(found, list) and all(isinstance(one, str) and one.startswith("/") for one in found)
    return tuple(found) if right else ()


def directories_at(destination: str) -> frozenset[str]:
    """Where this machine's operations that are not done may have staged data on the host, as it was named to them."""
    unfinished = [one for one in operations() if one.destination == destination and one.state != DONE]
    return frozenset(directory for one in unfinished for directory in one.directories)


def operations() -> list[Operation]:
    """Every operation, the newest last."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        base = directory()
        names = [path.stem for path in base.iterdir() if path.suffix == ".log"] if base is not None else []
    found = [operation for name in names if (operation := read(name)) is not None]
    return sorted(found, key=lambda one: one.changed)


def read(operation: str) -> Operation | None:
    """The operation of that name, None when this machine has not run it."""
    entries = tuple(_entries(operation))
    begins = [entry for entry in entries if entry["event"] == "begin"]
    if not begins:
        return None
    begin, last = begins[-1], entries[-1]
    alive = _started(begin["pid"]) == begin.get("process") is not None
    ended = last["event"] == "end"
    state = last["state"] if ended else RUNNING if alive else KEPT
    text = last["text"] if ended else "" if alive else "its process is gone"
    values = {key: str(begin.get(key, "")) for key in ("source", "destination", "vm", "name")}
    return Operation(
        operation,
        **values,
        state=state,
        text=text,
        changed=last["time"],
        entries=entries,
        command=str(begin.get("command", "clone")),
        directories=_split(begin.get("directories")),
    )


def _entries(operation: str) -> Iterator[dict[str, Any]]:
    for line in _content(_path(operation)).split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # torn by a crash, or not ours
            continue
        if _is_entry(entry):
            yield entry


def _content(path: Path | None) -> bytes:
    """The log; of one that is too long the beginning and the end, as if the lines between had been torn."""
    if path is None:
        return b""
    with contextlib.suppress(OSError), _opened(path, os.O_RDONLY) as log:
        size = os.fstat(log).st_size
        head = os.pread(log, _HEAD if size > _HEAD + _TAIL else _HEAD + _TAIL, 0)
        return head if size <= len(head) else head + b"\n" + os.pread(log, _TAIL, size - _TAIL)
    return b""


def _is_entry(entry: Any) -> bool:
    """Whether it is as we write them: flat, with what its event has."""
    if not isinstance(entry, dict) or not all(map(_is_plain, entry.values())):
        return False
    keys, when = _KEYS.get(str(entry.get("event"))), entry.get("time")
    if keys is None or not isinstance(when, int | float) or not 0 <= when < _LATEST:
        return False
    return all(isinstance(entry.get(key), kind) for key, kind in keys.items())


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it, and without a structure: Python reads NaN, too."""
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, dict | list)


def end(operation: str, state: str, text: str) -> None:
    """Write into the log of an operation whose process is gone what has become of it since."""
    _append(_path(operation), event="end", state=state, text=text)


def _started(pid: int) -> str | None:
    """When the process was started, in the kernel's clock: a number may be used again, the pair is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
