"""Whether a host can give a VM its CPU: as the VM asks for it, and as its libvirt compares it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import libvirt

from kvm_clone.definition import CpuXml, DomainXml
from kvm_clone.findings import Finding, Severity, block
from kvm_clone.xmlspan import Document


@dataclass(frozen=True)
class CpuFacts:
    """What a host's libvirt says of a VM's CPU.

    `modes`: whether each is supported; `models`: whether each is usable as it is, for the emulator. `refusal`: why the
    host's CPU is not compatible. `unknown`: why that could not be found out. `blockers`: the features that keep the
    model from being usable, where libvirt names them.
    """

    modes: Mapping[str, bool] = field(default_factory=dict)
    models: Mapping[str, bool] = field(default_factory=dict)
    refusal: str = ""
    unknown: str = ""
    blockers: tuple[str, ...] = ()


def compare_cpu(connection: libvirt.virConnect, xml: DomainXml, capabilities: str) -> CpuFacts:
    """Return what libvirt says of the VM's <cpu>; `capabilities` are those of its domains. It blocks."""
    modes = {one.attributes.get("name", ""): one for one in Document(capabilities).root.find_all("cpu", "mode")}
    supported = {name: one.attributes.get("supported") != "no" for name, one in modes.items()}
    custom = modes.get("custom")
    models = {one.text: one.attributes.get("usable") != "no" for one in custom.find_all("model")} if custom else {}
    blockers = list(custom.find_all("blockers")) if custom else []
    named = tuple(
        feature.attributes.get("name", "")
        for one in blockers
        if xml.cpu is not None and one.attributes.get("model") == xml.cpu.model
        for feature in one.find_all("feature")
    )
    refusal, unknown = _compared(connection, xml) if xml.cpu is not None else ("", "")
    return CpuFacts(supported, models, refusal, unknown, named)


def _compared(connection: libvirt.virConnect, xml: DomainXml) -> tuple[str, str]:
    """Return why the host's CPU is not compatible, and why that is not known; nothing for what does not apply."""
    assert xml.cpu is not None
    flags = libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE  # the error then names the features
    try:
        connection.compareHypervisorCPU(xml.emulator, xml.arch, xml.machine, xml.type, xml.cpu.markup, flags)
    except libvirt.libvirtError as error:
        said = str(error.get_error_message())
        return (said, "") if error.get_error_code() == libvirt.VIR_ERR_CPU_INCOMPATIBLE else ("", said)
    return "", ""


def cpu_findings(host: str, cpu: CpuXml, can: CpuFacts) -> Iterator[Finding]:
    """Whether the VM will run there: what libvirt does not check at a start is no reason to refuse."""
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
    """Whether QEMU has no such model, and libvirt may not, or cannot, put another one in its place."""
    known = cpu.model is None or not can.models or cpu.model in can.models
    return not known and (cpu.fallback == "forbid" or bool(can.unknown))


def _refused(host: str, text: str) -> Finding:
    return block("cpu-model", host, text, "choose a model that both hosts have: virsh domcapabilities")
