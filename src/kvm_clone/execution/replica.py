"""After the commit: overlays merged down, the VM defined onto the images below, and its state sealed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from kvm_clone.definition.domain_xml import DiskXml, read_domain
from kvm_clone.definition.rewrite import merge_down
from kvm_clone.errors import InterruptedTransferError, KvmCloneError
from kvm_clone.hosts import vms
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import FencedLibvirt
from kvm_clone.image import Image
from kvm_clone.planning import domain_facts
from kvm_clone.planning.domain_facts import Domain

_PATIENCE_SECONDS, _PAUSE_SECONDS = 10.0, 0.5
"""How long a use of the images may last, and how often it is looked for: whoever waits for this operation looks at the
images now and then, and keeps others from writing them for that moment."""


async def merge(host: Host, libvirt: FencedLibvirt, name: str) -> None:
    """Merge the overlays that the committed operation has left, and define the VM onto the images below.

    The agent has the operation's lock. It keeps every VM from starting on the overlays, and on the images below, from
    the merge to the end, so that nothing is written to them that would be lost. What is defined onto the images
    already is not merged again: somebody may have used it since. Raises TransferError and its kinds; everything can be
    repeated.
    """
    await host.agent.unlock_images()
    bases = {one.path: Image(one.base, one.base_format) for one in await host.agent.overlays()}
    if not bases:
        return
    domain = await _at_rest(host, libvirt, name)
    disks = read_domain(domain.xml, domain.volumes).disks
    if not all(any(_is_of(disk, overlay, base) for disk in disks) for overlay, base in bases.items()):
        raise _kept(host, name, "it has other disks than those that the sync gave it")
    await _check_alone(host, libvirt, domain, bases)
    if {disk.path for disk in disks} & bases.keys():
        await _forget_older_memory(libvirt, name, bases)
        await host.agent.merge()
        domain = await _at_rest(host, libvirt, name)
        merged = merge_down(domain.xml, bases, domain.volumes)
        await libvirt.define(name, merged)
        # The overlays are about to go: nothing may name them any more.
        assert not {disk.path for disk in read_domain(merged, domain.volumes).disks} & bases.keys()
    await host.agent.merged()


def _is_of(disk: DiskXml, overlay: str, base: Image) -> bool:
    """Whether libvirt's definition has the disk on the overlay with this base below, or on the base alone.

    What the journal says of it is no reason to write into a file: it lies where others may write.
    """
    if disk.path == overlay:
        return disk.backing == (base,)
    return disk.path == base.path and disk.format == base.format and not disk.backing


async def _forget_older_memory(libvirt: FencedLibvirt, name: str, bases: Mapping[str, Image]) -> None:
    """Remove a managed save from before the commit: a VM that is resumed from it writes below the overlays."""
    await libvirt.forget_state(name, (), tuple(base.path for base in bases.values()))


async def _at_rest(host: Host, libvirt: FencedLibvirt, name: str) -> Domain:
    domain = await libvirt.find(name)
    if domain is None:
        raise _kept(host, name, "it is gone")
    if domain.state != domain_facts.SHUT_OFF:
        raise _kept(host, name, f"it is {domain.state}")
    return domain


async def _check_alone(host: Host, libvirt: FencedLibvirt, domain: Domain, bases: Mapping[str, Image]) -> None:
    """What anybody else uses, or a saved state of this VM rests on, must stay as it is."""
    paths = sorted({*bases, *(base.path for base in bases.values())})
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while used := await _used(host, libvirt, domain, paths):
        if time.monotonic() >= deadline:
            raise _kept(host, domain.name, f"{used[0].path}: {used[0].why}")
        await asyncio.sleep(_PAUSE_SECONDS)
    if await libvirt.is_saved_with(domain.name, tuple(bases)):
        raise _kept(host, domain.name, "its state was saved")


async def _used(host: Host, libvirt: FencedLibvirt, domain: Domain, paths: list[str]) -> list[vms.Use]:
    known = await vms.users(libvirt)
    found = await vms.judge(host, known, paths, but=domain.uuid, processes=True)
    return [use for use in found if not use.is_free]


def _kept(host: Host, name: str, why: str) -> KvmCloneError:
    return InterruptedTransferError(
        f"the disks of {name} on {host.name} cannot be merged: {why}",
        subject=name,
        remedy="it has all that was copied, and can be used as it is; the next sync or cleanup tries again",
    )


async def seal(host: Host, libvirt: FencedLibvirt, name: str) -> None:
    """Record how the VM is, unless somebody has used it since the commit, and that nothing is pending any more.

    Raises TransferError and its kinds.
    """
    images = await host.agent.seal()
    await libvirt.settle_pending(name)
    if images is not None:
        await libvirt.seal(name, images)
