"""One operation from its request to its end: attempts, reconnection, retries, and waiting for others."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from kvm_clone.definition import rewrite
from kvm_clone.errors import ConnectError, InterruptedTransferError, LockedError, RefusedError, TransferError
from kvm_clone.execution import trial
from kvm_clone.execution.request import Request
from kvm_clone.execution.rollback import Reconnect
from kvm_clone.execution.run import Outcome, Run
from kvm_clone.findings import Severity
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.pool import Connected, Pool
from kvm_clone.hosts.survey import inspect
from kvm_clone.options import CloneOptions, Options, Retry, SyncOptions
from kvm_clone.planning.consent import Consent, consent_of
from kvm_clone.planning.decide import Action
from kvm_clone.planning.facts import Facts, RouteFacts
from kvm_clone.planning.plan import Identity, Plan, make_plan
from kvm_clone.planning.sync import make_sync_plan
from kvm_clone.progress import Note, OnEvent, Phase, PhaseStarted

_FIRST_DELAY_SECONDS = 1.0
_WAIT_SECONDS = 2.0


class Log(Protocol):
    """What hears of an attempt's steps and of its end."""

    def step(self, step: str, result: str, seconds: float) -> None:
        """A step was taken, or failed."""

    def failed(self, text: str, *, kept: bool) -> None:
        """The attempt has failed; `kept`: what is staged is there to resume."""

    def done(self) -> None:
        """The attempt has done what it was to do."""


OpenLog = Callable[[Request, Plan], Log]


@dataclass
class Tries:
    """How often a dropped connection may still be taken up again. `operation`: what is staged for that, if anything."""

    left: int
    operation: str | None = None
    delay: float = _FIRST_DELAY_SECONDS


class Driver:
    """Carries one request out.

    `expected`: the digest of the facts that are expected at the first try, if the request is a saved plan's.
    """

    def __init__(
        self,
        pool: Pool,
        make_host: Callable[[str], Host],
        request: Request,
        on_event: OnEvent,
        expected: str | None = None,
    ) -> None:
        self._pool = pool
        self._make_host = make_host
        self._request = request
        self._on_event = on_event
        self._expected = expected
        self._saved = expected is not None
        self._consent: Consent | None = None
        self._route: RouteFacts | None = None
        self._tries = Tries(request.options.retries)

    async def run(self, open_log: OpenLog) -> tuple[Plan, Outcome]:
        """Try, take a dropped connection up again, and wait for others if that is asked for."""
        while True:
            try:
                done = await self._attempt(open_log)
            except LockedError as error:
                await self._wait(error)
            except (TransferError, ConnectError) as error:
                self._route = None
                await self._retry(error)
            else:
                if done is not None and not _is_only_a_start(done[0], self._request):
                    return done
                if done is not None and done[0].decision.action is Action.FINISH:
                    self._consent = None  # what is there now is what we have finished

    @contextlib.asynccontextmanager
    async def planned(self) -> AsyncIterator[tuple[Plan, list[Connected]]]:
        """The plan, and both hosts connected. Raises RefusedError, ConnectError, TransferError."""
        async with self._connected() as hosts:
            yield await self._plan(hosts), hosts

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[Connected]]:
        source, destination = self._request.source, self._request.destination
        self._on_event(PhaseStarted(Phase.CONNECT, f"connecting to {source} and {destination}"))
        async with self._pool.lease(source, destination) as hosts:
            yield hosts

    async def _plan(self, hosts: list[Connected]) -> Plan:
        request = self._request
        (from_host, from_libvirt), (to_host, to_libvirt) = hosts
        self._on_event(PhaseStarted(Phase.INSPECT, f"looking at {request.vm} and at both hosts"))
        facts = await inspect(
            from_host, from_libvirt, to_host, to_libvirt, request.vm, request.options, known_route=self._route
        )
        self._route = facts.route
        self._check_expected(facts)
        return await trial.judged(_made_plan(facts, request.options, self._tries.operation), to_libvirt)

    def _check_expected(self, facts: Facts) -> None:
        """Raises RefusedError when a saved plan rests on other facts."""
        expected, self._expected = self._expected, None  # a dropped connection leaves facts of its own making
        if expected is not None and expected != facts.digest:
            raise RefusedError(
                f"the facts that the plan rests on have changed since it was made: {self._request.vm}",
                subject=self._request.vm,
                remedy="make a new plan with --plan-out",
            )

    async def _attempt(self, open_log: OpenLog) -> tuple[Plan, Outcome] | None:
        """Connect, plan and run; None after waiting for another operation, with connections that can be used again."""
        async with self._connected() as hosts:
            run: Run | None = None
            try:
                plan = await self._plan(hosts)
                self._check(plan)
                async with contextlib.AsyncExitStack() as later:
                    log = open_log(self._request, plan)
                    run = Run(plan, hosts[0], hosts[1], self._reconnecting(later), self._on_event, log.step)
                    return plan, await self._run(run, plan, log)
            except LockedError as error:
                if not self._request.options.wait or (run is not None and run.has_written):
                    raise
                locked = error
        await self._wait(locked)
        return None

    def _check(self, plan: Plan) -> None:
        """Report the plan's findings.

        Raises its refusal, and DomainExistsError when it touches what was not there when the first plan was made.
        """
        for finding in plan.findings:
            if finding.severity is not Severity.BLOCKING:
                self._on_event(Note(finding.text, warning=finding.severity is Severity.WARNING))
        refusal = plan.refusal()
        if refusal is not None:
            raise refusal
        if self._consent is None:
            self._consent = consent_of(plan)
        refusal = self._consent.refusal(plan)
        if refusal is not None:
            raise refusal

    def _reconnecting(self, later: contextlib.AsyncExitStack) -> Reconnect:
        async def reconnect() -> Host:
            host = self._make_host(self._request.destination)
            later.push_async_callback(host.close)
            await host.connect()
            return host

        return reconnect

    async def _run(self, run: Run, plan: Plan, log: Log) -> Outcome:
        try:
            outcome = await run.run()
        except BaseException as error:
            if run.kept:
                self._tries.operation = plan.identity.operation
            log.failed(str(error) or type(error).__name__, kept=run.kept)
            raise
        log.done()
        return outcome

    async def _wait(self, error: LockedError) -> None:
        """Wait for another operation to end. Raises the error where that is not asked for."""
        if not self._request.options.wait:
            raise error
        self._on_event(Note(f"waiting: {error}"))
        await asyncio.sleep(_WAIT_SECONDS)

    async def _retry(self, error: TransferError | ConnectError) -> None:
        """Wait for the next try. Raises the error when there is none, or nothing to take up."""
        tries = self._tries
        dropped = isinstance(error, ConnectError) or error.interrupted
        if not dropped or not tries.operation or tries.left <= 0:
            if isinstance(error, ConnectError) and tries.operation:
                error = InterruptedTransferError(str(error), subject=error.subject)
            if isinstance(error, TransferError):
                self._add_way_on(error)
            raise error
        self._on_event(Note(f"{error}; going on in {tries.delay:.0f} s", warning=True))
        await asyncio.sleep(tries.delay)
        tries.left, tries.delay = tries.left - 1, tries.delay * 2

    def _add_way_on(self, error: TransferError) -> None:
        """Say how to resume what is kept, and how to discard it."""
        if self._tries.operation and error.interrupted:
            there = self._request.destination
            same = "the command that made the plan, without --plan-out," if self._saved else "the same command"
            way = f"what was copied is kept on {there}: run {same} with --resume or --idempotent"
            error.remedy = f"{way}; or discard it: kvm-clone cleanup {there}"


def _made_plan(facts: Facts, options: Options, own_operation: str | None) -> Plan:
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


def _identity(facts: Facts) -> Identity:
    source = random.SystemRandom()
    macs = tuple(rewrite.new_mac(random.Random(source.getrandbits(64))) for _ in facts.source.xml.macs)
    return Identity(uuid.uuid4().hex[:12], str(uuid.uuid4()), macs, genid=str(uuid.uuid4()))
