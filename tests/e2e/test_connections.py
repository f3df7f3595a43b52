"""Connections outlive an operation of a Client, and only those that are in good order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clonekit import agents, assert_equal, assert_nothing_left, kill, running, wait_for_copy, wait_until, wipe
from labclient import Lab, Vm

from kvm_clone import Client, CloneOptions
from kvm_clone.client import Request
from kvm_clone.errors import ConnectError, RefusedError
from kvm_clone.hosts import connections, pool, survey
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.ssh import SshOptions
from kvm_clone.options import Retry
from kvm_clone.progress import Event, Note

PAIR = ("kc-a", "kc-b")


@pytest.fixture
def row(lab: Lab) -> Iterator[Vm]:
    yield lab.vm("kc-a", "row", ["qcow2:8M:2M"], boot=False)
    wipe(lab)


def options(lab: Lab) -> SshOptions:
    return SshOptions(config=lab.ssh_config, retries=0)


def there(lab: Lab) -> list[list[int]]:
    return [agents(lab, host) for host in PAIR]


class Counter:
    """Counts the calls of a function, which it makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.count = 0
        work = getattr(owner, name)

        def counted(*arguments: Any, **how: Any) -> Any:
            self.count += 1
            return work(*arguments, **how)

        monkeypatch.setattr(owner, name, counted)


def test_a_second_operation_opens_no_new_connection(lab: Lab, row: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    async def both() -> None:
        async with Client(options(lab)) as client:
            await client.clone(*PAIR, "row", CloneOptions(new_name="one"))
            before = there(lab)
            assert [len(pids) for pids in before] == [1, 1]
            connects = Counter(monkeypatch, Host, "connect")
            await client.clone(*PAIR, "row", CloneOptions(new_name="two"))
            await client.list_vms(PAIR)
            await client.cleanup_vm("kc-b", "one")
            assert (there(lab), connects.count) == (before, 0)
            idle = [host for several in client._pool._idle.values() for host, _ in several]
            assert len(idle) == 2
            ended = "the tunnels of operations that are over are closed: one is left to look through"
            await asyncio.to_thread(wait_until, ended, lambda: all(host.link.tunnels == 1 for host in idle))

    asyncio.run(both())
    assert_equal(lab, row, "two")
    assert_nothing_left(lab)
    wait_until("the agents end", lambda: there(lab) == [[], []])


def test_what_an_agent_held_is_released_between_operations(lab: Lab, row: Vm) -> None:
    """A plan locks the images of a VM at rest, so that it cannot start meanwhile."""

    async def planned() -> None:
        async with Client(options(lab)) as client:
            await client.plan(Request(*PAIR, "row"))
            assert [len(pids) for pids in there(lab)] == [1, 1]
            await asyncio.to_thread(lab.run, "kc-a", "virsh", "start", "row")

    asyncio.run(planned())


def test_a_connection_of_a_failed_operation_is_closed(lab: Lab, row: Vm) -> None:
    async def refused() -> None:
        async with Client(options(lab)) as client:
            with pytest.raises(RefusedError):
                await client.clone(*PAIR, "nobody")
            assert there(lab) == [[], []]
            await client.clone(*PAIR, "row")

    asyncio.run(refused())


def test_a_connection_that_was_lost_while_idle_is_replaced(lab: Lab, row: Vm) -> None:
    async def killed() -> None:
        async with Client(options(lab)) as client:
            await client.plan(Request(*PAIR, "row"))
            (pid,) = agents(lab, "kc-b")
            kill(lab, "kc-b", pid)
            await client.clone(*PAIR, "row")

    asyncio.run(killed())
    assert_equal(lab, row)


def test_a_connection_that_is_lost_as_it_is_given_back_is_closed(lab: Lab, row: Vm) -> None:
    async def killed() -> None:
        async with Client(options(lab)) as client:
            async with client._pool.lease("kc-b") as [(host, _)]:
                (pid,) = agents(lab, "kc-b")
                kill(lab, "kc-b", pid)
                with pytest.raises(Exception, match="was lost"):
                    await host.link.wait_lost()
            assert not client._pool._idle.get("kc-b")

    asyncio.run(killed())


def test_an_idle_connection_that_does_not_answer_is_replaced(
    lab: Lab, row: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_ANSWER_SECONDS", 0.5)

    async def stopped() -> None:
        async with Client(options(lab)) as client:
            await client.plan(Request(*PAIR, "row"))
            (pid,) = agents(lab, "kc-b")
            kill(lab, "kc-b", pid, signal.SIGSTOP)
            await client.clone(*PAIR, "row")
            kill(lab, "kc-b", pid)

    asyncio.run(stopped())
    assert_equal(lab, row)


def test_an_agent_that_does_not_answer_is_not_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_ANSWER_SECONDS", 0.5)

    async def stopped() -> None:
        async with Client(options(lab)) as client:
            async with client._pool.lease("kc-b"):
                (pid,) = agents(lab, "kc-b")
                kill(lab, "kc-b", pid, signal.SIGSTOP)
            assert not client._pool._idle.get("kc-b")
            kill(lab, "kc-b", pid)

    asyncio.run(stopped())


def test_libvirt_is_closed_when_the_other_host_cannot_be_reached(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "ssh_config"
    slow = 'Host kc-never\n  ProxyCommand sh -c "sleep 4"\n  StrictHostKeyChecking no\n'
    config.write_text(slow + lab.ssh_config.read_text())
    opened: list[LibvirtHost] = []
    closed: list[LibvirtHost] = []
    open_libvirt, close = connections.open_libvirt, LibvirtHost.close

    async def opening(host: Host) -> LibvirtHost:
        opened.append(await open_libvirt(host))
        return opened[-1]

    async def closing(libvirt: LibvirtHost) -> None:
        closed.append(libvirt)
        await close(libvirt)

    monkeypatch.setattr(connections, "open_libvirt", opening)
    monkeypatch.setattr(LibvirtHost, "close", closing)

    async def unreachable() -> None:
        async with Client(SshOptions(config=config, retries=0)) as client:
            with pytest.raises(ConnectError):
                await client.plan(Request("kc-never", "kc-b", "row"))

    asyncio.run(unreachable())
    assert len(opened) == 1
    assert closed == opened


def test_who_waits_keeps_its_connections_and_its_route(lab: Lab, row: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    connects = Counter(monkeypatch, Host, "connect")
    routes = Counter(monkeypatch, survey, "find_route")
    events: list[Event] = []

    async def waiting() -> bool:
        asked = CloneOptions(retry=Retry.IDEMPOTENT, wait=True)
        async with Client(options(lab)) as client:
            return (await client.clone(*PAIR, "row", asked, on_event=events.append)).changed

    with running(lab, *PAIR, "row", "--bandwidth-limit", "256K"):
        wait_for_copy(lab, written=1 << 18)
        assert asyncio.run(waiting()) is False
    assert any(isinstance(event, Note) and event.text.startswith("waiting") for event in events)
    assert (connects.count, routes.count) == (2, 1)
