"""cpu.py: a CPU is judged as the VM asks for it."""

from __future__ import annotations

from typing import Any

import libvirt
import pytest
from cases import Case, domain_xml

from kvm_clone.definition.domain_xml import CpuXml, read_domain
from kvm_clone.findings import Severity
from kvm_clone.hosts.cpu import compare_cpu
from kvm_clone.planning.domain_facts import CpuFacts

CUSTOM = "<cpu mode='custom' %s><model %s>EPYC</model>%s</cpu>"
PARTIAL = CUSTOM % ("check='partial'", "", "")
NONE = CUSTOM % ("check='none'", "fallback='forbid'", "")
REFUSAL = "Host CPU does not provide required features: svm"
BLOCKING, WARNING = Severity.BLOCKING, Severity.WARNING

CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, Severity, str]]]] = {
    "no CPU": ("", {"refusal": REFUSAL, "unknown": "x", "modes": {"custom": False}}, []),
    "compatible": (PARTIAL, {"models": {"EPYC": False}}, []),
    "incompatible": (PARTIAL, {"refusal": REFUSAL}, [("cpu-model", BLOCKING, "svm")]),
    "incompatible, fully checked": (
        CUSTOM % ("check='full'", "", ""),
        {"refusal": REFUSAL},
        [("cpu-model", BLOCKING, "EPYC")],
    ),
    "incompatible, not checked": (NONE, {"refusal": REFUSAL, "models": {"EPYC": False}}, []),
    "incompatible, a check that KVM puts": (
        CUSTOM % ("", "", ""),
        {"refusal": REFUSAL},
        [("cpu-model", BLOCKING, "svm")],
    ),
    "incompatible, the host's model": (
        "<cpu mode='host-model'/>",
        {"refusal": REFUSAL},
        [("cpu-model", BLOCKING, "svm")],
    ),
    "the host's own": ("<cpu mode='host-passthrough'/>", {"refusal": REFUSAL}, []),
    "a mode that is not supported": (
        "<cpu mode='host-passthrough'/>",
        {"modes": {"host-passthrough": False}},
        [("cpu-model", BLOCKING, "host-passthrough")],
    ),
    "an unheard-of model": (NONE, {"models": {"Haswell": True}}, [("cpu-model", BLOCKING, "does not know")]),
    "an unheard-of model that may be replaced": (
        CUSTOM % ("check='none'", "fallback='allow'", ""),
        {"models": {"Haswell": True}},
        [],
    ),
    "an unheard-of model that cannot be replaced": (
        CUSTOM % ("check='none'", "fallback='allow'", ""),
        {"models": {"Haswell": True}, "unknown": "Unknown CPU model EPYC"},
        [("cpu-model", BLOCKING, "does not know")],
    ),
    "not compared": (PARTIAL, {"unknown": "no driver"}, [("cpu-not-compared", WARNING, "no driver")]),
    "not compared, not checked": (NONE, {"unknown": "no driver"}, []),
    "not compared, not usable": (
        PARTIAL,
        {"unknown": "no driver", "models": {"EPYC": False}, "blockers": ("svm", "npt")},
        [("cpu-not-compared", WARNING, "no driver"), ("cpu-model", BLOCKING, "it lacks svm, npt")],
    ),
    "not compared, not usable as it is": (
        CUSTOM % ("check='partial'", "", "<feature policy='disable' name='svm'/>"),
        {"unknown": "no driver", "models": {"EPYC": False}},
        [("cpu-not-compared", WARNING, "no driver")],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_findings(what: str) -> None:
    cpu, facts, expected = CASES[what]
    found = Case(cpu=cpu, abilities={"cpu": CpuFacts(**facts)}).plan().findings
    assert [(one.code, one.severity) for one in found] == [(code, severity) for code, severity, _ in expected]
    for finding, (_, _, word) in zip(found, expected, strict=True):
        assert word in finding.text


def test_nothing_is_said_of_the_cpu_where_the_machine_is_refused() -> None:
    can = {"cpu": CpuFacts(unknown="no such accelerator"), "refusal": "no such accelerator"}
    assert [one.code for one in Case(cpu=PARTIAL, abilities=can).plan().findings] == ["machine"]


def test_the_definitions_cpu() -> None:
    markup = "<cpu mode = 'custom'  check='partial'>\n <model fallback='forbid'>EPYC</model>\n<!-- x --></cpu>"
    cpu = read_domain(domain_xml("", cpu=markup)).cpu
    assert cpu == CpuXml(markup, "custom", "partial", "EPYC", "forbid")


@pytest.mark.parametrize(
    ("type_", "cpu", "check"),
    [
        ("kvm", "<cpu><model>EPYC</model></cpu>", "partial"),
        ("qemu", "<cpu><model>EPYC</model></cpu>", "none"),
        ("qemu", "<cpu mode='host-model'/>", "partial"),
        ("kvm", "<cpu mode='maximum'/>", "none"),
        ("kvm", "<cpu><topology sockets='1'/></cpu>", "none"),
    ],
)
def test_the_check_that_libvirt_puts(type_: str, cpu: str, check: str) -> None:
    found = read_domain(domain_xml("", cpu=cpu).replace("'kvm'", f"'{type_}'")).cpu
    assert found is not None
    assert found.check == check


CAPABILITIES = """<domainCapabilities><cpu>
  <mode name='host-passthrough' supported='no'/>
  <mode name='custom' supported='yes'>
    <model usable='no'>EPYC</model><blockers model='EPYC'><feature name='svm'/><feature name='npt'/></blockers>
    <model usable='yes'>qemu64</model>
  </mode>
</cpu></domainCapabilities>"""


@pytest.fixture
def connection() -> Any:
    """libvirt's own test driver, which cannot compare CPUs of a hypervisor."""
    opened = libvirt.open("test:///default")
    yield opened
    opened.close()


def test_a_libvirt_that_cannot_compare(connection: Any) -> None:
    facts = compare_cpu(connection, read_domain(domain_xml("", cpu=PARTIAL)), CAPABILITIES)
    assert facts.modes == {"host-passthrough": False, "custom": True}
    assert facts.models == {"EPYC": False, "qemu64": True}
    assert facts.blockers == ("svm", "npt")
    assert facts.refusal == ""
    assert "virConnectCompareHypervisorCPU" in facts.unknown


def test_a_vm_without_a_cpu_is_not_compared(connection: Any) -> None:
    facts = compare_cpu(connection, read_domain(domain_xml("")), "<domainCapabilities/>")
    assert facts == CpuFacts()
