"""The Python API: a Client that knows how to connect, and one coroutine for each thing it can do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt

from kvm_clone import definition, domains, runtime, ssh
from kvm_clone.errors import ConnectError, KvmCloneError, TransferError
from kvm_clone.facts import Facts
from kvm_clone.findings import Finding, Severity
from kvm_clone.host import Host
from kvm_clone.inspect import inspect
from kvm_clone.options import CloneOptions
from kvm_clone.plan import Identity, Plan, make_plan
from kvm_clone.progress import Event, Note, OnEvent, Phase, PhaseStarted
from kvm_clone.run import Outcome, Run
from kvm_clone.tasks import together


@dataclass(frozen=True)
class DiskResult:
    """One copied disk; sizes in bytes, `data` is the content that was sent."""

    target: str
    source: str
    destination: str
    format: str
    virtual_size: int
    data: int


@dataclass(frozen=True)
class CloneResult:
    """A finished clone. `changed` tells it from one that was there already; times in seconds, sizes in bytes."""

    operation: str
    source: str
    destination: str
    vm: str
    name: str
    uuid: str
    changed: bool
    verified: bool
    route: str
    route_reason: str
    disks: tuple[DiskResult, ...]
    bytes_sent: int
    seconds: float
    copy_seconds: float
    prove_seconds: float
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class HostListing:
    """What one host answered to `list_vms`: its VMs, or the error that kept it from answering."""

    host: str
    vms: tuple[domains.Listed, ...] = field(default_factory=tuple)
    error: KvmCloneError | None = None


def _ignore(event: Event) -> None:
    """The watcher of an operation that nobody watches."""


class Client:
    """Clones VMs between hosts. Use as an asynchronous context manager; operations may run side by side.

        async with Client() as client:
            result = await client.clone("kc-a", "kc-b", "web", CloneOptions(new_name="web-2"))

    `interactive` lets ssh ask for a passphrase on the terminal.
    """

    def __init__(self, ssh_options: ssh.SshOptions | None = None, *, interactive: bool = False) -> None:
        self._ssh = ssh_options or ssh.SshOptions()
        self._interactive = interactive
        self._directory: Path | None = None

    async def __aenter__(self) -> Self:
        self._directory = runtime.make_directory()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _host(self, text: str) -> Host:
        if self._directory is None:
            raise RuntimeError("use the Client as an asynchronous context manager")
        return Host(ssh.parse_address(text), self._ssh, self._directory, interactive=self._interactive)

    async def clone(
        self,
        source: str,
        destination: str,
        vm: str,
        options: CloneOptions | None = None,
        *,
        on_event: OnEvent = _ignore,
    ) -> CloneResult:
        """Clone the VM from the source host to the destination host.

        Raises KvmCloneError and its kinds; whatever it raises, the destination is as it was, or the error's remedy
        says what could not be undone. Cancelling the task rolls back as well.
        """
        options = options or CloneOptions()
        started = time.monotonic()
        try:
            async with asyncio.timeout(options.timeout):
                plan, outcome = await self._clone(source, destination, vm, options, on_event)
        except TimeoutError as error:
            raise TransferError(
                f"the clone was not done within {options.timeout:g} s and was rolled back",
                subject=vm,
                remedy="allow more time with --timeout",
            ) from error
        return _result(plan, outcome, source, destination, vm, time.monotonic() - started)

    async def _clone(
        self, source: str, destination: str, vm: str, options: CloneOptions, on_event: OnEvent
    ) -> tuple[Plan, Outcome]:
        on_event(PhaseStarted(Phase.CONNECT, f"connecting to {source} and {destination}"))
        async with self._connected(source, destination) as ((from_host, from_libvirt), (to_host, to_libvirt)):
            on_event(PhaseStarted(Phase.INSPECT, f"looking at {vm} and at both hosts"))
            facts = await inspect(from_host, from_libvirt, to_host, to_libvirt, vm, options.route)
            plan = make_plan(facts, options, _identity(facts))
            for finding in plan.findings:
                if finding.severity is not Severity.BLOCKING:
                    on_event(Note(finding.text, warning=finding.severity is Severity.WARNING))
            refusal = plan.refusal()
            if refusal is not None:
                raise refusal
            async with contextlib.AsyncExitStack() as later:

                async def reconnect() -> Host:
                    host = self._host(destination)
                    later.push_async_callback(host.close)
                    await host.connect()
                    return host

                run = Run(plan, from_host, to_host, to_libvirt, reconnect, on_event)
                return plan, await run.run()

    @contextlib.asynccontextmanager
    async def _connected(self, *names: str) -> AsyncIterator[list[tuple[Host, libvirt.virConnect]]]:
        """The hosts with their libvirt connections, opened side by side and closed in the end."""
        hosts = [self._host(name) for name in names]
        connections: list[libvirt.virConnect] = []
        try:
            connections = await together(*(_open(host) for host in hosts))
            yield list(zip(hosts, connections, strict=True))
        finally:
            for connection in connections:
                with contextlib.suppress(libvirt.libvirtError):  # its tunnel may be gone
                    await asyncio.to_thread(connection.close)
            await asyncio.gather(*(host.close() for host in hosts))

    async def list_vms(self, hosts: Sequence[str]) -> list[HostListing]:
        """The VMs of every host, in the order given. A host that cannot be asked has its error in its place."""
        for host in hosts:
            ssh.parse_address(host)
        return list(await asyncio.gather(*(self._list_host(host) for host in hosts)))

    async def _list_host(self, name: str) -> HostListing:
        try:
            async with self._connected(name) as [(_, connection)]:
                return HostListing(name, tuple(await asyncio.to_thread(domains.list_all, connection, name)))
        except KvmCloneError as error:
            return HostListing(name, error=error)


async def _open(host: Host) -> libvirt.virConnect:
    await host.connect()
    uri = await host.libvirt_uri()
    try:
        return await asyncio.to_thread(domains.connect, uri, host.name)
    except TransferError as error:
        raise ConnectError(str(error), subject=host.name, remedy=error.remedy) from error


def _identity(facts: Facts) -> Identity:
    source = random.SystemRandom()
    macs = tuple(definition.new_mac(random.Random(source.getrandbits(64))) for _ in facts.source.xml.macs)
    return Identity(operation=uuid.uuid4().hex[:12], uuid=str(uuid.uuid4()), macs=macs)


def _result(plan: Plan, outcome: Outcome, source: str, destination: str, vm: str, seconds: float) -> CloneResult:
    disks = tuple(
        DiskResult(
            disk.target,
            disk.image.path,
            disk.final,
            disk.image.format,
            disk.image.virtual_size,
            disk.image.data,
        )
        for disk in plan.disks
    )
    return CloneResult(
        operation=plan.identity.operation,
        source=source,
        destination=destination,
        vm=vm,
        name=plan.name,
        uuid=plan.facts.source.xml.uuid if plan.options.preserve_uuid else plan.identity.uuid,
        changed=True,
        verified=outcome.verified,
        route=plan.route.value,
        route_reason=plan.route_reason,
        disks=disks,
        bytes_sent=outcome.sent,
        seconds=seconds,
        copy_seconds=outcome.copy_seconds,
        prove_seconds=outcome.prove_seconds,
        findings=plan.findings,
        warnings=tuple(outcome.warnings),
    )
