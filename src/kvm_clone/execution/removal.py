"""What has to be known before files of a VM at the destination are removed."""

from __future__ import annotations

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution.context import Context
from kvm_clone.hosts.survey import fingerprints


async def fingerprints_at_source(run: Context) -> list[str]:
    """The fingerprints of the source VM's files, which must not be removed: now, or when they were last seen."""
    source = run.plan.facts.source
    try:
        return list((await fingerprints(run.source, source.xml, source.images)).values())
    except KvmCloneError:  # the source is lost; what it had it has
        return list(source.files.values())
