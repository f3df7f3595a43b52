"""The destination's libvirt judges the clone's definition before anything is written: hosts/verdict.py says how."""

from __future__ import annotations

from dataclasses import replace

from kvm_clone.findings import Finding, Severity, block
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.verdict import IMPOSSIBLE
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.plan import Plan
from kvm_clone.planning.steps import DefineDomain, StopDomain


async def judged(plan: Plan, libvirt: LibvirtHost) -> Plan:
    """Return the plan, with a blocking finding and no steps if the destination's libvirt refuses its definition.

    One call, and none for a plan that is refused already or defines nothing. Raises TransferError.
    """
    if not any(isinstance(step, DefineDomain | StopDomain) for step in plan.steps):
        return plan
    xml = clone_xml(plan, planned_mark(plan), name=plan.name + IMPOSSIBLE)
    host = plan.facts.destination.host.name
    verdict = await libvirt.judge(xml, plan.name)
    if verdict.refusal:
        text = f"libvirt on {host} refuses the definition of {plan.name}: {verdict.refusal}."
        remedy = f"install what {host} lacks, or change the definition"
        return replace(plan, findings=(*plan.findings, block("definition-refused", plan.name, text, remedy)), steps=())
    if verdict.unknown:
        text = f"Whether libvirt on {host} takes the definition of {plan.name} is not known: {verdict.unknown}."
        finding = Finding("definition-not-judged", Severity.WARNING, plan.name, text)
        return replace(plan, findings=(*plan.findings, finding))
    return plan
