"""The Python API: a Client that knows how to connect, and one coroutine for each thing it can do."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from kvm_clone import socket_directory
from kvm_clone.errors import (
    KvmCloneError,
    TransferError,
)
from kvm_clone.execution import measure
from kvm_clone.execution.driver import Driver
from kvm_clone.execution.request import Request
from kvm_clone.execution.run import Outcome
from kvm_clone.execution.watching import watched
from kvm_clone.gather import together
from kvm_clone.hosts import connections, ssh, vms
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.pool import Pool
from kvm_clone.options import CloneOptions, SyncOptions, Verify
from kvm_clone.planning.decide import Action
from kvm_clone.planning.live_checks import stale_checkpoints
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.plan import Plan
from kvm_clone.progress import Event, OnEvent
from kvm_clone.results import DiskResult, HostListing, Result, StagedListing, Transfer
from kvm_clone.upkeep import leftovers, operation_log

__all__ = ["Client", "Request"]


def _ignore(event: Event) -> None:
    """The watcher of an operation that nobody watches."""


class Client:
    """Clones VMs between hosts. Use as an asynchronous context manager; operations may run side by side.

    Connections stay open for the next operation until the context ends.

        async with Client() as client:
            result = await client.clone("kc-a", "kc-b", "web", CloneOptions(new_name="web-2"))

    `interactive` lets ssh ask for a passphrase on the terminal.
    """

    def __init__(self, ssh_options: ssh.SshOptions | None = None, *, interactive: bool = False) -> None:
        self._ssh = ssh_options or ssh.SshOptions()
        self._interactive = interactive
        self._directory: Path | None = None
        self._pool = Pool(self._host)

    async def __aenter__(self) -> Self:
        self._directory = socket_directory.make_directory()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _host(self, text: str) -> Host:
        if self._directory is None:
            raise RuntimeError("use the Client as an asynchronous context manager")
        return Host(ssh.parse_address(text), self._ssh, self._directory, interactive=self._interactive)

    def _driver(self, request: Request, on_event: OnEvent, expected: str | None = None) -> Driver:
        return Driver(self._pool, self._host, request, on_event, expected)

    async def clone(
        self,
        source: str,
        destination: str,
        vm: str,
        options: CloneOptions | None = None,
        *,
        on_event: OnEvent = _ignore,
    ) -> Result:
        """Clone the VM from the source host to the destination host.

        Raises KvmCloneError and its kinds; whatever it raises, the destination's VMs are as they were. After an
        interruption, which cancelling the task is too, what was copied is kept for `Retry.RESUME`, unless
        `keep_partial` is off; any other failure is rolled back, or the error's remedy says what could not be undone.
        """
        return await self.run(Request(source, destination, vm, options or CloneOptions()), on_event=on_event)

    async def sync(
        self,
        source: str,
        destination: str,
        vm: str,
        options: SyncOptions | None = None,
        *,
        on_event: OnEvent = _ignore,
    ) -> Result:
        """Bring the destination's replica of the VM to the source's state, sending what differs.

        Raises KvmCloneError and its kinds; whatever it raises, the replica is as it was, or new and whole. What was
        interrupted is kept or rolled back as for `clone`.
        """
        return await self.run(Request(source, destination, vm, options or SyncOptions()), on_event=on_event)

    async def run(self, request: Request, *, on_event: OnEvent = _ignore, expected: str | None = None) -> Result:
        """Clone or sync as requested.

        `expected` is the digest of the facts that a saved plan rests on: others are refused.
        """
        started = time.monotonic()
        try:
            async with watched(on_event) as hear, asyncio.timeout(request.options.timeout):
                plan, outcome = await self._driver(request, hear, expected).run(_Log)
        except TimeoutError as error:
            raise TransferError(
                f"the operation was not done within {request.options.timeout:g} s",
                subject=request.vm,
                remedy="allow more time with --timeout; the same command with --resume continues with what is kept",
            ) from error
        return _result(plan, outcome, request, time.monotonic() - started)

    async def plan(self, request: Request) -> Plan:
        """Plan a clone or a sync and change nothing anywhere. Raises RefusedError, ConnectError, TransferError."""
        async with self._driver(request, _ignore).planned() as (plan, _):
            return plan

    async def measure(self, request: Request, *, on_event: OnEvent = _ignore) -> tuple[Plan, dict[str, int | None]]:
        """Plan a sync, and find out how much it would send: bytes by disk, None where only the run can tell.

        Both hosts digest what is compared; nothing is changed. Raises as `plan` does.
        """
        async with watched(on_event) as hear, self._driver(request, hear).planned() as (plan, hosts):
            return plan, await measure.delta(plan, hosts[0], hosts[1][0], hear)

    async def untrack(self, request: Request) -> list[str]:
        """Remove our checkpoints for the replica that the request names from the source; their names.

        Raises RefusedError, ConnectError, TransferError.
        """
        async with self._driver(request, _ignore).planned() as (plan, hosts):
            _, libvirt = hosts[0]
            return await libvirt.delete_checkpoints(request.vm, stale_checkpoints(plan.facts, plan.name, since=""))

    async def list_vms(self, hosts: Sequence[str]) -> list[HostListing]:
        """The VMs of every host, in the order given. A host that cannot be asked has its error in its place."""
        for host in hosts:
            ssh.parse_address(host)
        return await together(*(self._list_host(host) for host in hosts))

    async def staged(self, hosts: Sequence[str]) -> list[StagedListing]:
        """What interrupted and running operations have staged on each host, in the order given."""
        return await self.cleanup(hosts, dry_run=True)

    async def cleanup(
        self, hosts: Sequence[str], *, older_than: float = 0.0, dry_run: bool = False
    ) -> list[StagedListing]:
        """Remove what interrupted operations have staged and left unchanged for `older_than` seconds.

        Nothing without our mark, and nothing of a running operation, is removed. Backup jobs of ours that nobody reads
        any more are ended.
        """
        for host in hosts:
            ssh.parse_address(host)
        return await together(*(self._clean_host(host, older_than, dry_run) for host in hosts))

    async def _clean_host(self, name: str, older_than: float, dry_run: bool) -> StagedListing:
        try:
            async with self._pool.lease(name) as [(host, libvirt)]:
                found = await leftovers.find(host, libvirt, operation_log.directories_at(name))
                jobs = await leftovers.abandoned_jobs(host, libvirt)
                names = tuple(job.name for job in jobs)
                if dry_run:
                    return StagedListing(name, tuple(data for data in found if data.age >= older_than), jobs=names)
                wanted = [data for data in found if data.age >= older_than and not data.active]
                done = dict.fromkeys(await leftovers.sweep(host, libvirt), "removed")
                errors: list[KvmCloneError] = []
                for data in wanted:
                    try:
                        done[data.path] = await leftovers.remove(host, libvirt, data)
                    except KvmCloneError as error:
                        errors.append(error)
                for job in jobs:
                    try:
                        await leftovers.end_job(host, libvirt, job)
                    except KvmCloneError as error:
                        errors.append(error)
                active = tuple(data for data in found if data.active)
                return StagedListing(name, tuple(wanted), done, tuple(errors), names, active)
        except KvmCloneError as error:
            return StagedListing(name, errors=(error,))

    async def cleanup_vm(self, host: str, name: str, *, stop: bool = False) -> list[str]:
        """Remove a VM with everything libvirt keeps about it and its own writable disks; what was removed.

        A VM that is not there is a success. What is shared, read-only, a backing file, or used by another VM stays.
        Raises RefusedError when it runs and `stop` is not given, ConnectError, TransferError.
        """
        async with self._pool.lease(host) as [(connected, _)], connections.holding(connected, name) as fenced:
            return list((await vms.cleanup(connected, fenced, name, stop=stop)).removed)

    async def _list_host(self, name: str) -> HostListing:
        try:
            async with self._pool.lease(name) as [(_, libvirt)]:
                return HostListing(name, tuple(await libvirt.list_all()))
        except KvmCloneError as error:
            return HostListing(name, error=error)


class _Log:
    """The log of one attempt, for the driver."""

    def __init__(self, request: Request, plan: Plan) -> None:
        self._log = operation_log.OperationLog(
            plan.identity.operation,
            command="sync" if isinstance(request.options, SyncOptions) else "clone",
            source=request.source,
            destination=request.destination,
            vm=request.vm,
            name=plan.name,
            action=plan.decision.action,
            directories=operation_log.joined(plan.facts.destination.directories),
        )
        self.step = self._log.step

    def failed(self, text: str, *, kept: bool) -> None:
        self._log.end(operation_log.KEPT if kept else operation_log.FAILED, text)

    def done(self) -> None:
        self._log.end(operation_log.DONE)


def _result(plan: Plan, outcome: Outcome, request: Request, seconds: float) -> Result:
    totals, point = outcome.totals, outcome.point_in_time
    return Result(
        operation=plan.identity.operation,
        source=request.source,
        destination=request.destination,
        vm=request.vm,
        name=plan.name,
        uuid=plan.uuid,
        changed=plan.continues or plan.decision.action not in (Action.NOTHING, Action.FINISH),
        verified=totals.proof is not Verify.OFF,
        proof=totals.proof.value,
        disks=tuple(_disk_result(disk, outcome) for disk in plan.disks),
        transfer=Transfer(
            route=plan.route.value,
            route_reason=plan.route_reason,
            bytes_sent=totals.sent,
            bytes_resent=totals.resent,
            bytes_reused=totals.reused,
            bytes_compared=totals.compared,
            copy_seconds=totals.copy_seconds,
            prove_seconds=totals.prove_seconds,
        ),
        point_in_time=replace(point, no_bitmap_reason=point.no_bitmap_reason or plan.no_bitmap_reason),
        seconds=seconds,
        findings=plan.findings,
        warnings=outcome.warnings,
        removed=outcome.removed,
    )


def _disk_result(disk: PlannedDisk, outcome: Outcome) -> DiskResult:
    delta = "bitmap" if disk.target in outcome.hinted else "digests"
    return DiskResult(
        disk.target,
        disk.image.path,
        disk.final if disk.below is None else disk.below.path,
        disk.image.format if disk.base is None else disk.base.format,
        disk.image.virtual_size,
        disk.image.data,
        outcome.totals.sent_by_disk.get(disk.target, 0),
        "whole" if disk.base is None else delta,
    )
