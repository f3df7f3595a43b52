"""sync.py as tables: what becomes of a replica, which disks go which way, by which steps."""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import (
    GIB,
    IDENTITY,
    IMAGES,
    ONE_DISK,
    OTHER_UUID,
    REPLICA_IMAGE,
    UUID,
    Case,
    disk_xml,
    mark_of,
    replica,
    running,
    staged,
    staged_disk,
)

from kvm_clone.errors import DomainExistsError, ExitCode, LockedError, RefusedError
from kvm_clone.findings import EXISTS_CODES, Severity
from kvm_clone.hosts.domains import STATES
from kvm_clone.image import Image
from kvm_clone.options import CloneOptions, Retry, Route, SyncOptions, Verify
from kvm_clone.planning import live_checks as running_source
from kvm_clone.planning import steps, sync
from kvm_clone.planning.assets import Place
from kvm_clone.planning.decide import SYNC, Action, Decision
from kvm_clone.planning.facts import Directory, Existing, ImageFacts, RouteFacts, Staged, StagedDisk
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.plan import Identity, Plan
from kvm_clone.planning.steps import Step
from kvm_clone.planning.sync import make_sync_plan

FACTS = Case().facts()
FLAGS = (Retry.NONE, Retry.IDEMPOTENT, Retry.FORCE, Retry.RESUME)
"""Those that sync has."""

UPDATE = Decision(Action.SYNC, replace=True, update=True)
GO_ON = Decision(Action.RESUME, replace=True, update=True)
START_OVER = replace(UPDATE, discard=True)
NOTHING, FINISH, STOP_REPLICA = (Decision(one) for one in (Action.NOTHING, Action.FINISH, Action.STOP_REPLICA))

OVERLAY = f"{IMAGES}/kvm-clone-{IDENTITY.operation}-vda.qcow2"
KEPT = staged_disk(final=f"{IMAGES}/kvm-clone-earlier-vda.qcow2", backing=REPLICA_IMAGE.path)
ATTEMPT = staged(kind=SYNC, disks={"vda": KEPT})
CLONING = staged(disks={"vda": staged_disk()})
CURRENT = replica(FACTS, fingerprint=FACTS.source.fingerprint)
CHANGED = replace(REPLICA_IMAGE, fingerprint="1:2:3:99:100")


def written(**changes: Any) -> Existing:
    """A replica whose disk was written since it was sealed."""
    return replace(replica(FACTS, **changes), images=(CHANGED,))


def redefined() -> Existing:
    found = replica(FACTS)
    return replace(found, domain=replace(found.domain, xml=found.domain.xml.replace("<vcpu>1", "<vcpu>2")))


def saved() -> Existing:
    return replica(FACTS, domain={"managed_save": True})


def made_by_the_attempt(**changes: Any) -> Existing:
    return replica(FACTS, operation="earlier", **changes)


# What the destination has: what each flag makes of it, the finding's code where nothing is done.
ROWS: dict[str, tuple[Existing | None, Staged | None, tuple[Decision | str, ...]]] = {
    "nothing": (None, None, ("replica-missing",) * 4),
    "an interrupted sync of a replica that is gone": (None, ATTEMPT, ("replica-missing",) * 4),
    "a replica of an older state": (replica(FACTS), None, (UPDATE, UPDATE, UPDATE, "nothing-to-resume")),
    "a replica that is up to date": (CURRENT, None, (NOTHING, NOTHING, UPDATE, "nothing-to-resume")),
    "a VM that is not ours": (replace(replica(FACTS), mark=None), None, ("not-a-replica",) * 4),
    "a clone of another VM": (replica(FACTS, source_uuid=OTHER_UUID), None, ("not-a-replica",) * 4),
    "a replica without a seal": (
        replica(FACTS, sealed=False),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "a replica whose disk was written": (
        written(),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "one up to date whose disk was written": (
        written(fingerprint=FACTS.source.fingerprint),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "a replica that was redefined": (
        redefined(),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "a replica with a managed save": (
        saved(),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "a replica that lacks a disk": (
        replace(replica(FACTS), whole=False),
        None,
        ("replica-changed", "replica-changed", UPDATE, "replica-changed"),
    ),
    "a replica that runs": (
        replica(FACTS, domain={"state": "running"}),
        None,
        ("replica-running", "replica-running", STOP_REPLICA, "replica-running"),
    ),
    "a replica that runs, and an interrupted sync": (
        replica(FACTS, domain={"state": "running"}),
        ATTEMPT,
        ("replica-running", "replica-running", STOP_REPLICA, "replica-running"),
    ),
    "an interrupted sync": (replica(FACTS), ATTEMPT, ("domain-exists", GO_ON, START_OVER, GO_ON)),
    "an interrupted sync of one that is up to date": (CURRENT, ATTEMPT, ("domain-exists", GO_ON, START_OVER, GO_ON)),
    "an interrupted sync, and the replica was used since": (
        written(),
        ATTEMPT,
        ("replica-changed", "replica-changed", START_OVER, "replica-changed"),
    ),
    "an interrupted sync from another VM": (
        replica(FACTS),
        replace(ATTEMPT, source_uuid=OTHER_UUID),
        ("other-attempt", "other-attempt", START_OVER, "other-attempt"),
    ),
    "an interrupted clone that was to replace it": (
        replica(FACTS),
        CLONING,
        ("other-attempt", "other-attempt", START_OVER, "other-attempt"),
    ),
    "a sync under way": (replica(FACTS), replace(ATTEMPT, holder="pid 7"), ("locked",) * 4),
    "a commit that libvirt has": (made_by_the_attempt(), replace(ATTEMPT, defining=True), (FINISH,) * 4),
    "one that libvirt has, and it runs": (
        made_by_the_attempt(domain={"state": "running"}),
        replace(ATTEMPT, defining=True),
        ("replica-running", "replica-running", STOP_REPLICA, "replica-running"),
    ),
    "a commit that libvirt lacks": (
        replica(FACTS),
        replace(ATTEMPT, defining=True),
        ("domain-exists", GO_ON, START_OVER, GO_ON),
    ),
}


def case(existing: Existing | None, attempt: Staged | None) -> Case:
    return Case(existing=existing, staged=attempt)


@pytest.mark.parametrize("retry", FLAGS)
@pytest.mark.parametrize("row", ROWS)
def test_the_table(row: str, retry: Retry) -> None:
    existing, attempt, expected = ROWS[row]
    wanted = expected[FLAGS.index(retry)]
    plan = case(existing, attempt).sync(retry=retry)
    if isinstance(wanted, Decision):
        assert plan.decision == wanted
        assert plan.refusal() is None
        return
    assert plan.decision.action is Action.REFUSE
    assert [one.code for one in plan.blocking] == [wanted]
    assert plan.steps == ()
    refusal = plan.refusal()
    kind = DomainExistsError if wanted in EXISTS_CODES else LockedError if wanted == "locked" else RefusedError
    assert isinstance(refusal, kind)
    assert refusal.exit_code in (ExitCode.EXISTS, ExitCode.LOCKED, ExitCode.REFUSED)
    assert refusal.remedy


def test_what_a_flag_can_overcome_has_the_exit_code_for_it() -> None:
    """At a terminal the user is asked what is to become of what stands in the way."""
    for existing, attempt, expected in ROWS.values():
        if expected[0] in EXISTS_CODES and expected[0] != "not-a-replica":
            assert any(isinstance(one, Decision) for one in expected[1:])
            refusal = case(existing, attempt).sync().refusal()
            assert refusal is not None
            assert refusal.exit_code is ExitCode.EXISTS


@pytest.mark.parametrize("state", sorted({*STATES.values()} - {"shut off"}))
@pytest.mark.parametrize("attempt", [None, ATTEMPT, CLONING])
def test_nothing_but_force_touches_a_replica_that_is_not_shut_off(state: str, attempt: Staged | None) -> None:
    for retry in FLAGS:
        plan = case(replica(FACTS, domain={"state": state}), attempt).sync(retry=retry)
        stopping = (steps.TakeLock(), steps.StopDomain(), steps.ReleaseLock())
        assert plan.steps == (stopping if retry is Retry.FORCE else ())


@pytest.mark.parametrize("retry", FLAGS)
def test_what_this_very_run_was_doing_is_continued(retry: Retry) -> None:
    """And a replica that was used meanwhile is no more overwritten than it would have been at first."""
    assert case(replica(FACTS), ATTEMPT).sync(retry=retry, own_operation="earlier").decision == GO_ON
    under_way = replace(ATTEMPT, holder="an agent that was cut off")
    assert case(replica(FACTS), under_way).sync(retry=retry, own_operation="earlier").decision == GO_ON
    used = case(written(), ATTEMPT).sync(retry=retry, own_operation="earlier").decision
    assert used == GO_ON if retry is Retry.FORCE else used.action is Action.REFUSE


@pytest.mark.parametrize("retry", FLAGS)
def test_another_ones_attempt_is_not_this_runs(retry: Retry) -> None:
    found = case(replica(FACTS), ATTEMPT)
    assert found.sync(retry=retry, own_operation="another").decision == found.sync(retry=retry).decision


@pytest.mark.parametrize(
    ("existing", "attempt", "retry", "words"),
    [
        (None, None, Retry.NONE, ["kvm-clone clone kc-a kc-b web", "--create"]),
        (replace(replica(FACTS), mark=None), None, Retry.NONE, ["--target-name", "clone --force"]),
        (replica(FACTS, domain={"state": "running"}), None, Retry.NONE, ["shut it down", "--force"]),
        (written(), None, Retry.NONE, ["--force"]),
        (replica(FACTS), ATTEMPT, Retry.NONE, ["--resume", "--idempotent", "--force"]),
        (replica(FACTS), CLONING, Retry.NONE, ["clone --resume", "--force"]),
        (replica(FACTS), replace(ATTEMPT, source_uuid="x"), Retry.RESUME, ["kvm-clone cleanup kc-b", "--force"]),
        (replica(FACTS), None, Retry.RESUME, ["leave out --resume"]),
    ],
)
def test_the_remedy_names_the_way_on(
    existing: Existing | None, attempt: Staged | None, retry: Retry, words: list[str]
) -> None:
    (finding,) = case(existing, attempt).sync(retry=retry).findings
    assert [word for word in words if word not in finding.remedy] == []


def test_the_seal_outlives_a_reboot_and_nothing_else() -> None:
    """A device's number may change; the ctime tells what an mtime that was set back hides."""
    found = replace(replica(FACTS), images=(replace(REPLICA_IMAGE, fingerprint="9:2:3:4:5"),))
    assert found.unused
    for part in range(1, 5):
        fields = ["1", "2", "3", "4", "5"]
        fields[part] = "77"
        assert not replace(found, images=(replace(REPLICA_IMAGE, fingerprint=":".join(fields)),)).unused
    assert not replace(found, images=(replace(REPLICA_IMAGE, error="gone", fingerprint=""),)).unused
    assert not replace(found, images=(), files={}).unused
    assert not replace(found, images=(REPLICA_IMAGE, replace(REPLICA_IMAGE, target="vdb"))).unused


# --create, and what is a clone anyway


@pytest.mark.parametrize(("verify", "proof"), [(Verify.SENT, Verify.FULL), (Verify.FULL, Verify.FULL),
                                               (Verify.OFF, Verify.OFF)])  # fmt: skip
def test_create_clones_where_there_is_no_replica(verify: Verify, proof: Verify) -> None:
    asked = SyncOptions(target_name="copy", create=True, pool="default", verify=verify, parallel=7, track=True)
    plan = Case(**running()).sync(asked)
    assert plan.refusal() is None
    assert (plan.name, plan.decision) == ("copy", Decision(Action.CLONE))
    assert isinstance(plan.options, CloneOptions)
    assert (plan.options.new_name, plan.options.parallel, plan.options.verify) == ("copy", 7, proof)
    assert plan.options.track
    assert plan.backup is not None
    assert plan.backup.checkpoint


def test_create_changes_nothing_for_a_replica_that_is_there() -> None:
    assert case(replica(FACTS), None).sync(create=True) == replace(
        case(replica(FACTS), None).sync(), options=SyncOptions(create=True)
    )


@pytest.mark.parametrize(
    ("create", "retry", "expected"),
    [
        (False, Retry.NONE, "domain-exists"),
        (False, Retry.RESUME, Decision(Action.RESUME)),
        (True, Retry.IDEMPOTENT, Decision(Action.RESUME)),
        (False, Retry.FORCE, Decision(Action.CLONE, discard=True)),
    ],
)
def test_an_interrupted_clone_of_a_replica_that_is_not_there_yet_is_a_clone(
    create: bool, retry: Retry, expected: Decision | str
) -> None:
    plan = Case(staged=CLONING).sync(create=create, retry=retry)
    assert isinstance(plan.options, CloneOptions)
    found = plan.decision.finding.code if plan.decision.finding else plan.decision
    assert found == expected


@pytest.mark.parametrize("retry", FLAGS)
def test_a_clone_leaves_an_interrupted_sync_to_sync(retry: Retry) -> None:
    plan = Case(existing=replica(FACTS), staged=ATTEMPT, options=CloneOptions(retry=retry)).plan()
    if retry is Retry.FORCE:
        assert plan.decision == Decision(Action.CLONE, discard=True, replace=True)
    else:
        assert [one.code for one in plan.blocking] == ["other-attempt"]
        assert "sync --resume" in plan.blocking[0].remedy


# disks


def of(plan: Plan) -> list[tuple[str, str, str | None]]:
    """Each disk's target, file, and the image that it is an overlay on."""
    assert plan.refusal() is None
    return [(disk.target, disk.final, disk.base.path if disk.base else None) for disk in plan.disks]


LOG = disk_xml(f"{IMAGES}/log.raw", "vdb", format_="raw")
REPLICA_LOG = replace(REPLICA_IMAGE, target="vdb", path="/elsewhere/log.raw", format="raw", fingerprint="1:9:9:9:9")


def test_each_image_gets_an_overlay_beside_it() -> None:
    two = Case(ONE_DISK + LOG)
    plan = replace(two, existing=replica(two.facts(), REPLICA_LOG, REPLICA_IMAGE)).sync()
    assert of(plan) == [
        ("vda", OVERLAY, REPLICA_IMAGE.path),
        ("vdb", f"/elsewhere/kvm-clone-{IDENTITY.operation}-vdb.qcow2", REPLICA_LOG.path),
    ]
    assert [disk.format for disk in plan.disks] == ["qcow2", "qcow2"]


def test_a_disk_that_the_source_has_got_is_copied_whole() -> None:
    two = Case(ONE_DISK + LOG)
    plan = replace(two, existing=replica(two.facts())).sync()
    assert of(plan) == [("vda", OVERLAY, REPLICA_IMAGE.path), ("vdb", f"{IMAGES}/log.raw", None)]
    first = Case(disk_xml(f"{IMAGES}/boot.qcow2", "sda") + ONE_DISK)
    plan = replace(first, existing=replica(first.facts())).sync()
    assert of(plan) == [("sda", f"{IMAGES}/boot.qcow2", None), ("vda", OVERLAY, REPLICA_IMAGE.path)]


def test_a_disk_that_the_source_has_lost_goes_after_the_commit() -> None:
    found = replica(FACTS, REPLICA_IMAGE, REPLICA_LOG)
    plan = case(found, None).sync()
    assert of(plan) == [("vda", OVERLAY, REPLICA_IMAGE.path)]
    assert steps.DefineDomain((REPLICA_LOG.path,), ()) in plan.steps
    assert steps.RemoveReplaced((REPLICA_LOG.path,), ()) in plan.steps
    shared = case(replace(found, removable=(REPLICA_IMAGE.path,)), None).sync()
    assert steps.RemoveReplaced((), ()) in shared.steps, "what another VM uses stays"


def test_a_disk_that_has_grown_is_brought_up_to_date() -> None:
    plan = Case(existing=replica(FACTS), image={"virtual_size": 2 * GIB}).sync()
    assert of(plan) == [("vda", OVERLAY, REPLICA_IMAGE.path)]
    assert plan.disks[0].image.virtual_size == 2 * GIB


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "unreadable": ({"error": "No such file or directory"}, "No such file or directory"),
    "in use": ({"error": "another process uses it", "in_use": True}, "another process uses it"),
    "a device": ({"regular": False}, "no image file"),
    "a foreign format": ({"format": "vmdk"}, "no image file"),
    "a chain": ({"below": Image("/b.qcow2", "qcow2")}, "backing file"),
    "a data file": ({"data_file": "/d.raw"}, "data file"),
    "encrypted": ({"encrypted": True}, "encryption"),
    "internal snapshots": ({"snapshots": ("one",)}, "internal snapshots"),
    "larger than the source's": ({"virtual_size": 2 * GIB}, "larger (2.0 GiB)"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_image_that_cannot_be_brought_up_to_date(what: str) -> None:
    changes, said = UNUSABLE[what]
    found = replica(FACTS, replace(REPLICA_IMAGE, **changes))
    plan = case(found, None).sync()
    assert [(one.code, one.subject) for one in plan.blocking] == [("replica-disk", "vda")]
    assert said in plan.blocking[0].text
    assert "--force" in plan.blocking[0].remedy
    assert plan.steps == ()


@pytest.mark.parametrize("what", UNUSABLE)
def test_force_copies_it_anew_and_removes_the_old_one(what: str) -> None:
    found = replica(FACTS, replace(REPLICA_IMAGE, **UNUSABLE[what][0]))
    plan = case(found, None).sync(retry=Retry.FORCE)
    assert of(plan) == [("vda", f"{IMAGES}/web.qcow2", None)]
    assert steps.RemoveReplaced((REPLICA_IMAGE.path,), ()) in plan.steps


@pytest.mark.parametrize(
    ("kept", "used"),
    [
        (KEPT, True),
        (replace(KEPT, durable=0), False),
        (replace(KEPT, backing="/another.qcow2"), False),
        (replace(KEPT, backing=""), False),
        (replace(KEPT, size=2 * GIB), False),
    ],
    ids=["as it was", "nothing durable", "on another image", "no overlay", "of another size"],
)
def test_what_an_attempt_has_of_an_overlay(kept: StagedDisk, used: bool) -> None:
    plan = case(replica(FACTS), replace(ATTEMPT, disks={"vda": kept})).sync(retry=Retry.RESUME)
    operation = "earlier"
    assert plan.identity.operation == operation
    final = kept.final if used else f"{IMAGES}/kvm-clone-{operation}-vda.qcow2"
    assert plan.disks == (
        PlannedDisk(FACTS.source.images[0], Place.of_file(final), kept if used else None, REPLICA_IMAGE, fine=True),
    )


def test_an_overlay_that_is_kept_cannot_become_a_whole_disk() -> None:
    """The replica's image has become unusable since."""
    found = replica(FACTS, replace(REPLICA_IMAGE, below=Image("/b.qcow2", "qcow2")))
    attempt = replace(ATTEMPT, operation=IDENTITY.operation)
    plan = case(found, attempt).sync(retry=Retry.FORCE, own_operation=IDENTITY.operation)
    assert [(disk.staged, disk.base) for disk in plan.disks] == [(None, None)]


# findings


def finding_codes(plan: Plan) -> list[str]:
    return [one.code for one in plan.findings]


COMPLAINTS: dict[str, tuple[str, Case, dict[str, Any]]] = {
    "a source in an odd state": ("source-state", Case(domain={"state": "crashed"}), {}),
    "a corrupt image": ("disk-corrupt", Case(image={"corrupt": True}), {}),
    "an old libvirt": ("libvirt-old", Case(**{**running(), "source": {**running()["source"], "libvirt": 1}}), {}),
    "no room": (
        "space",
        Case(image={"data": GIB}, directories=(Directory(IMAGES, True, True, free=2 * GIB),)),
        {},
    ),
    "no kernel": ("boot-file-missing", Case(os="<kernel>/boot/vmlinuz</kernel>"), {}),
    "no route": ("route", Case(route=RouteFacts(False, "No route to host")), {"route": Route.DIRECT}),
    "tracking a VM at rest": ("track", Case(), {"track": True}),
    "a damaged journal": ("journal-damaged", Case(staged_error="its record 2 is damaged"), {}),
}


@pytest.mark.parametrize("what", COMPLAINTS)
def test_what_speaks_against_a_sync(what: str) -> None:
    code, given, changes = COMPLAINTS[what]
    plan = replace(given, existing=replica(given.facts())).sync(**changes)
    assert finding_codes(plan) == [code]
    assert (plan.steps == ()) == (plan.findings[0].severity is Severity.BLOCKING)


def test_every_finding_is_reported_at_once() -> None:
    given = Case(image={"corrupt": True}, destination_host={"qemu_img": None}, existing=written())
    assert finding_codes(given.sync()) == ["replica-changed", "disk-corrupt", "tool-missing"]


def test_room_is_needed_for_what_the_replica_may_grow_by() -> None:
    tight = (Directory(IMAGES, True, True, free=2 * GIB),)
    given = Case(image={"data": GIB}, directories=tight)
    grown = replica(given.facts(), replace(REPLICA_IMAGE, data=GIB // 2))
    assert replace(given, existing=grown).sync().refusal() is None


def test_nothing_is_said_of_what_is_up_to_date_or_only_to_be_finished() -> None:
    broken: dict[str, Any] = {"destination_host": {"qemu_img": None}, "staged_error": ""}
    current = Case(existing=CURRENT, **broken).sync()
    assert (current.findings, current.steps) == ((), ())
    attempt = replace(ATTEMPT, defining=True)
    assert Case(existing=made_by_the_attempt(), staged=attempt, **broken).sync().findings == ()


def test_every_code_of_sync_is_in_the_tables() -> None:
    found: set[object] = set()
    for node in ast.walk(ast.parse(Path(str(sync.__file__)).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("block", "_refuse"):
            found |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
    listed = {one for _, _, row in ROWS.values() for one in row if isinstance(one, str)}
    assert found - listed == {"replica-disk"}
    assert len(found) > 5


# hints

CHAIN = running_source.chain_of(FACTS, "web")
CHECKPOINT = f"{CHAIN}before"
BEFORE = "xml=older;vda=9:2:8:7:6"
"""A source whose disk was in the same file, on a device that had another number, and has been written since."""

TRACKED: dict[str, Any] = {"checkpoint": CHECKPOINT, "fingerprint": BEFORE}


def tracked(checkpoints: tuple[str, ...] = (CHECKPOINT,), devices: str = ONE_DISK, **changes: Any) -> Case:
    how = running(devices)
    how["domain"] = {"state": "running", "checkpoints": checkpoints}
    return Case(**{**how, **changes})


OTHER_CHAIN = f"{running_source.chain_of(FACTS, 'another')}before"
HINTS: dict[str, tuple[Case, Existing, str, str]] = {
    "a good one": (tracked(), replica(FACTS, **TRACKED), CHECKPOINT, ""),
    "never tracked": (tracked(), replica(FACTS), "", "without --track"),
    "at rest": (Case(), replica(FACTS, **TRACKED), "", "shut off"),
    "the replica was used": (tracked(), written(**TRACKED), "", "used"),
    "of another replica": (
        tracked((OTHER_CHAIN,)),
        replica(FACTS, checkpoint=OTHER_CHAIN, fingerprint=BEFORE),
        "",
        "another chain",
    ),
    "gone": (tracked(()), replica(FACTS, **TRACKED), "", "lacks the checkpoint"),
    "never proven": (tracked(), replica(FACTS, **TRACKED, verified=False), "", "not proven"),
    "another file": (
        tracked(),
        replica(FACTS, **{**TRACKED, "fingerprint": "xml=older;vda=1:3:8:7:6"}),
        "",
        "vda is another file",
    ),
    "a disk that had another name": (
        tracked(),
        replica(FACTS, **{**TRACKED, "fingerprint": "xml=older;vdb=1:2:8:7:6"}),
        "",
        "vda is another file",
    ),
    "a mark that says nothing of files": (tracked(), replica(FACTS, **{**TRACKED, "fingerprint": "older"}), "", "vda"),
    "a disk that the replica lacks": (
        tracked(devices=ONE_DISK + LOG),
        replica(FACTS, **TRACKED),
        CHECKPOINT,
        "",
    ),
}


@pytest.mark.parametrize("what", HINTS)
def test_from_which_checkpoint_on_changes_are_known(what: str) -> None:
    given, existing, since, reason = HINTS[what]
    plan = replace(given, existing=existing).sync(retry=Retry.FORCE)
    assert plan.refusal() is None
    assert (plan.backup.incremental if plan.backup else "") == since
    assert bool(plan.no_bitmap_reason) == (not since)
    assert reason in plan.no_bitmap_reason


def test_the_checkpoint_that_was_used_goes_after_the_commit_and_stale_ones_before_the_job() -> None:
    stale = f"{CHAIN}interrupted"
    foreign = "kvm-clone.0000.another"
    given = tracked((stale, CHECKPOINT, foreign))
    plan = replace(given, existing=replica(FACTS, **TRACKED)).sync(track=True)
    assert plan.backup is not None
    (begin,) = (step for step in plan.steps if isinstance(step, steps.BeginBackup))
    assert begin.stale == (stale,)
    assert begin.job.incremental == CHECKPOINT
    assert begin.job.checkpoint == f"{CHAIN}{IDENTITY.operation}"
    assert plan.steps[-1] == steps.DropCheckpoints((CHECKPOINT,))


def test_a_sync_that_does_not_track_leaves_no_checkpoint() -> None:
    plan = replace(tracked(), existing=replica(FACTS, **TRACKED)).sync()
    assert plan.backup is not None
    assert (plan.backup.incremental, plan.backup.checkpoint) == (CHECKPOINT, "")
    assert plan.steps[-1] == steps.DropCheckpoints((CHECKPOINT,))


# steps

FILLING: list[type[Step]] = [steps.CreateDisk, steps.CopyDisks, steps.ProveDisks, steps.CheckSource, steps.PublishDisk]
LIVE: list[type[Step]] = [
    steps.CreateDisk,
    steps.BeginBackup,
    steps.CopyDisks,
    steps.ProveDisks,
    steps.EndBackup,
    steps.PublishDisk,
]
COMMIT: list[type[Step]] = [
    steps.DefineDomain,
    steps.MergeDisks,
    steps.RemoveReplaced,
    steps.SealReplica,
    steps.EndStage,
]
WITHOUT_OVERLAYS = [step for step in COMMIT if step is not steps.MergeDisks]
ELSEWHERE = replace(ATTEMPT, directory="/elsewhere", defining=True)

STEPS: dict[str, tuple[Callable[[], Plan], list[type[Step]]]] = {
    "a sync": (lambda: case(replica(FACTS), None).sync(), [steps.BeginStage, *FILLING, *COMMIT]),
    "of a source that runs": (
        lambda: Case(**running(), existing=replica(FACTS)).sync(),
        [steps.BeginStage, *LIVE, *COMMIT],
    ),
    "without proof": (
        lambda: case(replica(FACTS), None).sync(verify=Verify.OFF),
        [steps.BeginStage, *(one for one in FILLING if one is not steps.ProveDisks), *COMMIT],
    ),
    "gone on with": (
        lambda: case(replica(FACTS), ATTEMPT).sync(retry=Retry.RESUME),
        [steps.BeginStage, *FILLING, *COMMIT],
    ),
    "gone on with after a commit that did not come": (
        lambda: case(replica(FACTS), ELSEWHERE).sync(retry=Retry.RESUME),
        [steps.SettleStage, steps.BeginStage, *FILLING, *COMMIT],
    ),
    "started over": (
        lambda: case(replica(FACTS), ELSEWHERE).sync(retry=Retry.FORCE),
        [steps.SettleStage, steps.DiscardStage, steps.BeginStage, *FILLING, *COMMIT],
    ),
    "finished": (
        lambda: case(made_by_the_attempt(), replace(ATTEMPT, defining=True)).sync(),
        [
            steps.SettleStage,
            steps.TakeUpCommitted,
            steps.MergeDisks,
            steps.RemoveReplaced,
            steps.SealReplica,
            steps.EndStage,
        ],
    ),
    "a replica to stop": (
        lambda: case(replica(FACTS, domain={"state": "running"}), None).sync(retry=Retry.FORCE),
        [steps.TakeLock, steps.StopDomain, steps.ReleaseLock],
    ),
    "nothing to do": (lambda: case(CURRENT, None).sync(), []),
}


@pytest.mark.parametrize("what", STEPS)
def test_steps(what: str) -> None:
    make, expected = STEPS[what]
    plan = make()
    assert plan.refusal() is None
    assert [type(step) for step in plan.steps] == expected


def test_nothing_of_the_replica_is_removed_before_the_commit() -> None:
    for make, _ in STEPS.values():
        kinds = [type(step) for step in make().steps]
        assert steps.RemoveExisting not in kinds
        assert (
            steps.RemoveReplaced not in kinds
            or steps.DefineDomain not in kinds
            or (kinds.index(steps.DefineDomain) < kinds.index(steps.MergeDisks) < kinds.index(steps.RemoveReplaced))
        )


def test_the_images_below_the_overlays_are_never_removed() -> None:
    """They are the replica's own files, and become its disks again."""
    for make, _ in STEPS.values():
        for step in make().steps:
            if isinstance(step, steps.DefineDomain):
                assert REPLICA_IMAGE.path not in step.remove
            if isinstance(step, steps.RemoveReplaced):
                assert REPLICA_IMAGE.path not in step.paths


# filesystems whose files can share blocks

SHARING = (Directory(IMAGES, exists=True, writable=True, free=1 << 40, reflink=True),)
SUCCESSOR = f"{IMAGES}/replica.{IDENTITY.operation}.qcow2"


@pytest.mark.parametrize(
    ("qemu_img", "options"),
    [
        ("4.2.0", {}),
        ("5.1.0", {}),
        ("5.2.0", {"extended_l2": "on"}),
        ("10.0.3", {"extended_l2": "on"}),
        ("unknown", {}),
        (None, {}),
    ],
)
def test_an_overlay_has_subclusters_where_qemu_has_them(qemu_img: str | None, options: dict[str, str]) -> None:
    case = Case(
        existing=replica(FACTS), destination_host={"qemu_img": qemu_img}, image={"options": (("compat", "1.1"),)}
    )
    [disk] = case.sync().disks
    assert disk.options == options
    [disk] = replace(case, directories=SHARING).sync().disks
    assert disk.options == {}, "a copy that shares its blocks is what it is a copy of"
    [disk] = replace(case, existing=None).plan().disks
    assert disk.options == {"compat": "1.1"}


@pytest.mark.parametrize("stem", ["x" * 249, "ö" * 124])
def test_the_name_of_a_copy_that_shares_is_cut(stem: str) -> None:
    image = replace(REPLICA_IMAGE, path=f"{IMAGES}/{stem}.qcow2")
    (disk,) = Case(existing=replica(FACTS, image), directories=SHARING).sync().disks
    name = posixpath.basename(disk.final)
    assert len(name.encode()) <= 255
    assert name.endswith(f".{IDENTITY.operation}.qcow2")


def test_a_copy_that_shares_its_blocks_takes_the_images_place() -> None:
    plan = Case(existing=replica(FACTS), directories=SHARING).sync()
    [disk] = plan.disks
    assert of(plan) == [("vda", SUCCESSOR, REPLICA_IMAGE.path)]
    assert disk.shares
    assert (disk.format, disk.below) == ("qcow2", None)
    kinds = [type(step) for step in plan.steps]
    assert kinds == [steps.BeginStage, *FILLING, *WITHOUT_OVERLAYS]
    assert steps.RemoveReplaced((REPLICA_IMAGE.path,), ()) in plan.steps
    assert steps.DefineDomain((REPLICA_IMAGE.path,), ()) in plan.steps


def test_the_copys_name_does_not_grow_with_each_sync() -> None:
    image = replace(REPLICA_IMAGE, path=f"{IMAGES}/replica.0123456789ab.qcow2")
    plan = Case(existing=replica(FACTS, image), directories=SHARING).sync()
    assert of(plan) == [("vda", SUCCESSOR, image.path)]


def test_some_disks_share_and_others_get_an_overlay() -> None:
    two = Case(
        ONE_DISK + LOG, directories=(*SHARING, Directory("/elsewhere", exists=True, writable=True, free=1 << 40))
    )
    plan = replace(two, existing=replica(two.facts(), REPLICA_IMAGE, REPLICA_LOG)).sync()
    assert [(disk.target, disk.shares, disk.format) for disk in plan.disks] == [
        ("vda", True, "qcow2"),
        ("vdb", False, "qcow2"),
    ]
    assert steps.MergeDisks in [type(step) for step in plan.steps]
    assert steps.RemoveReplaced((REPLICA_IMAGE.path,), ()) in plan.steps, "and not what the overlay rests on"


SHARED_PART = staged_disk(final=f"{IMAGES}/replica.earlier.qcow2")


@pytest.mark.parametrize(
    ("kept", "used"),
    [
        (SHARED_PART, True),
        (replace(SHARED_PART, backing=REPLICA_IMAGE.path), False),
        (replace(SHARED_PART, format="raw"), False),
        (replace(SHARED_PART, size=GIB // 2), False),
        (replace(SHARED_PART, durable=0), False),
    ],
)
def test_what_an_attempt_has_of_a_copy_that_shares(kept: StagedDisk, used: bool) -> None:
    attempt = staged(kind=SYNC, disks={"vda": kept})
    plan = Case(existing=replica(FACTS), staged=attempt, directories=SHARING).sync(retry=Retry.RESUME)
    assert of(plan) == [("vda", kept.final if used else plan.disks[0].final, REPLICA_IMAGE.path)]
    assert (plan.disks[0].staged == kept) == used


def test_where_the_journal_lies() -> None:
    plan = case(replica(FACTS), None).sync()
    assert plan.steps[0] == steps.BeginStage(IMAGES, resume=False, marks=(IMAGES,))
    assert plan.steps[-1] == steps.EndStage((IMAGES,))
    plan = case(replica(FACTS), replace(ATTEMPT, directory="/elsewhere")).sync(retry=Retry.RESUME)
    assert plan.steps[0] == steps.BeginStage("/elsewhere", resume=True, marks=(IMAGES,))


def test_a_replica_without_disks() -> None:
    bare = Case("")
    given = replace(bare, existing=replace(replica(bare.facts()), images=()))
    plan = given.sync(retry=Retry.FORCE)
    assert plan.refusal() is None
    assert [type(step) for step in plan.steps] == [steps.BeginStage, steps.CheckSource, *WITHOUT_OVERLAYS]


# identity


def test_the_replica_keeps_its_uuid_and_the_addresses_that_it_has() -> None:
    interfaces = "".join(f"<interface type='network'><mac address='{mac}'/></interface>" for mac in ("aa", "bb", "cc"))
    given = Case(ONE_DISK + interfaces, abilities={"networks": {}})
    found = replica(given.facts(), macs="aa=11 cc=33 gone=44")
    facts = replace(given, existing=found).facts()
    plan = make_sync_plan(facts, SyncOptions(), Identity("op", "uuid", ("x", "y", "z")))
    assert plan.uuid == OTHER_UUID
    assert plan.macs == ("11", "y", "33"), "a new interface gets the new address at its place"


def test_kept_addresses_stay_kept() -> None:
    given = Case(ONE_DISK + "<interface type='network'><mac address='aa'/></interface>")
    found = replica(given.facts(), macs="aa=aa")
    facts = replace(given, existing=found).facts()
    assert make_sync_plan(facts, SyncOptions(), Identity("op", "uuid", ("new",))).macs == ("aa",)


@pytest.mark.parametrize(("target", "name"), [(None, "web"), ("copy", "copy")])
def test_name(target: str | None, name: str) -> None:
    assert case(replica(FACTS), None).sync(target_name=target).name == name


def test_the_same_facts_make_the_same_plan() -> None:
    assert case(replica(FACTS), ATTEMPT).sync(retry=Retry.RESUME) == case(replica(FACTS), ATTEMPT).sync(
        retry=Retry.RESUME
    )


def test_the_mark_of_the_cases_is_the_sources() -> None:
    assert mark_of(FACTS).source_uuid == UUID == FACTS.source.xml.uuid
    assert isinstance(REPLICA_IMAGE, ImageFacts)
