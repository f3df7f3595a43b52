"""trial.py: libvirt's word on a definition, with libvirt's own test driver; nothing is defined by it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest
from cases import ONE_DISK, Case, existing, images, options, replica

from kvm_clone.errors import ExitCode
from kvm_clone.execution.trial import judged
from kvm_clone.findings import Severity
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.verdict import Verdict, judge
from kvm_clone.options import Retry
from kvm_clone.planning.decide import Action
from kvm_clone.planning.plan import Plan

XML = "<domain type='test'><name>a&#10;</name><memory>1024</memory><os><type>hvm</type></os>%s</domain>"


@pytest.fixture
def connection() -> Iterator[Any]:
    opened = libvirt.open("test:///default")
    before = names(opened)
    yield opened
    assert names(opened) == before
    opened.close()


def names(connection: Any) -> list[str]:
    return sorted(domain.name() for domain in connection.listAllDomains())


def test_a_definition_that_passes(connection: Any) -> None:
    assert judge(connection, XML % "") == Verdict()


@pytest.mark.parametrize(
    ("devices", "word"),
    [
        ("<devices><disk type='odd'/></devices>", "odd"),
        ("<vcpu>0</vcpu>", "vcpu"),
        ("<devices>", "domain_definition"),
        ("<cputune><shares>1</shares><shares>2</shares></cputune>", ""),
    ],
)
def test_a_definition_that_is_refused(connection: Any, devices: str, word: str) -> None:
    verdict = judge(connection, XML % devices)
    if word:
        assert word in verdict.refusal
    assert verdict.unknown == ""


def test_a_libvirt_that_may_not_be_asked() -> None:
    connection = libvirt.openReadOnly("test:///default")
    verdict = judge(connection, XML % "")
    assert verdict.refusal == ""
    assert "read only" in verdict.unknown


def run(case: Case, connection: Any, plan: Plan | None = None) -> Plan:
    return asyncio.run(judged(plan or case.plan(), LibvirtHost("kc-b", connection)))


def test_a_plan_whose_definition_is_refused(connection: Any) -> None:
    """The domain of cases.py has no OS type, which libvirt does not take."""
    plan = run(Case(), connection)
    (finding,) = plan.findings
    assert (finding.code, finding.severity, finding.subject) == ("definition-refused", Severity.BLOCKING, "web")
    assert "os <type>" in finding.text
    assert plan.steps == ()
    refusal = plan.refusal()
    assert refusal is not None
    assert refusal.exit_code is ExitCode.REFUSED


def test_a_plan_whose_definition_passes(connection: Any) -> None:
    plan = Case(os="<type>hvm</type>").plan()
    assert run(Case(), connection, plan) == plan


def test_a_sync_whose_definition_is_refused(connection: Any) -> None:
    case = Case()
    plan = Case(existing=replica(case.facts())).sync()
    assert [one.code for one in run(case, connection, plan).blocking] == ["definition-refused"]


def test_a_replica_is_not_stopped_for_a_definition_that_is_refused(connection: Any) -> None:
    case = Case()
    running = replica(case.facts(), domain={"state": "running"})
    plan = Case(existing=running).sync(retry=Retry.FORCE)
    assert plan.decision.action is Action.STOP_REPLICA
    assert [one.code for one in run(case, connection, plan).blocking] == ["definition-refused"]


def test_a_plan_that_cannot_be_judged() -> None:
    plan = run(Case(), libvirt.openReadOnly("test:///default"))
    assert [(one.code, one.severity) for one in plan.findings] == [("definition-not-judged", Severity.WARNING)]
    assert plan.steps


@pytest.mark.parametrize(
    "case",
    [
        Case(directories=images(writable=False)),
        Case(existing=existing(), options=options(retry=Retry.NONE)),
    ],
)
def test_nothing_is_asked_for_a_plan_that_does_nothing(case: Case) -> None:
    plan = case.plan()
    assert run(case, None) == plan


def test_the_name_is_the_only_thing_that_is_impossible(connection: Any) -> None:
    xml = Case(ONE_DISK).facts().source.domain.xml.replace("'kvm'", "'test'").replace("<os>", "<os><type>hvm</type>")
    assert judge(connection, xml.replace("<name>web", "<name>web\n")) == Verdict()


def test_a_daemon_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = libvirt.open("test:///default")
    monkeypatch.setattr("kvm_clone.hosts.verdict.daemon_is_gone", lambda _: True)
    with pytest.raises(libvirt.libvirtError):
        judge(connection, XML % "")
