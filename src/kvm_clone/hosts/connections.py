"""libvirt of a connected host, opened through the host's agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import libvirt

from kvm_clone.errors import ConnectError, TransferError
from kvm_clone.hosts import domains
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import FencedLibvirt, LibvirtHost


async def open_libvirt(host: Host) -> LibvirtHost:
    """Connect to the host, and open its libvirt for looking at it. Raises ConnectError and its kinds, RefusedError."""
    await host.connect()
    try:
        return LibvirtHost(host.name, await _connected(host, await host.libvirt_uri()))
    except TransferError as error:
        raise ConnectError(str(error), subject=host.name, remedy=error.remedy) from error


async def open_fenced(host: Host) -> FencedLibvirt:
    """Open libvirt for changing it, which works as long as the host's agent holds an operation's lock.

    Raises ConnectError, TransferError.
    """
    return FencedLibvirt(host.name, await _connected(host, await host.libvirt_uri(fenced=True)))


async def _connected(host: Host, uri: str) -> libvirt.virConnect:
    """Connect to libvirt. A thread cannot be cancelled: what it still opens after a cancellation is closed."""
    opening = asyncio.ensure_future(asyncio.to_thread(domains.connect, uri, host.name))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_late)
        raise


def _close_late(opening: asyncio.Future[libvirt.virConnect]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.get_loop().run_in_executor(None, opening.result().close)


@contextlib.asynccontextmanager
async def holding(host: Host, name: str) -> AsyncIterator[FencedLibvirt]:
    """The lock on operations on the VM of that name, held at the host, and libvirt there by way of its holder.

    Raises LockedError while another operation is under way, ConnectError, TransferError.
    """
    await host.agent.hold(name=name, about={})
    fenced: FencedLibvirt | None = None
    try:
        fenced = await open_fenced(host)
        yield fenced
    finally:
        if fenced is not None:
            await fenced.close()
        with contextlib.suppress(TransferError):  # an agent that cannot be reached releases it by itself
            await host.agent.release()
