"""The fault matrix: whatever fails when a record has just been journalled, the same command then ends it well.

KVM_CLONE_WRITE_MATRIX=1 writes what is seen of each cell to docs/faults.md.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matrix
import pytest
from clonekit import (
    HELD,
    IMPATIENT,
    Done,
    agents,
    assert_equal,
    assert_nothing_left,
    definition,
    disks_of,
    ended,
    held,
    kill,
    kvm_clone,
    picture,
    pids,
    records,
    running,
    wipe,
)
from labclient import REPOSITORY, Lab, Vm
from matrix import Shape

pytestmark = pytest.mark.e2e

OURS = "metadata/{https://kvm-clone.org/xmlns/clone/1}clone"

RECORDS = ("nothing", "begin", "create", "durable", "copied", "proven", "publish", "define", "committed", "merged")


@dataclass(frozen=True)
class Fault:
    """What hits, and what mends it. `at`: the records at which there is something to hit."""

    hit: Callable[[Lab, subprocess.Popen[str]], None]
    heal: Callable[[Lab], None] = lambda lab: None
    at: tuple[str, ...] = RECORDS[1:]


def _first_agent(host: str) -> Callable[[Lab, subprocess.Popen[str]], None]:
    return lambda lab, child: kill(lab, host, agents(lab, host)[0])


def _power(host: str) -> Fault:
    return Fault(lambda lab, child: lab.power("off", host), lambda lab: lab.power("on", host))


TORN = "killed within its write"
"""The destination's agent dies with half of the record written; of `nothing`, when the journal was just made."""

FAULTS = {
    TORN: Fault(lambda lab, child: None, at=RECORDS),
    "controller killed": Fault(lambda lab, child: child.kill()),
    "source agent killed": Fault(_first_agent("kc-a")),
    "destination agent killed": Fault(_first_agent("kc-b")),
    "receiver killed": Fault(lambda lab, child: kill(lab, "kc-b", agents(lab, "kc-b")[1]), at=("durable",)),
    "qemu-nbd killed": Fault(lambda lab, child: kill(lab, "kc-b", pids(lab, "kc-b", "qemu-nbd")[0]), at=("durable",)),
    "network cut": Fault(lambda lab, child: lab.net("cut", "kc-b"), lambda lab: lab.net("heal", "kc-b")),
    "source without power": _power("kc-a"),
    "destination without power": _power("kc-b"),
}

KINDS = ("clone", "replacing clone", "sync")

FAST = {
    ("clone", "nothing", TORN),
    ("clone", "create", TORN),
    ("sync", "merged", TORN),
    ("clone", "begin", "controller killed"),
    ("clone", "durable", "receiver killed"),
    ("clone", "define", "controller killed"),
    ("replacing clone", "publish", "controller killed"),
    ("replacing clone", "define", "controller killed"),
    ("replacing clone", "committed", "controller killed"),
    ("sync", "durable", "receiver killed"),
    ("sync", "define", "destination agent killed"),
    ("sync", "merged", "controller killed"),
}
"""What `make test` runs; `make test-faults` runs all."""

CELLS = [
    (kind, record, fault)
    for kind in KINDS
    for record in RECORDS
    for fault in FAULTS
    if record in FAULTS[fault].at and (kind == "sync" or record != "merged")
]


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


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


CHANGED = 8 << 20
"""Bytes of the source that differ in a replica that is synced."""


@dataclass(frozen=True)
class Replica:
    """What a sync starts from: the replica's definition and its disks' files, as they were before."""

    uuid: str
    files: dict[str, bytes]


def replicated(lab: Lab) -> tuple[Vm, Replica]:
    """A VM, and its replica, which lacks a change of one of its disks and has zeros where the other has data."""
    source = lab.vm("kc-a", "fault", ["qcow2:16M:4M", "raw:16M:4M"], boot=False)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "fault")
    assert done.code == 0, done.err
    for target, command in (("vda", "write -z 1M 1M"), ("vdb", f"write -P 0x5a 4M {CHANGED}")):
        path = lab.outside("kc-a", source.disks[target])
        subprocess.run(["qemu-io", "-f", path.suffix[1:], "-c", command, path], check=True, stdout=subprocess.DEVNULL)
    paths = [path for path, _ in disks_of(lab, "kc-b", "fault").values()]
    uuid = definition(lab, "kc-b", "fault").findtext("uuid") or ""
    return source, Replica(uuid, {path: lab.outside("kc-b", path).read_bytes() for path in paths})


def assert_old_or_new(lab: Lab, source: Vm, replica: Replica) -> None:
    """The replica's definition names its disks as they were, or disks that are completely as the source's."""
    assert definition(lab, "kc-b", source.name).findtext("uuid") == replica.uuid
    there = disks_of(lab, "kc-b", source.name)
    if {path for path, _ in there.values()} == replica.files.keys() and all(
        lab.outside("kc-b", path).read_bytes() == content for path, content in replica.files.items()
    ):
        return
    for target, (path, format_) in there.items():
        flat = f"/run/{target}.raw"
        lab.run("kc-b", "qemu-img", "convert", "-f", format_, "-O", "raw", path, flat)
        ours = lab.outside("kc-a", source.disks[target])
        digest = lab.run("kc-b", "sha256sum", flat).stdout.split()[0]
        here = lab.root / "flat.raw"
        subprocess.run(["qemu-img", "convert", "-f", ours.suffix[1:], "-O", "raw", ours, here], check=True)
        assert digest == hashlib.sha256(here.read_bytes()).hexdigest()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "record", "fault"),
    [pytest.param(*cell, marks=pytest.mark.fast if cell in FAST else ()) for cell in CELLS],
)
def test_the_same_command_ends_well_after(lab: Lab, kind: str, record: str, fault: str) -> None:
    if kind == "sync":
        first, again = sync_hit(lab, record, fault)
    else:
        first, again = clone_hit(lab, kind, record, fault)
    if os.environ.get("KVM_CLONE_WRITE_MATRIX") == "1":
        matrix.note(
            REPOSITORY / "docs/faults.md",
            Shape(KINDS, RECORDS, tuple(FAULTS)),
            (kind, record, fault),
            outcome(first, again),
        )


def clone_hit(lab: Lab, kind: str, record: str, fault: str) -> tuple[Done, Done]:
    """A clone that is hit, and the one after it."""
    source = lab.vm("kc-a", "fault", ["qcow2:16M:4M", "raw:16M:4M"], boot=False)
    old = lab.vm("kc-b", "fault", ["raw:4M:1M", "qcow2:4M:1M"], boot=False) if kind == "replacing clone" else None
    content = {path: lab.outside("kc-b", path).read_bytes() for path in old.disks.values()} if old else {}
    first = hit(lab, "clone", record, fault)
    assert_whole(lab, source, old, content)
    again = once_more(lab, "clone", first)
    assert_equal(lab, source)
    if old is not None:
        assert definition(lab, "kc-b", "fault").findtext("uuid") == old.uuid
    kept = {path.rpartition("/")[2] for path in content} & {name for name, _, _ in picture(lab, "kc-b").files}
    assert not kept, "the replaced VM's disks are still there"
    assert_nothing_left(lab)
    return first, again


def sync_hit(lab: Lab, record: str, fault: str) -> tuple[Done, Done]:
    """A sync that is hit, and the one after it."""
    source, replica = replicated(lab)
    first = hit(lab, "sync", record, fault)
    assert_old_or_new(lab, source, replica)
    again = once_more(lab, "sync", first)
    assert_equal(lab, source)
    assert definition(lab, "kc-b", "fault").findtext("uuid") == replica.uuid
    assert {path for path, _ in disks_of(lab, "kc-b", "fault").values()} == replica.files.keys()
    assert sorted(name for name, _, _ in picture(lab, "kc-b").files) == sorted(
        path.rpartition("/")[2] for path in replica.files
    )
    assert_nothing_left(lab)
    return first, again


ARGV = ("kc-a", "kc-b", "fault", "--idempotent", "--output", "json")


def hit(lab: Lab, command: str, record: str, fault: str) -> Done:
    """Run the command until the record is journalled, and let the fault come; what then becomes of the command."""
    slow = ("--bandwidth-limit", "2M") if record == "durable" else ()
    if fault == TORN:
        program = (sys.executable, str(HELD), f"torn {record}")
        with running(lab, *ARGV, *slow, "--retries", "0", command=command, program=program) as child:
            first = ended(child, 150)
        assert first.code != 0 or record in ("committed", "merged")  # the VM is complete by then, and that is said
        assert "Traceback" not in first.err
        return first
    with held(lab, record, *ARGV, *slow, *IMPATIENT, "--retries", "1", command=command) as child:
        assert record in [entry["record"] for entry in records(lab)]
        try:
            FAULTS[fault].hit(lab, child)
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
            first = ended(child, 150)
        finally:
            FAULTS[fault].heal(lab)
    assert "Traceback" not in first.err
    return first


def once_more(lab: Lab, command: str, first: Done) -> Done:
    """The same command again."""
    # --wait: an agent that a cut network keeps from hearing of its controller's end holds the lock for a while.
    again = kvm_clone(lab, command, *ARGV, "--wait")
    assert again.code == 0, first.err + again.err
    return again
