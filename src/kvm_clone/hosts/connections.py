"""libvirt of a connected host, opened through the host's agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import libvirt

from kvm_clone.errors import ConnectError, TransferError
from kvm_clone.hosts import domains
from kvm_clone.hosts.domains import Fenced
from kvm_clone.hosts.host import Host


async def open_libvirt(host: Host) -> libvirt.virConnect:
    """Connect to the host, and open its libvirt for looking at it. Raises ConnectError and its kinds, RefusedError."""
    await host.connect()
    try:
        return await asyncio.to_thread(domains.connect, await host.libvirt_uri(), host.name)
    except TransferError as error:
        raise ConnectError(str(error), subject=host.name, remedy=error.remedy) from error


async def open_fenced(host: Host) -> Fenced:
    """Open libvirt for changing it, which works as long as the host's agent holds an operation's lock.

    Raises ConnectError, TransferError.
    """
    return Fenced(await asyncio.to_thread(domains.connect, await host.libvirt_uri(fenced=True), host.name))


async def close(connection: libvirt.virConnect) -> None:
    """Close a connection, also one whose host is gone."""
    with contextlib.suppress(libvirt.libvirtError):
        await asyncio.to_thread(connection.close)


@contextlib.asynccontextmanager
async def holding(host: Host, name: str) -> AsyncIterator[Fenced]:
    """The lock on operations on the VM of that name, held at the host, and libvirt there by way of its holder.

    Raises LockedError while another operation is under way, ConnectError, TransferError.
    """
    await host.agent.hold(name=name, about={})
    fenced: Fenced | None = None
    try:
        fenced = await open_fenced(host)
        yield fenced
    finally:
        if fenced is not None:
            await close(fenced.connection)
        with contextlib.suppress(TransferError):  # an agent that cannot be told lets go by itself
            await host.agent.release()
