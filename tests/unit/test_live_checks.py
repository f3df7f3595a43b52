"""running.py and live.py's documents: what speaks against copying a running source, and the job that copies it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import GIB, IDENTITY, IMAGES, ONE_DISK, SOURCE_HOST, UUID, Case, disk_xml, running

from kvm_clone.agent.staging.scratch import SOCKETS
from kvm_clone.definition.spans import Document, Node
from kvm_clone.findings import LOCKED, Severity
from kvm_clone.hosts import live
from kvm_clone.options import CloneOptions, Quiesce
from kvm_clone.planning import domain_facts
from kvm_clone.planning import live_checks as running_source
from kvm_clone.planning.domain_facts import BackupDisk, BackupJob
from kvm_clone.planning.facts import Directory, Facts
from kvm_clone.planning.live_checks import backup_job, chain_of, live_findings, stale_checkpoints

TWO = ONE_DISK + disk_xml(f"{IMAGES}/log.raw", "vdb", format_="raw")


def room(path: str = IMAGES, free: int = 1 << 40, filesystem: int = 0, **changes: Any) -> Directory:
    return replace(Directory(path, True, True, free, filesystem=filesystem), **changes)


def facts(
    devices: str = ONE_DISK,
    *directories: Directory,
    domain: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    **seen: Any,
) -> Facts:
    """A VM that runs; `seen` changes what is known of it by that, `source` of where it is."""
    how = running(devices, **seen)
    found = {one.path: one for one in directories} or how["source"]["directories"]
    where = {**how["source"], "directories": found, **(source or {})}
    return Case(devices, domain={**how["domain"], **(domain or {})}, source=where, image=image or {}).facts()


Seen = tuple[str, str, Severity]
B, W, I = Severity.BLOCKING, Severity.WARNING, Severity.INFO  # noqa: E741
OURS = f"{SOCKETS}/{domain_facts.OURS}0f.sock"
NONE, TRACK, REQUIRE, OFF = (
    CloneOptions(),
    CloneOptions(track=True),
    CloneOptions(quiesce=Quiesce.REQUIRE),
    CloneOptions(quiesce=Quiesce.OFF),
)
AS_SEEN = {"vda": f"{IMAGES}/web.qcow2"}

FINDINGS: dict[str, tuple[Facts, CloneOptions, list[Seen]]] = {
    "nothing": (facts(), NONE, []),
    "a VM at rest": (Case().facts(), NONE, []),
    "a VM at rest that is to be tracked": (Case().facts(), TRACK, [("track", "web", W)]),
    "a VM at rest, and a guest that was to be frozen": (Case().facts(), REQUIRE, []),
    "a running one that is to be tracked": (facts(), TRACK, []),
    "libvirt 7.2": (facts(source={"libvirt": 7_002_000}), NONE, []),
    "libvirt 7.1": (facts(source={"libvirt": 7_001_999}), NONE, [("libvirt-old", "kc-a", B)]),
    "no guest agent": (facts(agent=False), NONE, [("crash-consistent", "web", I)]),
    "no guest agent, and none wanted": (facts(agent=False), OFF, []),
    "no guest agent, and one needed": (facts(agent=False), REQUIRE, [("guest-agent", "web", B)]),
    "a guest agent that is needed": (facts(), REQUIRE, []),
    "another operation of ours": (facts(source={"reader": "operation 0f, pid 7"}), NONE, [(LOCKED, "web", B)]),
    "another operation of ours with its job": (
        facts(source={"reader": "operation 0f, pid 7"}, backup=OURS, jobs=("vda",)),
        NONE,
        [(LOCKED, "web", B)],
    ),
    "another tool's backup": (facts(backup="/run/other.sock"), NONE, [("backup-job", "web", B)]),
    "another tool's backup over TCP": (facts(backup="localhost"), NONE, [("backup-job", "web", B)]),
    "one that begins like ours elsewhere": (
        facts(backup=f"/tmp/{domain_facts.OURS}0f.sock"),
        NONE,
        [("backup-job", "web", B)],
    ),
    "our own interrupted backup": (facts(backup=OURS, jobs=("vda",)), NONE, []),
    "block jobs": (facts(TWO, jobs=("vda", "vdb")), NONE, [("block-job", "vda", B), ("block-job", "vdb", B)]),
    "a disk that was hot-plugged": (
        facts(paths={**AS_SEEN, "vdc": "/hot.qcow2"}),
        NONE,
        [("live-disk", "vdc", W)],
    ),
    "a disk that was pivoted": (facts(paths={"vda": "/snapshot.qcow2"}), NONE, [("disk-live", "vda", B)]),
    "a disk that was unplugged": (facts(TWO, paths=AS_SEEN), NONE, [("disk-not-live", "vdb", B)]),
    "another tool's checkpoint, nothing of ours": (facts(domain={"checkpoints": ("monday",)}), NONE, []),
    "another tool's checkpoint": (
        facts(domain={"checkpoints": ("monday", "kvm-clone.x.y")}),
        TRACK,
        [("foreign-checkpoint", "web", B)],
    ),
    "a checkpoint of ours": (facts(domain={"checkpoints": ("kvm-clone.x.y",)}), TRACK, []),
    "no room for scratch": (facts(ONE_DISK, room(free=(64 << 20) - 1)), NONE, [("scratch", "vda", B)]),
    "just enough for an empty disk": (facts(ONE_DISK, room(free=64 << 20)), NONE, []),
    "less than the disk": (
        facts(ONE_DISK, room(free=GIB // 2), image={"data": GIB}),
        NONE,
        [("scratch-small", "vda", W)],
    ),
    "less than a tenth of the disk": (
        facts(ONE_DISK, room(free=GIB), image={"data": 11 * GIB}),
        NONE,
        [("scratch", "vda", B)],
    ),
    "room for one of two": (
        facts(TWO, room(free=100 << 20)),
        NONE,
        [("scratch", "vdb", B)],
    ),
    "no directory that can be written": (facts(ONE_DISK, room(writable=False)), NONE, [("scratch", "vda", B)]),
}


@pytest.mark.parametrize("what", FINDINGS)
def test_findings(what: str) -> None:
    given, asked, expected = FINDINGS[what]
    found = list(live_findings(given.source, asked))
    assert [(one.code, one.subject, one.severity) for one in found] == expected
    assert [one for one in found if one.severity is B and not one.remedy] == []
    assert [one for one in found if not one.text.endswith(".")] == []


def test_every_code_is_in_the_table() -> None:
    written: set[object] = set()
    for node in ast.walk(ast.parse(Path(str(running_source.__file__)).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("block", "Finding"):
            first = node.args[0]
            written.add(first.value if isinstance(first, ast.Constant) else LOCKED)
    assert written == {code for _, _, expected in FINDINGS.values() for code, _, _ in expected}


@pytest.mark.parametrize(("own", "locked"), [(None, True), ("", True), ("0f", False), ("another", True)])
def test_this_very_runs_agent_may_not_have_ended_yet(own: str | None, locked: bool) -> None:
    given = facts(source={"reader": "operation 0f, pid 7"}, backup=OURS)
    assert [one.code for one in live_findings(given.source, NONE, own)] == ([LOCKED] if locked else [])


def job_of(given: Facts, asked: CloneOptions = NONE, since: str = "") -> BackupJob:
    job = backup_job(given, asked, "web", IDENTITY.operation, since)
    assert job is not None
    return job


def scratches(given: Facts) -> list[str]:
    return [disk.scratch for disk in job_of(given).disks]


NAME = f".kvm-clone-{UUID}-%s.scratch"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (facts(TWO), [(IMAGES, "vda"), (IMAGES, "vdb")]),
        (facts(ONE_DISK, room(free=GIB), room("/big", filesystem=1)), [(IMAGES, "vda")]),
        (
            facts(ONE_DISK, room(free=GIB - 1), room("/big", filesystem=1), image={"data": GIB}),
            [("/big", "vda")],
        ),
        (facts(ONE_DISK, room(writable=False), room("/big", filesystem=1)), [("/big", "vda")]),
        (facts(ONE_DISK, room(exists=False), room("/big", filesystem=1)), [("/big", "vda")]),
        # the first disk's share is gone when the second one's place is chosen
        (
            facts(TWO, room(free=2 * GIB), room("/b", 2 * GIB - 1, 1), image={"data": 2 * GIB}),
            [(IMAGES, "vda"), ("/b", "vdb")],
        ),
        # two directories of one filesystem have one room
        (
            facts(
                TWO,
                room(free=100 << 20),
                room("/same", 100 << 20),
                room("/b", 99 << 20, 1),
                image={"data": 64 << 20},
            ),
            [(IMAGES, "vda"), ("/b", "vdb")],
        ),
    ],
)
def test_where_scratch_goes(given: Facts, expected: list[tuple[str, str]]) -> None:
    assert scratches(given) == [f"{directory}/{NAME % target}" for directory, target in expected]


def test_a_vm_at_rest_needs_no_job() -> None:
    assert backup_job(Case().facts(), NONE, "web", "0f", "") is None


@pytest.mark.parametrize(
    ("format_", "options", "trackable"),
    [
        ("raw", (), False),
        ("qcow2", (), True),
        ("qcow2", (("cluster_size", "65536"), ("compat", "1.1")), True),
        ("qcow2", (("cluster_size", "65536"), ("compat", "0.10")), False),
    ],
)
def test_what_can_be_tracked(format_: str, options: tuple[tuple[str, str], ...], trackable: bool) -> None:
    devices = disk_xml(f"{IMAGES}/web.img", format_=format_)
    job = job_of(facts(devices, image={"options": options}), TRACK)
    assert [disk.trackable for disk in job.disks] == [trackable]
    assert bool(job.checkpoint) == trackable, "a checkpoint without a bitmap says nothing"


def test_the_job() -> None:
    given = facts(TWO, domain={"checkpoints": ("kvm-clone.x.before",)})
    job = job_of(given, TRACK, "kvm-clone.x.before")
    assert job.socket == f"/var/lib/libvirt/qemu/kvm-clone-{UUID}.sock"
    assert [(disk.target, disk.trackable) for disk in job.disks] == [("vda", True), ("vdb", False)]
    assert job.incremental == "kvm-clone.x.before"
    assert job.checkpoint == f"{chain_of(given, 'web')}{IDENTITY.operation}"
    assert domain_facts.Live(backup=job.socket).backup_is_ours
    assert job_of(given, NONE, "kvm-clone.x.gone").incremental == ""
    assert job_of(given, NONE).checkpoint == ""


def test_the_names_of_checkpoints() -> None:
    """A chain for each replica: on another host, or of another name, another state is known."""
    given = facts()
    there = given.destination
    other = replace(given, destination=replace(there, host=replace(there.host, identity=SOURCE_HOST)))
    chains = [chain_of(given, "web"), chain_of(given, "copy"), chain_of(other, "web")]
    assert len(set(chains)) == 3
    assert chain_of(given, "web") == chain_of(facts(TWO), "web")
    for chain in chains:
        assert chain.startswith(domain_facts.CHECKPOINTS)
        assert chain.endswith(".")
        assert set(chain) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")


def test_stale_checkpoints() -> None:
    chain = chain_of(facts(), "web")
    another = chain_of(facts(), "copy")
    given = facts(domain={"checkpoints": (f"{chain}1", "monday", f"{another}1", f"{chain}2", f"{chain}3")})
    assert stale_checkpoints(given, "web", f"{chain}2") == (f"{chain}1", f"{chain}3")
    assert stale_checkpoints(given, "web", "") == (f"{chain}1", f"{chain}2", f"{chain}3")
    assert stale_checkpoints(given, "third", "") == ()


# live.py's documents

AWKWARD = '/pool\'s "own"/<a> & b.scratch'
JOB = BackupJob(
    "/run/a & b.sock", (BackupDisk("vda", AWKWARD, trackable=True), BackupDisk("vdb", "/b.scratch", trackable=False))
)


def disks_of(xml: str) -> list[Node]:
    return list(Document(xml).root.find_all("disks", "disk"))


def test_a_backup_job_as_libvirt_takes_it() -> None:
    root = Document(live.backup_xml(JOB)).root
    assert (root.tag, root.attributes) == ("domainbackup", {"mode": "pull"})
    assert root.find_attributes("server") == {"transport": "unix", "socket": "/run/a & b.sock"}
    vda, vdb = disks_of(live.backup_xml(JOB))
    assert vda.attributes == {"name": "vda", "backup": "yes", "type": "file", "exportname": "vda"}
    assert vda.find_attributes("scratch") == {"file": AWKWARD}
    assert vdb.find_attributes("scratch") == {"file": "/b.scratch"}


def test_changes_are_asked_for_of_disks_that_have_a_bitmap() -> None:
    vda, vdb = disks_of(live.backup_xml(replace(JOB, incremental="kvm-clone.x.1")))
    assert (vda.attributes["backupmode"], vda.attributes["incremental"]) == ("incremental", "kvm-clone.x.1")
    assert not {"backupmode", "incremental"} & vdb.attributes.keys()


def test_a_checkpoint_as_libvirt_takes_it() -> None:
    xml = live.checkpoint_xml(replace(JOB, checkpoint="kvm-clone.x.2"))
    assert Document(xml).root.tag == "domaincheckpoint"
    assert Document(xml).root.find_text("name") == "kvm-clone.x.2"
    assert [disk.attributes for disk in disks_of(xml)] == [
        {"name": "vda", "checkpoint": "bitmap"},
        {"name": "vdb", "checkpoint": "no"},
    ]
