"""decide.py and the saved plan: the table of the retry flags as a table of cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import GIB, IDENTITY, OTHER_UUID, UUID, Case, existing, images, mark_of, options, staged, staged_disk

from kvm_clone.cli import plans
from kvm_clone.client import Request
from kvm_clone.errors import DomainExistsError, ExitCode, LockedError, RefusedError, UsageError
from kvm_clone.hosts.domains import STATES
from kvm_clone.options import CloneOptions, Options, Quiesce, Retry, Route, SyncOptions, Verify
from kvm_clone.planning.decide import SYNC, Action, Decision, decide
from kvm_clone.planning.domain_facts import Pool
from kvm_clone.planning.facts import Facts, RouteFacts
from kvm_clone.planning.plan import Plan, make_plan
from kvm_clone.planning.sync import make_sync_plan

CURRENT = mark_of(Case().facts())
STALE = replace(CURRENT, fingerprint="another")
OTHERS = replace(CURRENT, source_uuid=OTHER_UUID)
ATTEMPT = staged(disks={"vda": staged_disk()})
UNSETTLED = replace(ATTEMPT, defining=True)

CLONE, RESUME, NOTHING, FINISH = (Decision(a) for a in (Action.CLONE, Action.RESUME, Action.NOTHING, Action.FINISH))
REPLACE, STOP_AND_REPLACE = Decision(Action.CLONE, replace=True), Decision(Action.CLONE, replace=True, stop=True)
REMOVE, STOP_AND_REMOVE = (
    Decision(Action.CLONE, remove_first=True),
    Decision(Action.CLONE, remove_first=True, stop=True),
)
START_OVER = Decision(Action.CLONE, discard=True)
GO_ON_AND_REPLACE = Decision(Action.RESUME, replace=True)


def also(decision: Decision) -> Decision:
    return replace(decision, discard=True)


FLAGS = (Retry.NONE, Retry.IDEMPOTENT, Retry.FORCE, Retry.CLEANUP_EXISTING, Retry.RESUME)
EXISTS, IN_USE, UNDER_WAY = "domain-exists", "existing-running", "locked"

# What the destination has: what each flag makes of it, the finding's code where nothing is done.
ROWS: dict[str, tuple[Case, tuple[Decision | str, ...]]] = {
    "nothing": (Case(), (CLONE, CLONE, CLONE, CLONE, "nothing-to-resume")),
    "our interrupted attempt": (Case(staged=ATTEMPT), (EXISTS, RESUME, START_OVER, START_OVER, RESUME)),
    "another VM's interrupted attempt": (
        Case(staged=replace(ATTEMPT, source_uuid=OTHER_UUID)),
        (EXISTS, "other-attempt", START_OVER, START_OVER, "other-attempt"),
    ),
    "our finished clone, source unchanged": (
        Case(existing=existing(mark=CURRENT)),
        (EXISTS, NOTHING, REPLACE, REMOVE, EXISTS),
    ),
    "the same, and it runs": (
        Case(existing=existing(mark=CURRENT, state="running")),
        (EXISTS, NOTHING, STOP_AND_REPLACE, STOP_AND_REMOVE, EXISTS),
    ),
    "our finished clone that lacks a disk": (
        Case(existing=existing(mark=CURRENT, whole=False)),
        (EXISTS, REPLACE, REPLACE, REMOVE, EXISTS),
    ),
    "our finished clone, source changed": (
        Case(existing=existing(mark=STALE)),
        (EXISTS, REPLACE, REPLACE, REMOVE, EXISTS),
    ),
    "our finished clone, source changed, and it runs": (
        Case(existing=existing(mark=STALE, state="running")),
        (EXISTS, IN_USE, STOP_AND_REPLACE, STOP_AND_REMOVE, EXISTS),
    ),
    "our clone of another VM": (
        Case(existing=existing(mark=OTHERS)),
        (EXISTS, REPLACE, REPLACE, REMOVE, EXISTS),
    ),
    "a VM that is not ours": (Case(existing=existing()), (EXISTS, REPLACE, REPLACE, REMOVE, EXISTS)),
    "a VM that is not ours, and it runs": (
        Case(existing=existing(state="running")),
        (EXISTS, IN_USE, STOP_AND_REPLACE, STOP_AND_REMOVE, EXISTS),
    ),
    "an interrupted replace": (
        Case(existing=existing(), staged=ATTEMPT),
        (EXISTS, GO_ON_AND_REPLACE, also(REPLACE), also(REMOVE), GO_ON_AND_REPLACE),
    ),
    "an interrupted replace of a VM that runs": (
        Case(existing=existing(state="running"), staged=ATTEMPT),
        (EXISTS, IN_USE, also(STOP_AND_REPLACE), also(STOP_AND_REMOVE), IN_USE),
    ),
    "another VM's interrupted replace": (
        Case(existing=existing(), staged=replace(ATTEMPT, source_uuid=OTHER_UUID)),
        (EXISTS, "other-attempt", also(REPLACE), also(REMOVE), "other-attempt"),
    ),
    "an attempt to replace our clone that is up to date": (
        Case(existing=existing(mark=replace(CURRENT, operation="before")), staged=ATTEMPT),
        (EXISTS, GO_ON_AND_REPLACE, also(REPLACE), also(REMOVE), GO_ON_AND_REPLACE),
    ),
    "an interrupted sync of it": (
        Case(existing=existing(mark=STALE), staged=replace(ATTEMPT, kind=SYNC)),
        ("other-attempt", "other-attempt", also(REPLACE), also(REMOVE), "other-attempt"),
    ),
    "an interrupted sync of a VM that is gone": (
        Case(staged=replace(ATTEMPT, kind=SYNC)),
        ("other-attempt", "other-attempt", START_OVER, START_OVER, "other-attempt"),
    ),
    "a sync's commit that libvirt has": (
        Case(existing=existing(mark=CURRENT), staged=replace(UNSETTLED, kind=SYNC)),
        (FINISH, FINISH, FINISH, FINISH, FINISH),
    ),
    "an attempt under way": (Case(staged=replace(ATTEMPT, holder="pid 7")), (UNDER_WAY,) * 5),
    "a commit under way": (
        Case(existing=existing(mark=CURRENT), staged=replace(UNSETTLED, holder="pid 7")),
        (UNDER_WAY,) * 5,
    ),
    "a commit that libvirt has": (
        Case(existing=existing(mark=CURRENT), staged=UNSETTLED),
        (FINISH, FINISH, FINISH, FINISH, FINISH),
    ),
    "a commit that libvirt lacks": (Case(staged=UNSETTLED), (EXISTS, RESUME, START_OVER, START_OVER, RESUME)),
    "a replace that libvirt lacks": (
        Case(existing=existing(mark=replace(STALE, operation="before")), staged=UNSETTLED),
        (EXISTS, GO_ON_AND_REPLACE, also(REPLACE), also(REMOVE), GO_ON_AND_REPLACE),
    ),
}


def found(decision: Decision) -> Decision | str:
    """A decision as the table has it."""
    return decision.finding.code if decision.action is Action.REFUSE and decision.finding else decision


@pytest.mark.parametrize("retry", FLAGS)
@pytest.mark.parametrize("row", ROWS)
def test_the_table(row: str, retry: Retry) -> None:
    case, expected = ROWS[row]
    assert found(decide(case.facts(), retry, "web")) == expected[FLAGS.index(retry)]


@pytest.mark.parametrize("retry", FLAGS)
@pytest.mark.parametrize("row", ROWS)
def test_how_a_plan_that_stops_ends(row: str, retry: Retry) -> None:
    case, expected = ROWS[row]
    wanted = expected[FLAGS.index(retry)]
    refusal = replace(case, options=options(retry=retry)).plan().refusal()
    if isinstance(wanted, Decision):
        assert refusal is None
        return
    kind = {EXISTS: DomainExistsError, UNDER_WAY: LockedError}.get(wanted, RefusedError)
    assert isinstance(refusal, kind)
    assert refusal.exit_code is {EXISTS: ExitCode.EXISTS, UNDER_WAY: ExitCode.LOCKED}.get(wanted, ExitCode.REFUSED)
    assert refusal.remedy


@pytest.mark.parametrize(
    ("case", "retry", "words"),
    [
        (Case(staged=ATTEMPT), Retry.NONE, ["--resume", "--idempotent", "--force"]),
        (Case(existing=existing()), Retry.NONE, ["--new-name", "--idempotent", "--force"]),
        (Case(existing=existing(), staged=ATTEMPT), Retry.NONE, ["--resume", "--force"]),
        (Case(existing=existing(state="running")), Retry.IDEMPOTENT, ["shut it down", "--force"]),
        (Case(existing=existing(state="running"), staged=ATTEMPT), Retry.RESUME, ["shut it down", "--force"]),
        (Case(staged=staged(source_uuid="x")), Retry.RESUME, ["kvm-clone cleanup kc-b", "--force"]),
        (Case(), Retry.RESUME, ["leave out --resume"]),
    ],
)
def test_the_remedy_names_the_way_on(case: Case, retry: Retry, words: list[str]) -> None:
    finding = decide(case.facts(), retry, "web").finding
    assert finding is not None
    assert [word for word in words if word not in finding.remedy] == []


@pytest.mark.parametrize("state", sorted({*STATES.values()} - {"shut off"}))
@pytest.mark.parametrize("attempt", [None, ATTEMPT])
def test_nothing_but_force_touches_a_vm_that_is_not_shut_off(state: str, attempt: Any) -> None:
    facts = Case(existing=existing(state=state), staged=attempt).facts()
    for retry in FLAGS:
        decision = decide(facts, retry, "web")
        assert (decision.action is Action.REFUSE) != (retry in (Retry.FORCE, Retry.CLEANUP_EXISTING))
        assert decision.action is Action.REFUSE or decision.stop


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(staged=ATTEMPT), (RESUME, RESUME, RESUME, RESUME, RESUME)),
        (Case(staged=UNSETTLED), (RESUME, RESUME, RESUME, RESUME, RESUME)),
        (Case(existing=existing(mark=CURRENT), staged=UNSETTLED), (FINISH, FINISH, FINISH, FINISH, FINISH)),
        (
            Case(existing=existing(), staged=ATTEMPT),
            (EXISTS, GO_ON_AND_REPLACE, GO_ON_AND_REPLACE, also(REMOVE), GO_ON_AND_REPLACE),
        ),
        (
            Case(existing=existing(state="running"), staged=ATTEMPT),
            (EXISTS, IN_USE, replace(GO_ON_AND_REPLACE, stop=True), also(STOP_AND_REMOVE), IN_USE),
        ),
    ],
)
def test_what_this_very_run_was_doing_is_continued(case: Case, expected: tuple[Decision | str, ...]) -> None:
    """A VM that came up meanwhile is no more replaced than it would have been at first."""
    facts = case.facts()
    assert tuple(found(decide(facts, retry, "web", "earlier")) for retry in FLAGS) == expected


@pytest.mark.parametrize("retry", FLAGS)
def test_another_ones_attempt_is_not_this_runs(retry: Retry) -> None:
    facts = Case(staged=ATTEMPT).facts()
    assert decide(facts, retry, "web", "another") == decide(facts, retry, "web")


def changed(**changes: Any) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        return replace(facts, destination=replace(facts.destination, **changes))

    return change


def at_source(**changes: Any) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        return replace(facts, source=replace(facts.source, **changes))

    return change


BASE = Case(existing=existing(), staged=ATTEMPT).facts()
SOURCE = BASE.source
MATTERS: dict[str, Callable[[Facts], Facts]] = {
    "an image": at_source(images=(replace(SOURCE.images[0], fingerprint="1:3"),)),
    "the source's definition": at_source(domain=replace(SOURCE.domain, xml=SOURCE.domain.xml + " ")),
    "the source's state": at_source(domain=replace(SOURCE.domain, state="running")),
    "the existing VM gone": changed(existing=None),
    "the existing VM's state": changed(existing=existing(state="running")),
    "the existing VM's definition": changed(existing=existing(uuid=UUID)),
    "the attempt gone": changed(staged=None),
    "another attempt": changed(staged=replace(ATTEMPT, operation="another")),
    "another VM": changed(domains={"other": OTHER_UUID}),
    "another pool": changed(pools=(Pool("fast", "dir", "/fast", active=True),)),
    "the route": lambda facts: replace(facts, route=RouteFacts(False, "No route to host")),
}
DOES_NOT_MATTER: dict[str, Callable[[Facts], Facts]] = {
    "free space": changed(directories={one.path: replace(one, free=GIB) for one in images()}),
    "why the route is taken": lambda facts: replace(facts, route=RouteFacts(True, "as before")),
    "the clocks": changed(host=replace(BASE.destination.host, clock=0.5)),
}


@pytest.mark.parametrize("what", MATTERS)
def test_the_digest_changes_with(what: str) -> None:
    assert MATTERS[what](BASE).digest != BASE.digest


@pytest.mark.parametrize("what", DOES_NOT_MATTER)
def test_the_digest_stays_with(what: str) -> None:
    assert DOES_NOT_MATTER[what](BASE).digest == BASE.digest
    assert Case(existing=existing(), staged=ATTEMPT).facts().digest == BASE.digest


REQUESTS = [
    CloneOptions(),
    CloneOptions(
        new_name="a 'new' \"name\" …",
        preserve_uuid=True,
        preserve_mac=True,
        pool="fast",
        route=Route.RELAY,
        verify=Verify.OFF,
        quiesce=Quiesce.REQUIRE,
        track=True,
        parallel=7,
        bandwidth_limit=1 << 40,
        timeout=0.5,
        retry=Retry.CLEANUP_EXISTING,
        retries=0,
        keep_partial=False,
        wait=True,
        verify_existing=True,
    ),
    *(CloneOptions(retry=retry) for retry in Retry),
    SyncOptions(),
    SyncOptions(target_name="a 'new' name", create=True, verify=Verify.FULL, quiesce=Quiesce.OFF, retry=Retry.FORCE),
    *(SyncOptions(verify=verify) for verify in Verify),
]


def plan_for(asked: Options) -> Plan:
    facts = Case().facts()
    if isinstance(asked, SyncOptions):
        return make_sync_plan(facts, asked, IDENTITY)
    assert isinstance(asked, CloneOptions)
    return make_plan(facts, asked, IDENTITY)


@pytest.mark.parametrize("asked", REQUESTS)
def test_a_saved_plan_is_read_back(asked: Options, tmp_path: Path) -> None:
    request = Request("kc-a", "ssh://root@kc-b:2222", "web", asked)
    plan = plan_for(asked)
    file = tmp_path / "web.plan"
    plans._save(file, plans.document(request, plan, {}))
    assert plans.read(file) == (request, plan.facts.digest)


def test_the_document_is_plain_json_and_stable() -> None:
    case = Case(staged=ATTEMPT, options=options(retry=Retry.RESUME))
    request = Request("kc-a", "kc-b", "web", case.options)
    document = plans.document(request, case.plan(), {"vda": 7})
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(plans.document(request, case.plan(), {"vda": 7})))
    assert (document["action"], document["runs"]) == ("resume", True)
    assert document["request"]["command"] == "clone"
    assert [(disk["to_send"], disk["replica"]) for disk in document["disks"]] == [(7, None)]
    assert [disk["durable"] for disk in document["disks"]] == [staged_disk().durable]
    assert all(step["text"] and not step["text"].endswith((":", " ")) for step in document["steps"])


SAVED = plans.document(Request("kc-a", "kc-b", "web"), Case().plan(), {})
BAD: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"steps: 1",
    "no text": b"\xff\xfe\x00",
    "no object": b"[]",
    "null": b"null",
    "another format": json.dumps({**SAVED, "format": plans.FORMAT - 1}).encode(),
    "no format": json.dumps({key: value for key, value in SAVED.items() if key != "format"}).encode(),
    "no facts": json.dumps({key: value for key, value in SAVED.items() if key != "facts"}).encode(),
    "no request": json.dumps({key: value for key, value in SAVED.items() if key != "request"}).encode(),
    "a request that is none": json.dumps({**SAVED, "request": "web"}).encode(),
    "an unknown option": json.dumps(
        {**SAVED, "request": {**SAVED["request"], "options": {**SAVED["request"]["options"], "turbo": True}}}
    ).encode(),
    "an unknown route": json.dumps(
        {**SAVED, "request": {**SAVED["request"], "options": {**SAVED["request"]["options"], "route": "air"}}}
    ).encode(),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_plan(what: str, tmp_path: Path) -> None:
    file = tmp_path / "web.plan"
    file.write_bytes(BAD[what])
    with pytest.raises(UsageError, match=r"web\.plan") as caught:
        plans.read(file)
    assert "--plan-out" in caught.value.remedy


def test_a_plan_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    for file in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="cannot read the plan"):
            plans.read(file)
    with pytest.raises(UsageError, match="cannot write the plan"):
        plans._save(tmp_path / "no" / "web.plan", SAVED)
