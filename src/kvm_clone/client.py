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

from kvm_clone import socket_directory
from kvm_clone.definition import rewrite
from kvm_clone.errors import (
    ConnectError,
    InterruptedTransferError,
    KvmCloneError,
    LockedError,
    RefusedError,
    TransferError,
)
from kvm_clone.execution import measure, trial
from kvm_clone.execution.run import Outcome, Run
from kvm_clone.execution.watching import watched
from kvm_clone.findings import Severity
from kvm_clone.hosts import connections, domains, live, ssh, vms
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.survey import inspect
from kvm_clone.options import CloneOptions, Options, Retry, SyncOptions, Verify
from kvm_clone.planning.consent import Consent, consent_of
from kvm_clone.planning.decide import Action
from kvm_clone.planning.facts import Facts
from kvm_clone.planning.live_checks import stale_checkpoints
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.plan import Identity, Plan, make_plan
from kvm_clone.planning.sync import make_sync_plan
from kvm_clone.progress import Event, Note, OnEvent, Phase, PhaseStarted
from kvm_clone.results import DiskResult, HostListing, Result, StagedListing
from kvm_clone.tasks import together, undisturbed
from kvm_clone.upkeep import leftovers, operation_log


@dataclass(frozen=True)
class Request:
    """What is to be cloned, or synced, between which hosts, and how."""

    source: str
    destination: str
    vm: str
    options: Options = field(default_factory=CloneOptions)


_FIRST_DELAY_SECONDS = 1.0
_WAIT_SECONDS = 2.0


@dataclass
class _Watched:
    """A request, who hears of it, and the facts that are expected at its first try, if it is a saved plan's."""

    request: Request
    on_event: OnEvent
    expected: str | None = None
    saved: bool = False
    consent: Consent | None = None

    def agreed(self, plan: Plan) -> None:
        """Raises DomainExistsError when a plan touches what was not there when the command's first plan was made."""
        if self.consent is None:
            self.consent = consent_of(plan)
        refusal = self.consent.refusal(plan)
        if refusal is not None:
            raise refusal

    def check(self, facts: Facts) -> None:
        """Raises RefusedError when a saved plan rests on other facts."""
        expected, self.expected = self.expected, None  # a dropped connection leaves facts of its own making
        if expected is not None and expected != facts.digest:
            raise RefusedError(
                f"the facts that the plan rests on have changed since it was made: {self.request.vm}",
                subject=self.request.vm,
                remedy="make a new plan with --plan-out",
            )


@dataclass
class _Attempt:
    """The operation whose staged data an attempt has left, None when there is none."""

    kept: str | None = None


@dataclass
class _Tries:
    """How often a dropped connection may still be taken up again. `operation`: what is staged for that, if anything."""

    left: int
    operation: str | None = None
    delay: float = _FIRST_DELAY_SECONDS

    async def again(self, error: TransferError | ConnectError, asked: _Watched) -> None:
        """Wait for the next try. Raises the error when there is none, or nothing to take up."""
        dropped = isinstance(error, ConnectError) or error.interrupted
        if not dropped or not self.operation or self.left <= 0:
            if isinstance(error, ConnectError) and self.operation:
                error = InterruptedTransferError(str(error), subject=error.subject)
            if isinstance(error, TransferError):
                _add_way_on(error, asked, self.operation)
            raise error
        asked.on_event(Note(f"{error}; going on in {self.delay:.0f} s", warning=True))
        await asyncio.sleep(self.delay)
        self.left, self.delay = self.left - 1, self.delay * 2


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
        self._directory = socket_directory.make_directory()
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
                plan, outcome = await self._persist(_Watched(request, hear, expected, expected is not None))
        except TimeoutError as error:
            raise TransferError(
                f"the operation was not done within {request.options.timeout:g} s",
                subject=request.vm,
                remedy="allow more time with --timeout; the same command with --resume goes on with what is kept",
            ) from error
        return _result(plan, outcome, request, time.monotonic() - started)

    async def plan(self, request: Request) -> Plan:
        """Plan a clone or a sync and change nothing anywhere. Raises RefusedError, ConnectError, TransferError."""
        async with self._planned(_Watched(request, _ignore), None) as (plan, _):
            return plan

    async def measure(self, request: Request, *, on_event: OnEvent = _ignore) -> tuple[Plan, dict[str, int | None]]:
        """Plan a sync, and find out how much it would send: bytes by disk, None where only the run can tell.

        Both hosts digest what is compared; nothing is changed. Raises as `plan` does.
        """
        async with watched(on_event) as hear, self._planned(_Watched(request, hear), None) as (plan, hosts):
            return plan, await measure.delta(plan, hosts[0], hosts[1][0], hear)

    async def untrack(self, request: Request) -> list[str]:
        """Remove our checkpoints for the replica that the request names from the source; their names.

        Raises RefusedError, ConnectError, TransferError.
        """
        async with self._planned(_Watched(request, _ignore), None) as (plan, hosts):
            host, connection = hosts[0]
            names = stale_checkpoints(plan.facts, plan.name, since="")
            with domains.failing_as(f"deleting checkpoints on {host.name}", request.vm):
                return await asyncio.to_thread(live.delete_checkpoints, connection, request.vm, names)

    async def _persist(self, asked: _Watched) -> tuple[Plan, Outcome]:
        """Try, take a dropped connection up again, and wait for others if that is asked for."""
        tries = _Tries(asked.request.options.retries)
        while True:
            attempt = _Attempt()
            try:
                plan, outcome = await self._attempt(asked, tries.operation, attempt)
            except LockedError as error:
                if not asked.request.options.wait:
                    raise
                asked.on_event(Note(f"waiting: {error}"))
                await asyncio.sleep(_WAIT_SECONDS)
            except (TransferError, ConnectError) as error:
                tries.operation = attempt.kept or tries.operation
                await tries.again(error, asked)
            else:
                if not _is_only_a_start(plan, asked.request):
                    return plan, outcome
                if plan.decision.action is Action.FINISH:
                    asked.consent = None  # what is there now is what we have finished

    async def _attempt(self, asked: _Watched, own_operation: str | None, attempt: _Attempt) -> tuple[Plan, Outcome]:
        async with self._planned(asked, own_operation) as (plan, hosts):
            for finding in plan.findings:
                if finding.severity is not Severity.BLOCKING:
                    asked.on_event(Note(finding.text, warning=finding.severity is Severity.WARNING))
            refusal = plan.refusal()
            if refusal is not None:
                raise refusal
            asked.agreed(plan)
            async with contextlib.AsyncExitStack() as later:

                async def reconnect() -> Host:
                    host = self._host(asked.request.destination)
                    later.push_async_callback(host.close)
                    await host.connect()
                    return host

                log = _log(asked.request, plan)
                run = Run(plan, hosts[0], hosts[1], reconnect, asked.on_event, log.step)
                try:
                    outcome = await run.run()
                except BaseException as error:
                    attempt.kept = plan.identity.operation if run.kept else None
                    log.end(
                        operation_log.KEPT if run.kept else operation_log.FAILED, str(error) or type(error).__name__
                    )
                    raise
                log.end(operation_log.DONE)
                return plan, outcome

    @contextlib.asynccontextmanager
    async def _planned(
        self, asked: _Watched, own_operation: str | None
    ) -> AsyncIterator[tuple[Plan, list[tuple[Host, libvirt.virConnect]]]]:
        """The plan, and both hosts connected."""
        request = asked.request
        asked.on_event(PhaseStarted(Phase.CONNECT, f"connecting to {request.source} and {request.destination}"))
        async with self._connected(request.source, request.destination) as hosts:
            (from_host, from_libvirt), (to_host, to_libvirt) = hosts
            asked.on_event(PhaseStarted(Phase.INSPECT, f"looking at {request.vm} and at both hosts"))
            facts = await inspect(from_host, from_libvirt, to_host, to_libvirt, request.vm, request.options)
            asked.check(facts)
            yield await trial.judged(_plan(facts, request.options, own_operation), to_libvirt), hosts

    @contextlib.asynccontextmanager
    async def _connected(self, *names: str) -> AsyncIterator[list[tuple[Host, libvirt.virConnect]]]:
        """The hosts with their libvirt connections, opened side by side and closed in the end."""
        hosts = [self._host(name) for name in names]
        opened: list[libvirt.virConnect] = []
        try:
            opened = await together(*(connections.open_libvirt(host) for host in hosts))
            yield list(zip(hosts, opened, strict=True))
        finally:
            await undisturbed(_close(hosts, opened))

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
            async with self._connected(name) as [(host, connection)]:
                found = await leftovers.find(host, connection)
                jobs = await leftovers.abandoned_jobs(host, connection)
                names = tuple(job.name for job in jobs)
                if dry_run:
                    return StagedListing(name, tuple(data for data in found if data.age >= older_than), jobs=names)
                wanted = [data for data in found if data.age >= older_than and not data.active]
                done = dict.fromkeys(await leftovers.sweep(host, connection), "removed")
                errors: list[KvmCloneError] = []
                for data in wanted:
                    try:
                        done[data.path] = await leftovers.remove(host, connection, data)
                    except KvmCloneError as error:
                        errors.append(error)
                for job in jobs:
                    try:
                        await leftovers.end_job(host, connection, job)
                    except KvmCloneError as error:
                        errors.append(error)
                return StagedListing(name, tuple(wanted), done, tuple(errors), names)
        except KvmCloneError as error:
            return StagedListing(name, errors=(error,))

    async def cleanup_vm(self, host: str, name: str, *, stop: bool = False) -> list[str]:
        """Remove a VM with everything libvirt keeps about it and its own writable disks; what was removed.

        A VM that is not there is a success. What is shared, read-only, a backing file, or used by another VM stays.
        Raises RefusedError when it runs and `stop` is not given, ConnectError, TransferError.
        """
        async with self._connected(host) as [(connected, _)], connections.holding(connected, name) as fenced:
            return list((await vms.cleanup(connected, fenced, name, stop=stop)).removed)

    async def _list_host(self, name: str) -> HostListing:
        try:
            async with self._connected(name) as [(_, connection)]:
                return HostListing(name, tuple(await asyncio.to_thread(domains.list_all, connection, name)))
        except KvmCloneError as error:
            return HostListing(name, error=error)


async def _close(hosts: Sequence[Host], opened: Sequence[libvirt.virConnect]) -> None:
    for connection in opened:
        await connections.close(connection)
    await asyncio.gather(*(host.close() for host in hosts))


def _log(request: Request, plan: Plan) -> operation_log.OperationLog:
    return operation_log.OperationLog(
        plan.identity.operation,
        command="sync" if isinstance(request.options, SyncOptions) else "clone",
        source=request.source,
        destination=request.destination,
        vm=request.vm,
        name=plan.name,
        action=plan.decision.action,
    )


def _plan(facts: Facts, options: Options, own_operation: str | None) -> Plan:
    if isinstance(options, SyncOptions):
        return make_sync_plan(facts, options, _identity(facts), own_operation)
    assert isinstance(options, CloneOptions)
    return make_plan(facts, options, _identity(facts), own_operation)


def _is_only_a_start(plan: Plan, request: Request) -> bool:
    """Whether what was done is less than what was asked for, so that another plan has to follow.

    Either an earlier run had committed, and was tidied up; or a replica was stopped to be overwritten.
    """
    if plan.decision.action is Action.FINISH and not plan.continues:
        enough = (Retry.RESUME,) if isinstance(request.options, SyncOptions) else (Retry.NONE, Retry.RESUME)
        return request.options.retry not in enough
    return plan.decision.action is Action.STOP_REPLICA


def _add_way_on(error: TransferError, asked: _Watched, kept: str | None) -> None:
    """Say how to go on with what is kept, and how to drop it."""
    if kept and error.interrupted:
        there = asked.request.destination
        same = "the command that made the plan, without --plan-out," if asked.saved else "the same command"
        way = f"what was copied is kept on {there}: run {same} with --resume or --idempotent"
        error.remedy = f"{way}; or drop it: kvm-clone cleanup {there}"


def _identity(facts: Facts) -> Identity:
    source = random.SystemRandom()
    macs = tuple(rewrite.new_mac(random.Random(source.getrandbits(64))) for _ in facts.source.xml.macs)
    return Identity(uuid.uuid4().hex[:12], str(uuid.uuid4()), macs, genid=str(uuid.uuid4()))


def _result(plan: Plan, outcome: Outcome, request: Request, seconds: float) -> Result:
    totals, taken = outcome.totals, outcome.taken
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
        route=plan.route.value,
        route_reason=plan.route_reason,
        disks=tuple(_disk_result(disk, outcome) for disk in plan.disks),
        bytes_sent=totals.sent,
        bytes_resent=totals.resent,
        bytes_reused=totals.reused,
        bytes_compared=totals.compared,
        consistency=taken.consistency.value,
        frozen_seconds=taken.frozen,
        scratch_bytes=taken.scratch,
        checkpoint=taken.checkpoint,
        hint=taken.hint or plan.no_bitmap_reason,
        seconds=seconds,
        copy_seconds=totals.copy_seconds,
        prove_seconds=totals.prove_seconds,
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
