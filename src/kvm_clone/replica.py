"""After the commit: overlays merged down, the VM defined onto the images below, and its state sealed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import libvirt

from kvm_clone import domains, vms
from kvm_clone.definition import read_domain
from kvm_clone.domains import Domain
from kvm_clone.errors import InterruptedTransferError, KvmCloneError
from kvm_clone.host import Host
from kvm_clone.rewrite import Base, merge_down


async def merge(host: Host, connection: libvirt.virConnect, name: str) -> None:
    """Merge the overlays that the committed operation has left, and define the VM onto the images below.

    The agent has the operation's lock. It keeps every VM from starting on the overlays, and on the images below, from
    the merge to the end, so that nothing is written to them that would be lost. What is defined onto the images
    already is not merged again: somebody may have used it since. Raises TransferError and its kinds; everything can be
    repeated.
    """
    await host.call("unlock_images")
    bases = {one["path"]: Base(one["base"], one["base_format"]) for one in await host.call("overlays")}
    if not bases:
        return
    domain = await _at_rest(host, connection, name)
    used = {disk.path for disk in read_domain(domain.xml).disks}
    if not all(overlay in used or base.path in used for overlay, base in bases.items()):
        raise _kept(host, name, "it has other disks than those that the sync gave it")
    await _check_alone(host, connection, domain, bases)
    if used & bases.keys():
        await _forget_older_memory(connection, name, bases)
        await host.call("merge")
        merged = merge_down((await _at_rest(host, connection, name)).xml, bases)
        with domains.failing_as(f"defining {name} onto its merged disks", name):
            await asyncio.to_thread(domains.define, connection, merged)
        # The overlays are about to go: nothing may name them any more.
        assert not {disk.path for disk in read_domain(merged).disks} & bases.keys()
    await host.call("merged")


async def _forget_older_memory(connection: libvirt.virConnect, name: str, bases: Mapping[str, Base]) -> None:
    """Remove a managed save from before the commit: a VM that is resumed from it writes below the overlays."""
    with domains.failing_as(f"removing the saved state of {name}", name):
        below = tuple(base.path for base in bases.values())
        await asyncio.to_thread(domains.forget_state, connection, name, (), below)


async def _at_rest(host: Host, connection: libvirt.virConnect, name: str) -> Domain:
    with domains.failing_as(f"asking {host.name} for {name!r}", name):
        domain = await asyncio.to_thread(domains.find, connection, name)
    if domain is None:
        raise _kept(host, name, "it is gone")
    if domain.state != domains.SHUT_OFF:
        raise _kept(host, name, f"it is {domain.state}")
    return domain


async def _check_alone(host: Host, connection: libvirt.virConnect, domain: Domain, bases: Mapping[str, Base]) -> None:
    """What another VM, or a saved state of this one, rests on must stay as it is."""
    paths = {*bases, *(base.path for base in bases.values())}
    alone = await vms.unused(host, connection, tuple(sorted(paths)), domain.uuid)
    if set(alone) != paths:
        raise _kept(host, domain.name, f"another VM uses {', '.join(sorted(paths - set(alone)))}")
    with domains.failing_as(f"asking {host.name} for the saved state of {domain.name!r}", domain.name):
        if await asyncio.to_thread(domains.is_saved_with, connection, domain.name, tuple(bases)):
            raise _kept(host, domain.name, "its state was saved")


def _kept(host: Host, name: str, why: str) -> KvmCloneError:
    return InterruptedTransferError(
        f"the disks of {name} on {host.name} cannot be merged: {why}",
        subject=name,
        remedy="it has all that was copied, and can be used as it is; the next sync or cleanup tries again",
    )


async def seal(host: Host, connection: libvirt.virConnect, name: str) -> None:
    """Record how the VM is, unless somebody has used it since the commit. Raises TransferError and its kinds."""
    images = await host.call("seal")
    if images is not None:
        with domains.failing_as(f"sealing {name}", name):
            await asyncio.to_thread(domains.seal, connection, name, images)
