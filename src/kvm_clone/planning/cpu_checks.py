"""Findings about whether a host can provide a VM's CPU. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvm_clone.definition.domain_xml import CpuXml
from kvm_clone.findings import Finding, Severity, block
from kvm_clone.planning.domain_facts import CpuFacts


def cpu_findings(host: str, cpu: CpuXml, can: CpuFacts) -> Iterator[Finding]:
    """Yield why libvirt there would not start the VM: what it does not check at a start is not refused."""
    what = f"{host} cannot give the VM its CPU, {cpu.model or cpu.mode}"
    if not can.modes.get(cpu.mode, True):
        yield _refused(host, f"{what}: its hypervisor does not support that mode.")
    elif _is_unheard_of(cpu, can):
        yield _refused(host, f"{what}: QEMU there does not know the model.")
    elif cpu.check == "none":
        return
    elif can.refusal:
        yield _refused(host, f"{what}: {can.refusal}.")
    elif can.unknown:
        text = f"libvirt on {host} cannot compare the VM's CPU with its own: {can.unknown}."
        yield Finding("cpu-not-compared", Severity.WARNING, host, text, "see that the VM starts there")
        if cpu.model is not None and not can.models.get(cpu.model, True) and not cpu.eased:
            lacking = f": it lacks {', '.join(can.blockers)}" if can.blockers else ""
            yield _refused(host, f"{what}{lacking}.")


def _is_unheard_of(cpu: CpuXml, can: CpuFacts) -> bool:
    """Whether QEMU lacks the model, and libvirt must not or cannot replace it by another."""
    known = cpu.model is None or not can.models or cpu.model in can.models
    return not known and (cpu.fallback == "forbid" or bool(can.unknown))


def _refused(host: str, text: str) -> Finding:
    return block("cpu-model", host, text, "choose a model that both hosts have: virsh domcapabilities")
