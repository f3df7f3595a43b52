"""What a host's libvirt says of the CPU that a VM asks for."""

from __future__ import annotations

import libvirt

from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.definition.spans import Document
from kvm_clone.hosts.libvirt_errors import message_of
from kvm_clone.planning.domain_facts import CpuFacts


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
        said = message_of(error)
        return (said, "") if error.get_error_code() == libvirt.VIR_ERR_CPU_INCOMPATIBLE else ("", said)
    return "", ""
