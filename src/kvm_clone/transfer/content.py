"""The disks' content: copied, compared, resumed and proven."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from kvm_clone.agent.staging import records
from kvm_clone.errors import VerificationError
from kvm_clone.hosts.host import Host
from kvm_clone.options import TransferOptions, Verify
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.progress import DiskProgress, OnEvent, Phase
from kvm_clone.tasks import together, undisturbed
from kvm_clone.transfer import room, transport
from kvm_clone.transfer.compare import Ranges, Side, aligned, common, complement, differing, total, union, whole_blocks

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Bytes of content: `sent` in this run, of them `resent` because they differed; `reused` from an earlier one.

    `sent_by_disk`: of the copy, by the disk's target. `compared`: bytes whose digests were compared to find what
    differs. `proof`: how much of the result was proven equal.
    """

    sent: int = 0
    resent: int = 0
    reused: int = 0
    compared: int = 0
    sent_by_disk: dict[str, int] = field(default_factory=dict)
    copy_seconds: float = 0.0
    prove_seconds: float = 0.0
    proof: Verify = Verify.OFF


@dataclass(frozen=True)
class Origin:
    """Where a disk's content is read at the source. `hint`: what a dirty bitmap names, None without one."""

    path: str
    format: str
    hint: Ranges | None = None


@dataclass(frozen=True)
class Work:
    """What is to be sent of one disk. `ranges` None is the whole disk, onto an image known to be all zeros."""

    disk: PlannedDisk
    origin: Origin
    part: str
    ranges: Ranges | None = None
    durable: Ranges = ()
    left: int = 0

    @property
    def job(self) -> transport.Job:
        """As the data path takes it."""
        sending = transport.End(self.origin.path, self.origin.format)
        receiving = transport.End(self.part, self.disk.format)
        return transport.Job(sending, receiving, self.ranges is None, self.ranges, self.durable)


class Prepared:
    """A stream that is being set up in the background; an asynchronous context manager like the stream's own."""

    def __init__(self, opening: contextlib.AbstractAsyncContextManager[transport.Stream]) -> None:
        self._opening = opening
        self._task = asyncio.create_task(opening.__aenter__())

    async def is_good(self) -> bool:
        """Whether it is there and waits for its orders. What failed in the background fails again when it matters."""
        await asyncio.wait([self._task])
        return not self._task.cancelled() and self._task.exception() is None and self._task.result().fresh

    async def close(self) -> None:
        """End it, ready or not."""
        await undisturbed(self._close())

    async def _close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and self._task.exception() is None:
            await self._opening.__aexit__(None, None, None)

    async def __aenter__(self) -> transport.Stream:
        return self._task.result()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._opening.__aexit__(kind, error, trace)


@dataclass
class Content:
    """Moves and proves content between two hosts. `vm`: the destination's."""

    source: Host
    destination: Host
    vm: str
    transfer: TransferOptions
    on_event: OnEvent
    totals: Totals = field(default_factory=Totals)
    origins: dict[str, Origin] = field(default_factory=dict)
    _sent: dict[str, Ranges] = field(default_factory=dict)
    _prepared: Prepared | None = None

    def origin(self, disk: PlannedDisk) -> Origin:
        """Where the disk is read: the image itself, unless a backup job offers it."""
        return self.origins.get(disk.target, Origin(disk.image.path, disk.image.format))

    async def copy(self, disks: Sequence[tuple[PlannedDisk, str]]) -> None:
        """Bring every (disk, staged path) to the source's content, sending what is not there yet.

        Raises TransferError and its kinds.
        """
        started = time.monotonic()
        work = await self._each(disks, self._work)
        await self._check_room(work)
        await self._send([one for one in work if one.ranges is None or one.ranges])
        self.totals.copy_seconds = time.monotonic() - started
        for disk, _ in disks:
            await self._note(records.COPIED, disk=disk.target, bytes=disk.image.data)

    async def _check_room(self, work: Sequence[Work]) -> None:
        updates = [
            room.Update(one.disk, (one.origin.path, one.origin.format), one.part, one.ranges)
            for one in work
            if one.disk.base is not None and one.ranges
        ]
        await room.check(self.source, self.destination, updates)

    async def _work(self, disk: PlannedDisk, part: str) -> Work:
        """What is left to do for one disk."""
        origin = self.origin(disk)
        if disk.base is not None:
            ranges = await self._delta(disk, part)
            self._sent[disk.target] = ranges
            if disk.staged is not None and disk.below is not None:
                await self._count_kept(disk, part, ranges)
            return Work(disk, origin, part, ranges, left=total(ranges))
        if disk.staged is not None:
            return await self._resumed(disk, part)
        return Work(disk, origin, part, left=disk.image.data)

    async def _delta(self, disk: PlannedDisk, part: str) -> Ranges:
        """Where an overlay on an older state differs from the source: by a bitmap, else by comparing everything."""
        hint = self.origin(disk).hint
        if hint is not None and self.is_hinted(disk):
            doubtful = await self._without_a_bit(disk, part)
            return union(hint, await self._differing(disk, part, disk.format, doubtful, Phase.COMPARE))
        return await self._differing(disk, part, disk.format, _whole(disk), Phase.COMPARE)

    async def _count_kept(self, disk: PlannedDisk, part: str, ranges: Ranges) -> None:
        """Count what an interrupted attempt has brought into the overlay; `ranges` is what remains to be sent."""

        async def held(ranges: Ranges) -> int:
            return await self.destination.agent.data_in(part, disk.format, ranges, own=True)

        everything, again = await together(held(_whole(disk)), held(ranges))
        self.totals.resent += again
        self.totals.reused += everything - again

    async def _without_a_bit(self, disk: PlannedDisk, part: str) -> Ranges:
        """Where the source is known to be zero and the replica is not.

        QEMU sets no bit for what an image loses when it is made smaller, nor when it then grows again.
        """
        origin = self.origin(disk)
        zero, data = await together(
            self.source.agent.ranges_of(path=origin.path, image_format=origin.format, data=False),
            self.destination.agent.ranges_of(path=part, image_format=disk.format, data=True),
        )
        return aligned(common(zero, data), disk.image.virtual_size)

    async def _resumed(self, disk: PlannedDisk, part: str) -> Work:
        """Digest what is there on both hosts, and plan to send the rest and what differs."""
        assert disk.staged is not None
        durable = whole_blocks(disk.staged.durable_ranges, disk.image.virtual_size)
        mend = await self._differing(disk, part, disk.format, durable, Phase.COMPARE)
        rest = complement(durable, disk.image.virtual_size)
        data, again = await together(self._data_in(disk, union(mend, rest)), self._data_in(disk, mend))
        self.totals.resent += again
        self.totals.reused += max(0, disk.image.data - data)
        return Work(disk, self.origin(disk), part, union(mend, rest), durable, data)

    async def _data_in(self, disk: PlannedDisk, ranges: Ranges) -> int:
        origin = self.origin(disk)
        return await self.source.agent.data_in(origin.path, origin.format, ranges)

    async def _send(self, work: Sequence[Work]) -> None:
        if not work:
            return
        tasks: set[asyncio.Task[None]] = set()
        before = self.totals.sent
        sent_before = dict(self.totals.sent_by_disk)

        def on_written(written: list[int]) -> None:
            self.totals.sent = before + sum(written)
            for one, done in zip(work, written, strict=True):
                target, whole = one.disk.target, max(one.disk.image.data, one.left)
                self.totals.sent_by_disk[target] = sent_before.get(target, 0) + done
                everything = one.left if one.disk.base is not None else whole
                self.on_event(DiskProgress(Phase.COPY, target, everything - one.left + done, everything))

        def on_durable(said: list[list[list[int]] | None]) -> None:
            for one, ranges in zip(work, said, strict=True):
                if ranges is not None:
                    fields = records.durable(one.disk.target, ranges)
                    tasks.add(asyncio.create_task(self._note(records.DURABLE, **fields)))

        on_written([0] * len(work))
        try:
            orders = transport.Orders(self.vm, [one.job for one in work], self.transfer)
            async with await self._stream() as stream:
                await stream.run(orders, on_written, on_durable)
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)

    def prepare(self) -> None:
        """Begin to set up the stream that `copy` will need."""
        self._prepared = Prepared(transport.opened(self.source, self.destination, self.transfer.route))

    async def close(self) -> None:
        """Let go of a stream that was prepared and not used."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            await prepared.close()

    async def _stream(self) -> contextlib.AbstractAsyncContextManager[transport.Stream]:
        """The stream that was prepared if it is still good, else a new one."""
        if self._prepared is not None:
            good = await self._prepared.is_good()  # cancelled meanwhile, it is still there to be closed
            prepared, self._prepared = self._prepared, None
            if good:
                return prepared
            await prepared.close()
        return transport.opened(self.source, self.destination, self.transfer.route)

    async def prove(self, disks: Sequence[tuple[PlannedDisk, str]], proof: Verify) -> None:
        """Digest the disks at both ends; what differs is sent once more. Raises VerificationError if it still does.

        `proof`: of disks that were brought up to date, what was sent, or everything.
        """
        started = time.monotonic()
        wanted = {disk.target: self._to_prove(disk, proof) for disk, _ in disks}

        async def one(disk: PlannedDisk, part: str) -> Work:
            ranges = await self._differing(disk, part, disk.format, wanted[disk.target], Phase.PROVE)
            return Work(disk, self.origin(disk), part, ranges, left=total(ranges))

        again = [work for work in await self._each(disks, one) if work.ranges]
        if again:
            log.warning("%s differ after the copy, sending them again", ", ".join(one.disk.target for one in again))
            before = self.totals.sent
            await self._send(again)
            self.totals.resent += self.totals.sent - before
            await self._prove_again(again)
        for disk, _ in disks:
            await self._note(records.PROVEN, disk=disk.target)
        self.totals.proof = proof if any(self.is_hinted(disk) for disk, _ in disks) else Verify.FULL
        self.totals.prove_seconds = time.monotonic() - started

    def is_hinted(self, disk: PlannedDisk) -> bool:
        """Whether a bitmap says what is sent, and the rest is not compared.

        It says what the replica lacks, and not what an interrupted attempt has written beside it: the source may have
        gone back to an older state since.
        """
        return disk.base is not None and disk.staged is None and self.origin(disk).hint is not None

    def _to_prove(self, disk: PlannedDisk, proof: Verify) -> Ranges:
        return self._sent[disk.target] if disk.base is not None and proof is Verify.SENT else _whole(disk)

    async def _prove_again(self, again: Sequence[Work]) -> None:
        for one in again:
            assert one.ranges is not None
            found = await self._differing(one.disk, one.part, one.disk.format, one.ranges, Phase.PROVE)
            if found:
                raise VerificationError(
                    f"disk {one.disk.target} differs after the copy, and still after the differing parts were sent "
                    f"again, the first one at byte {found[0][0]}",
                    subject=one.disk.image.path,
                    remedy="check the memory and storage of both hosts; then run the command again",
                )

    async def verify(self, disks: Sequence[PlannedDisk]) -> None:
        """Digest a finished clone's disks against the source's. Raises VerificationError."""
        for disk in disks:
            why = await self._other_size(disk)
            if not why and await self._differing(disk, disk.final, disk.format, _whole(disk), Phase.PROVE):
                why = "differs from the source's"
            if why:
                raise VerificationError(
                    f"disk {disk.target} of the clone {why}",
                    subject=disk.final,
                    remedy="replace the clone with --force",
                )
        self.totals.proof = Verify.FULL

    async def _other_size(self, disk: PlannedDisk) -> str:
        """Why the finished clone's disk cannot be equal whatever it holds, nothing when it has the source's size."""
        found = await self.destination.agent.disk(path=disk.final, image_format=disk.format, live=True)
        if "error" in found or not found["regular"]:
            return f"cannot be read: {found.get('error', 'it is no regular file')}"
        size, wanted = found["virtual_size"], disk.image.virtual_size
        return f"has {size} bytes, the source's {wanted}" if size != wanted else ""

    async def _each(
        self, disks: Sequence[tuple[PlannedDisk, str]], work: Callable[[PlannedDisk, str], Awaitable[Any]]
    ) -> list[Any]:
        """Do it for every disk, as many at once as were asked for."""
        room = asyncio.Semaphore(self.transfer.parallel)

        async def one(disk: PlannedDisk, part: str) -> Any:
            async with room:
                return await work(disk, part)

        return await together(*(one(disk, part) for disk, part in disks))

    async def _differing(self, disk: PlannedDisk, path: str, format_: str, ranges: Ranges, phase: Phase) -> Ranges:
        """Where the disk's content differs between the two hosts."""
        origin, whole = self.origin(disk), total(ranges)

        def on_done(done: int) -> None:
            self.on_event(DiskProgress(phase, disk.target, done, whole))

        on_done(0)
        ours, theirs = Side(self.source, origin.path, origin.format), Side(self.destination, path, format_)
        found = await differing(ours, theirs, ranges, on_done)
        self.totals.compared += whole if phase is Phase.COMPARE else 0
        return found

    async def _note(self, record: str, /, **fields: object) -> None:
        await self.destination.agent.note(record=record, fields=fields)


def _whole(disk: PlannedDisk) -> Ranges:
    return ((0, disk.image.virtual_size),) if disk.image.virtual_size else ()
