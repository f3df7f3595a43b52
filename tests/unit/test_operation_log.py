"""operations.py: logs that are whole, torn, strange or no logs at all, and places where none can be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clihelp import Run, in_this_process, own_home, there  # noqa: F401 - fixtures

from kvm_clone.errors import ExitCode
from kvm_clone.upkeep import operation_log
from kvm_clone.upkeep.operation_log import DONE, FAILED, KEPT, RUNNING, OperationLog

NAME, OTHER = "0123456789ab", "ba9876543210"
ABOUT = {"source": "kc-a", "destination": "kc-b", "vm": "web", "name": "copy", "action": "clone", "command": "clone"}


@pytest.fixture
def logs(home: Path) -> Path:
    """Where the logs lie."""
    directory = home / "state/kvm-clone/operations"
    directory.mkdir(parents=True)
    return directory


def state(name: str = NAME) -> str:
    found = operation_log.read(name)
    assert found is not None
    return found.state


def test_a_log(logs: Path) -> None:
    log = OperationLog(NAME, **ABOUT)
    assert state() == RUNNING
    log.step("CreateDisk", "done", 0.12345)
    log.end(DONE)
    one = operation_log.read(NAME)
    assert one is not None
    assert (one.operation, one.source, one.destination, one.vm, one.name) == (NAME, "kc-a", "kc-b", "web", "copy")
    assert (one.state, one.text) == (DONE, "")
    assert [entry["event"] for entry in one.entries] == ["begin", "step", "end"]
    assert one.entries[1]["seconds"] == 0.123
    assert operation_log.operations() == [one]


def test_one_whose_process_is_gone(logs: Path) -> None:
    script = f"from kvm_clone.upkeep.operation_log import OperationLog; OperationLog('{NAME}', vm='web')"
    subprocess.run([sys.executable, "-c", script], check=True)
    one = operation_log.read(NAME)
    assert one is not None
    assert (one.state, one.text) == (KEPT, "its process is gone")
    operation_log.end(NAME, FAILED, "cleaned up")
    assert state() == FAILED


@pytest.mark.parametrize(
    "name", ["../x", "x", "", "0123456789AB", "0123456789ab/", "0123456789abc", "/etc/passwd", "."]
)
def test_what_is_no_operation_s_name_leads_nowhere(here: Run, logs: Path, name: str) -> None:
    log = OperationLog(NAME, **ABOUT)
    log.end(KEPT)
    for path in (logs.parent / "x.log", logs / "x.log"):
        path.write_text((logs / f"{NAME}.log").read_text())
    before = {path: path.read_bytes() for path in logs.parent.rglob("*") if path.is_file()}
    OperationLog(name, **ABOUT).end(DONE)
    operation_log.end(name, FAILED, "x")
    assert operation_log.read(name) is None
    assert {path: path.read_bytes() for path in logs.parent.rglob("*") if path.is_file()} == before
    assert [one.operation for one in operation_log.operations()] == [NAME]
    if name:
        done = here("status", name)
        assert (done.code, done.out) == (ExitCode.USAGE, "")
        assert done.err.splitlines()[0].startswith(f"kvm-clone: {name!r} is no operation: ")


def test_an_operation_that_this_machine_does_not_know(here: Run) -> None:
    done = here("status", NAME)
    assert done.code == ExitCode.USAGE
    assert f"this machine knows no operation {NAME}" in done.err


BEGIN = {"time": 1.0, "event": "begin", "pid": 1, "process": "x", "vm": "web"}
END = {"time": 2.0, "event": "end", "state": "done", "text": ""}

NOT_OURS: dict[str, bytes] = {
    "torn": json.dumps(END).encode()[:-5],
    "no JSON": b"hello",
    "no object": b"[1]",
    "no UTF-8": b"\xff\xfe",
    "nested a little": json.dumps({**END, "text": [[1]]}).encode(),
    "nested deep": b'{"time": 2, "event": "end", "state": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested as deep as Python reads": b'{"time": 2, "event": "end", "state": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of thousands of digits": b'{"time": 2, "event": "end", "state": ' + b"1" * 5000 + b"}",
    "no time": json.dumps({key: value for key, value in END.items() if key != "time"}).encode(),
    "a time of no date": json.dumps({**END, "time": 1e300}).encode(),
    "a time of very many digits": json.dumps({**END, "time": 10**400}).encode(),
    "a time before time": json.dumps({**END, "time": -1}).encode(),
    "a time that is no number": b'{"time": NaN, "event": "end", "state": "done", "text": ""}',
    "a time in words": json.dumps({**END, "time": "now"}).encode(),
    "a value that JSON lacks": b'{"time": 2, "event": "end", "state": "done", "text": "", "more": Infinity}',
    "another event": json.dumps({**END, "event": "party"}).encode(),
    "no event": json.dumps({**END, "event": None}).encode(),
    "an end without its state": json.dumps({"time": 2, "event": "end", "text": ""}).encode(),
    "an end without its text": json.dumps({"time": 2, "event": "end", "state": "done"}).encode(),
    "a step without its result": json.dumps({"time": 2, "event": "step", "step": "x", "seconds": 1}).encode(),
    "a process that is a path": json.dumps({**BEGIN, "pid": "../etc", "vm": "forged"}).encode(),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_a_line_that_is_none_of_ours_is_passed_over(here: Run, logs: Path, what: str) -> None:
    step = {"time": 3.0, "event": "step", "step": "CopyDisks", "result": "done", "seconds": 1.5}
    lines = [json.dumps(BEGIN).encode(), NOT_OURS[what], json.dumps(step).encode(), NOT_OURS[what]]
    (logs / f"{NAME}.log").write_bytes(b"\n".join(lines))
    one = operation_log.read(NAME)
    assert one is not None
    assert (one.vm, one.state) == ("web", KEPT)
    assert one.entries == (BEGIN, step)
    for words in ((), (NAME,), (NAME, "--output", "json"), ("--output", "json")):
        done = here("status", *words)
        assert (done.code, done.err) == (ExitCode.DONE, "")
    assert [entry["event"] for entry in here("status", NAME, "--output", "json").document["log"]] == ["begin", "step"]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_text(json.dumps({**BEGIN, "vm": "elsewhere"}) + "\n")
    path.symlink_to(target)


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


NO_LOGS: list[Callable[[Path], Any]] = [fifo, link, loop, device, Path.mkdir]


@pytest.mark.parametrize("make", NO_LOGS, ids=lambda make: make.__name__)
def test_what_is_no_file_is_no_log(logs: Path, make: Callable[[Path], Any]) -> None:
    path = logs / f"{NAME}.log"
    make(path)
    OperationLog(OTHER, **ABOUT).end(DONE)
    started = time.monotonic()
    OperationLog(NAME, **ABOUT).end(DONE)
    assert operation_log.read(NAME) is None
    done = there("status", "--output", "json")
    assert time.monotonic() - started < 30
    assert (done.code, [one["operation"] for one in done.document["operations"]]) == (ExitCode.DONE, [OTHER])
    assert not path.is_symlink() or path.readlink().name in ("elsewhere", path.name, "zero")


def test_of_a_log_without_end_its_ends_are_read(here: Run, logs: Path) -> None:
    path = logs / f"{NAME}.log"
    path.write_text(json.dumps(BEGIN) + "\n")
    os.truncate(path, 1 << 30)
    assert state() == KEPT
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps(END).encode() + b"\n")
    assert state() == DONE
    assert here("status").code == ExitCode.DONE


@pytest.mark.parametrize("length", [1000, 60_000, 200_000, 1_000_000, 1_200_000, 3_000_000])
def test_a_long_log_is_read_as_far_as_it_counts(logs: Path, length: int) -> None:
    step = {"time": 1.5, "event": "step", "step": "x" * 80, "result": "done", "seconds": 1}
    line = json.dumps(step) + "\n"
    (logs / f"{NAME}.log").write_text(f"{json.dumps(BEGIN)}\n{line * (length // len(line))}{json.dumps(END)}\n")
    one = operation_log.read(NAME)
    assert one is not None
    assert (one.entries[0], one.entries[-1], one.state) == (BEGIN, END, DONE)
    assert all(entry == step for entry in one.entries[1:-1])


def test_a_torn_line_does_not_take_the_next_one_with_it(logs: Path) -> None:
    log = OperationLog(NAME, **ABOUT)
    with (logs / f"{NAME}.log").open("ab") as file:
        file.write(b'{"time": 1')
    log.end(DONE)
    assert state() == DONE


LIMITED = """
import resource
from kvm_clone.upkeep import operation_log
log = operation_log.OperationLog("0123456789ab", vm="web")
path = operation_log.directory() / "0123456789ab.log"
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
log.step("CopyDisks", "done", 1)
log.step("ProveDisks", "done", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.end("done")
assert [entry["event"] for entry in operation_log.read("0123456789ab").entries] == ["begin", "end"]
assert path.stat().st_size > size + 10
"""


def test_a_disk_that_is_full(logs: Path) -> None:
    done = there(python=("-c", LIMITED))
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("place", ["a file", "below a file", "/dev/null", "/proc", "/dev/full", "x" * 5000])
def test_a_place_where_no_log_can_be_written(
    here: Run, monkeypatch: pytest.MonkeyPatch, home: Path, place: str
) -> None:
    (home / "a file").touch()
    where = {"a file": str(home / "a file"), "below a file": str(home / "a file/x")}
    monkeypatch.setenv("XDG_STATE_HOME", where.get(place, place if place.startswith("/") else f"/{place}"))
    log = OperationLog(NAME, **ABOUT)
    log.step("CopyDisks", "done", 1)
    log.end(DONE)
    assert operation_log.operations() == []
    assert (here("status").code, here("status", NAME).code) == (ExitCode.DONE, ExitCode.USAGE)


@pytest.mark.parametrize("value", ["", "relative", None])
def test_without_a_state_directory_there_is_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, home: Path, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("XDG_STATE_HOME")
    else:
        monkeypatch.setenv("XDG_STATE_HOME", value)
    assert operation_log.directory() == home / ".local/state/kvm-clone/operations"


def test_somebody_without_a_home(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user: no $HOME, and no entry in passwd."""

    def homeless(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_STATE_HOME")
    OperationLog(NAME, **ABOUT).end(DONE)
    assert operation_log.operations() == []
    assert operation_log.read(NAME) is None


PLACES = ["/srv/a", '/srv/with "quotes",\nand a break', "/srv/\udcff"]


def test_where_operations_may_have_staged_data(logs: Path) -> None:
    OperationLog(NAME, **ABOUT, directories=operation_log.joined(PLACES)).end(KEPT)
    OperationLog(OTHER, **{**ABOUT, "destination": "kc-c"}, directories=operation_log.joined(["/srv/c"])).end(KEPT)
    one = operation_log.read(NAME)
    assert one is not None
    assert one.directories == tuple(sorted(PLACES))
    assert operation_log.directories_at("kc-b") == {*PLACES}
    operation_log.end(NAME, DONE, "")
    assert operation_log.directories_at("kc-b") == set()


@pytest.mark.parametrize("value", [None, "", "/srv/a", "[", "[" * 100_000, "[1]", '["relative"]', '{"/srv/a": 1}', 7])
def test_directories_that_are_none(logs: Path, value: object) -> None:
    OperationLog(NAME, **ABOUT, directories=value).end(KEPT)
    one = operation_log.read(NAME)
    assert one is not None
    assert one.directories == ()
