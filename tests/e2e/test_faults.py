"""The fault matrix: whatever fails when a record has just been journalled, the same command then ends it well.

KVM_CLONE_WRITE_MATRIX=1 writes what was seen to docs/faults.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from clonekit import (
    IMPATIENT,
    Done,
    agents,
    assert_equal,
    assert_nothing_left,
    definition,
    ended,
    environment,
    kill,
    kvm_clone,
    picture,
    pids,
    records,
    wait_until,
    wipe,
)
from labclient import REPOSITORY, Lab, Vm

pytestmark = pytest.mark.e2e

HELD = Path(__file__).with_name("held.py")
OURS = "metadata/{https://kvm-clone.org/xmlns/clone/1}clone"

RECORDS = ("begin", "create", "durable", "copied", "proven", "publish", "define", "committed")


@dataclass(frozen=True)
class Fault:
    """What hits, and what mends it. `at`: the records at which there is something to hit."""

    hit: Callable[[Lab, subprocess.Popen[str]], None]
    heal: Callable[[Lab], None] = lambda lab: None
    at: tuple[str, ...] = RECORDS


def _first_agent(host: str) -> Callable[[Lab, subprocess.Popen[str]], None]:
    return lambda lab, child: kill(lab, host, agents(lab, host)[0])


def _power(host: str) -> Fault:
    return Fault(lambda lab, child: lab.power("off", host), lambda lab: lab.power("on", host))


FAULTS = {
    "controller killed": Fault(lambda lab, child: child.kill()),
    "source agent killed": Fault(_first_agent("kc-a")),
    "destination agent killed": Fault(_first_agent("kc-b")),
    "receiver killed": Fault(lambda lab, child: kill(lab, "kc-b", agents(lab, "kc-b")[1]), at=("durable",)),
    "qemu-nbd killed": Fault(lambda lab, child: kill(lab, "kc-b", pids(lab, "kc-b", "qemu-nbd")[0]), at=("durable",)),
    "network cut": Fault(lambda lab, child: lab.net("cut", "kc-b"), lambda lab: lab.net("heal", "kc-b")),
    "source without power": _power("kc-a"),
    "destination without power": _power("kc-b"),
}

KINDS = ("clone", "replacing clone")

FAST = {
    ("clone", "begin", "controller killed"),
    ("clone", "create", "destination agent killed"),
    ("clone", "durable", "receiver killed"),
    ("clone", "publish", "controller killed"),
    ("clone", "define", "controller killed"),
    ("clone", "proven", "source agent killed"),
    ("replacing clone", "durable", "qemu-nbd killed"),
    ("replacing clone", "copied", "controller killed"),
    ("replacing clone", "publish", "controller killed"),
    ("replacing clone", "define", "controller killed"),
    ("replacing clone", "define", "destination agent killed"),
    ("replacing clone", "committed", "controller killed"),
}
"""What `make test` runs; `make test-faults` runs all."""

CELLS = [
    (kind, record, fault) for kind in KINDS for record in RECORDS for fault in FAULTS if record in FAULTS[fault].at
]


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[tuple[str, str, str], str]]:
    """What came of each cell."""
    found: dict[tuple[str, str, str], str] = {}
    yield found
    if os.environ.get("KVM_CLONE_WRITE_MATRIX") == "1":
        (REPOSITORY / "docs/faults.md").write_text(as_markdown(found))


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


@contextmanager
def held(lab: Lab, record: str, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A clone that has stopped at the record, and is killed in the end if it has not ended."""
    line = [sys.executable, str(HELD), record, "clone", "-F", str(lab.ssh_config), *argv]
    quick = {"KVM_CLONE_CONNECT_TIMEOUT": "3", "KVM_CLONE_CONNECT_RETRIES": "0"}
    child = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **quick},
    )
    try:
        wait_until(f"the clone stops at {record}", lambda: _stopped(child), 30)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def _stopped(child: subprocess.Popen[str]) -> bool:
    assert child.poll() is None, child.communicate()
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def assert_whole(lab: Lab, source: Vm, old: Vm | None, content: dict[str, bytes]) -> None:
    """Whatever VM of that name there is has all its disks: the new one's, or the old one's, untouched."""
    if source.name not in picture(lab, "kc-b").domains.split():
        assert old is None
        return
    there = definition(lab, "kc-b", source.name)
    if there.find(OURS) is not None:
        assert_equal(lab, source)
        return
    assert old is not None
    assert there.findtext("uuid") == old.uuid
    assert {path: lab.outside("kc-b", path).read_bytes() for path in content} == content


def outcome(first: Done, again: Done) -> str:
    """One cell of the matrix."""
    if first.code == 0:
        return "goes on"
    result = again.document
    if not result["changed"]:
        return "complete"
    return "resumed" if result["bytes_reused"] else "anew"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "record", "fault"),
    [pytest.param(*cell, marks=pytest.mark.fast if cell in FAST else ()) for cell in CELLS],
)
def test_the_same_command_ends_well_after(
    lab: Lab, seen: dict[tuple[str, str, str], str], kind: str, record: str, fault: str
) -> None:
    source = lab.vm("kc-a", "fault", ["qcow2:16M:4M", "raw:16M:4M"], boot=False)
    old = lab.vm("kc-b", "fault", ["raw:4M:1M", "qcow2:4M:1M"], boot=False) if kind == "replacing clone" else None
    content = {path: lab.outside("kc-b", path).read_bytes() for path in old.disks.values()} if old else {}
    slow = ("--bandwidth-limit", "3M") if record == "durable" else ()
    argv = ("kc-a", "kc-b", "fault", "--idempotent", "--output", "json")
    with held(lab, record, *argv, *slow, *IMPATIENT, "--retries", "1") as child:
        assert record in [entry["record"] for entry in records(lab)]
        try:
            FAULTS[fault].hit(lab, child)
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
            first = ended(child, 150)
        finally:
            FAULTS[fault].heal(lab)
    assert "Traceback" not in first.err
    assert_whole(lab, source, old, content)
    # --wait: an agent that a cut network keeps from hearing of its controller's end holds the lock for a while.
    again = kvm_clone(lab, "clone", *argv, "--wait")
    assert again.code == 0, first.err + again.err
    assert_equal(lab, source)
    if old is not None:
        assert definition(lab, "kc-b", "fault").findtext("uuid") == old.uuid
    kept = {path.rpartition("/")[2] for path in content} & {name for name, _, _ in picture(lab, "kc-b").files}
    assert not kept, "the replaced VM's disks are still there"
    assert_nothing_left(lab)
    seen[kind, record, fault] = outcome(first, again)


LEGEND = """# Fault matrix

What was seen when a fault hit right after a record of the journal had become durable (`make test-faults`). After every
cell: the old VM, if there was one, was untouched or completely replaced; no VM was defined with incomplete disks; the
same command with `--idempotent` ended with exit code 0 and a clone equal to its source; no staged file, journal, lock
or process remained.

| word | the run that was hit |
|---|---|
| goes on | ended with exit code 0 by itself |
| resumed | failed; the next run went on with what was staged |
| anew | failed; the next run copied everything |
| complete | failed after its commit; the next run only tidied up |
| | there is nothing of that kind to hit at that moment |
"""


def as_markdown(seen: dict[tuple[str, str, str], str]) -> str:
    """The matrix as a document."""
    text = LEGEND
    for kind in KINDS:
        text += f"\n## A {kind}\n\n| after | {' | '.join(FAULTS)} |\n|---|{'---|' * len(FAULTS)}\n"
        for record in RECORDS:
            text += f"| `{record}` | {' | '.join(seen.get((kind, record, fault), '') for fault in FAULTS)} |\n"
    return text
