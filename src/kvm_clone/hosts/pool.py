"""Connections to hosts that outlive one operation: a second operation between the same hosts opens no new ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.errors import KvmCloneError
from kvm_clone.gather import together, undisturbed
from kvm_clone.hosts import connections
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import LibvirtHost

log = logging.getLogger(__name__)

Connected = tuple[Host, LibvirtHost]
"""A connected host, and its libvirt."""

_ANSWER_SECONDS = 5.0
"""How long an idle connection may take to answer; a new one is opened then."""


class Pool:
    """Idle connections by the host's address. One connection serves one operation at a time.

    Only what an operation that succeeded has given back, with an agent that holds nothing, is used again.
    """

    def __init__(self, make_host: Callable[[str], Host]) -> None:
        self._make_host = make_host
        self._idle: dict[str, list[Connected]] = {}

    @contextlib.asynccontextmanager
    async def lease(self, *names: str) -> AsyncIterator[list[Connected]]:
        """The hosts with their libvirt, connected side by side. A block that raises has its connections closed.

        Raises ConnectError and its kinds, RefusedError.
        """
        leased: list[tuple[str, Connected]] = []
        in_order = False
        try:
            yield await together(*(self._connect(name, leased) for name in names))
            in_order = True
        finally:
            await undisturbed(self._take_back(leased, in_order=in_order))

    async def close(self) -> None:
        """Close the connections that nobody uses."""
        idle, self._idle = self._idle, {}
        await undisturbed(_close_all([one for several in idle.values() for one in several]))

    async def _connect(self, name: str, leased: list[tuple[str, Connected]]) -> Connected:
        """Connect, or use an idle connection; it is noted in `leased` at once, whatever becomes of others."""
        while idle := self._idle.get(name):
            one = idle.pop()
            leased.append((name, one))
            if await _answers(one):
                return one
        host = self._make_host(name)
        try:
            libvirt = await connections.open_libvirt(host)
        except BaseException:
            await host.close()
            raise
        leased.append((name, (host, libvirt)))
        return host, libvirt

    async def _take_back(self, leased: list[tuple[str, Connected]], *, in_order: bool) -> None:
        async def one(name: str, connected: Connected) -> None:
            if in_order and await _is_clean(connected[0]):
                self._idle.setdefault(name, []).append(connected)
            else:
                await _close_all([connected])

        await asyncio.gather(*(one(*each) for each in leased))


async def _answers(connected: Connected) -> bool:
    """Whether the agent and libvirt are still there."""
    host, libvirt = connected
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await host.agent.ping()
            return await libvirt.is_alive()
    except (KvmCloneError, TimeoutError) as error:
        log.info("%s: an idle connection is gone: %s", host.name, error)
        return False


async def _is_clean(host: Host) -> bool:
    """Make the agent release all that it holds; whether it has."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await host.agent.unlock_images()
            await host.agent.release()
    except AgentCallError as error:
        return error.kind == kinds.UNSUPPORTED  # it had no operation to release
    except (KvmCloneError, TimeoutError) as error:
        log.info("%s: the connection is not used again: %s", host.name, error)
        return False
    return True


async def _close_all(given: list[Connected]) -> None:
    for _, libvirt in given:
        await libvirt.close()
    await asyncio.gather(*(host.close() for host, _ in given))
