"""The clone's definition. Pure: the plan and what the run has found out in, libvirt's XML out."""

from __future__ import annotations

from kvm_clone.definition import rewrite, variables
from kvm_clone.definition.marks import Pending, Provenance
from kvm_clone.planning.plan import Plan
from kvm_clone.version import __version__


def clone_xml(plan: Plan, mark: Provenance, pending: Pending | None = None, name: str | None = None) -> str:
    """Return the definition of the clone with our mark, and with what its commit leaves to be done.

    `name`: another name for the clone, None for its own.

    Raises RefusedError for a name, or a path, that XML cannot hold.
    """
    source = plan.facts.source
    change = rewrite.Change(
        new_name=plan.name if name is None else name,
        provenance=mark,
        new_uuid=None if plan.uuid == source.domain.uuid else plan.uuid,
        new_macs=plan.macs,
        disk_paths={disk.target: disk.final for disk in plan.disks if disk.target != variables.KEY},
        disk_formats={disk.target: disk.format for disk in plan.disks if disk.base is not None},
        disk_bases={disk.target: disk.below for disk in plan.disks if disk.below is not None},
        disk_volumes=plan.volumes,
        new_genid=plan.identity.genid,
        host_paths=plan.host_paths,
        variables=plan.variables,
        pending=pending if pending is not None and (pending.remove or pending.forget) else None,
    )
    return rewrite.rewrite(source.domain.xml, change)


def planned_mark(plan: Plan) -> Provenance:
    """Return our mark as far as the plan knows it. The run adds the time and how the source was read."""
    source = plan.facts.source
    return Provenance(
        operation=plan.identity.operation,
        uuid=plan.uuid,
        source_host=source.host.hostname,
        source_uuid=source.domain.uuid,
        source_name=source.domain.name,
        fingerprint=source.fingerprint,
        version=__version__,
        created="",
        verified=False,
        macs=" ".join(f"{own}={new}" for own, new in zip(source.xml.macs, plan.macs, strict=True)),
    )
