"""A VM that is there already: what it consists of, and its removal."""

from __future__ import annotations

import asyncio
import logging

import libvirt

from kvm_clone import definition, domains, ownership
from kvm_clone.errors import RefusedError, TransferError
from kvm_clone.facts import Existing
from kvm_clone.host import Host
from kvm_clone.tasks import together

log = logging.getLogger(__name__)


async def existing(host: Host, connection: libvirt.virConnect, name: str) -> Existing | None:
    """The VM of that name, and which of its files nobody else uses."""
    with domains.failing_as(f"asking {host.name} for {name!r}", host.name):
        domain = await asyncio.to_thread(domains.find, connection, name)
        if domain is None:
            return None
    xml = definition.read_domain(domain.xml)
    mark = ownership.read_provenance(domain.xml)
    own = [disk.path for disk in xml.own_disks if disk.type == "file" and disk.path]
    there = await together(*(host.call("exists", path=path) for path in own))
    return Existing(
        domain,
        xml,
        mark if mark is not None and mark.uuid == domain.uuid else None,
        whole=all(there),
        removable=await unused(host, connection, tuple(own), domain.uuid),
        seal=ownership.read_seal(domain.xml),
    )


async def unused(host: Host, connection: libvirt.virConnect, paths: tuple[str, ...], uuid: str = "") -> tuple[str, ...]:
    """Those of the paths that are files, and that no VM but `uuid` uses: as a disk, a medium, or what one rests on."""
    with domains.failing_as(f"asking libvirt on {host.name}", host.name):
        others = await asyncio.to_thread(domains.paths_of_others, connection, uuid)
    used = set(await host.call("backing_files", paths=sorted(others)))
    answers = await together(*(host.call("disk", path=path, image_format="raw") for path in paths))
    found = {path: answer for path, answer in zip(paths, answers, strict=True) if answer.get("regular")}
    return tuple(path for path, answer in found.items() if answer["real"] not in used)


async def remove_files(host: Host, paths: tuple[str, ...]) -> list[str]:
    """Remove files that a VM had for itself; those that were there. Raises TransferError for what cannot be removed."""
    answers = await host.call("remove_files", paths=list(paths))
    removed = [one["path"] for one in answers if one["result"] == "removed"]
    for path in removed:
        log.info("removed %s on %s", path, host.name)
    failed = [f"{one['path']}: {one['error']}" for one in answers if one["result"] == "error"]
    if failed:
        raise TransferError(f"cannot remove {'; '.join(failed)}", subject=host.name)
    return removed


async def remove_replaced(
    host: Host, connection: libvirt.virConnect, name: str, paths: tuple[str, ...], forget: tuple[str, ...]
) -> list[str]:
    """Remove what only a VM that was replaced had: these files, snapshots and checkpoints; what was removed.

    Raises TransferError.
    """
    with domains.failing_as(f"tidying up after the old {name} on {host.name}", name):
        removed = await asyncio.to_thread(domains.forget_state, connection, name, forget, paths)
    # Others may have come to use them since the plan, or since the run that is being finished.
    return removed + await remove_files(host, await unused(host, connection, paths))


async def cleanup(host: Host, connection: libvirt.virConnect, name: str, *, stop: bool) -> list[str]:
    """See api.Client.cleanup_vm."""
    found = await existing(host, connection, name)
    if found is None:
        return []
    removed = []
    with domains.failing_as(f"removing {name!r} from {host.name}", name):
        if found.domain.state != domains.SHUT_OFF and not stop:
            raise RefusedError(
                f"VM {name} on {host.name} is {found.domain.state}",
                subject=name,
                remedy="shut it down, or pass stop=True",
            )
        if await asyncio.to_thread(domains.stop, connection, name):
            removed.append(f"running state of {name}")
        if found.domain.persistent:
            await asyncio.to_thread(domains.undefine, connection, name)
            removed.append(f"definition of {name}")
    for thing in removed:
        log.info("removed the %s on %s", thing, host.name)
    return removed + await remove_files(host, found.removable)
