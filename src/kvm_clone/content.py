"""The disks' content: copied, resumed and proven."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvm_clone import transport
from kvm_clone.agent import journal
from kvm_clone.agent.digest import SEGMENT
from kvm_clone.errors import VerificationError
from kvm_clone.host import Host
from kvm_clone.options import CloneOptions, Route
from kvm_clone.placement import PlannedDisk
from kvm_clone.progress import DiskProgress, OnEvent, Phase
from kvm_clone.tasks import together

log = logging.getLogger(__name__)

Ranges = tuple[tuple[int, int], ...]


@dataclass
class Totals:
    """Bytes of content: `sent` in this run, of them `resent` because they differed; `reused` from an earlier one."""

    sent: int = 0
    resent: int = 0
    reused: int = 0
    copy_seconds: float = 0.0
    prove_seconds: float = 0.0
    verified: bool = False


@dataclass(frozen=True)
class Work:
    """What is left to do for one disk. `ranges` None is the whole disk, onto an image known to be all zeros."""

    disk: PlannedDisk
    part: str
    ranges: Ranges | None = None
    durable: int = 0
    left: int = 0

    @property
    def job(self) -> transport.Job:
        """As the data path takes it."""
        image = self.disk.image
        fresh = self.ranges is None
        return transport.Job(image.path, self.part, image.format, fresh, self.ranges, self.durable)


@dataclass
class Content:
    """Moves and proves content between two hosts."""

    source: Host
    destination: Host
    route: Route
    options: CloneOptions
    on_event: OnEvent
    totals: Totals = field(default_factory=Totals)

    async def copy(self, disks: Sequence[tuple[PlannedDisk, str]]) -> None:
        """Copy every (disk, staged path); what an interrupted attempt made durable is compared and only mended.

        Raises TransferError and its kinds.
        """
        started = time.monotonic()
        work = [Work(disk, part, left=disk.image.data) for disk, part in disks if not _kept(disk)]
        work += await together(*(self._resumed(disk, part) for disk, part in disks if _kept(disk)))
        await self._send(sorted(work, key=lambda one: [disk for disk, _ in disks].index(one.disk)))
        self.totals.copy_seconds = time.monotonic() - started
        for disk, _ in disks:
            await self._note(journal.COPIED, disk=disk.target, bytes=disk.image.data)

    async def _resumed(self, disk: PlannedDisk, part: str) -> Work:
        """Digest what is there on both hosts, and plan to send the rest and what differs."""
        assert disk.staged is not None
        durable, size = disk.staged.durable, disk.image.virtual_size
        differing = await self._differing(disk, part, ((0, durable),))
        mend = tuple((at, min(at + SEGMENT, durable)) for at in differing)
        tail: Ranges = ((durable, size),) if durable < size else ()
        data, again = await together(self._data_in(disk, mend + tail), self._data_in(disk, mend))
        self.totals.resent += again
        self.totals.reused += disk.image.data - data
        return Work(disk, part, mend + tail, durable, data)

    async def _data_in(self, disk: PlannedDisk, ranges: Ranges) -> int:
        how = {"image_format": disk.image.format, "ranges": [list(one) for one in ranges]}
        return int(await self.source.call("data_in", path=disk.image.path, **how))

    async def _send(self, work: Sequence[Work]) -> None:
        tasks: set[asyncio.Task[None]] = set()
        before = self.totals.sent

        def on_written(written: list[int]) -> None:
            self.totals.sent = before + sum(written)
            for one, done in zip(work, written, strict=True):
                total = one.disk.image.data
                self.on_event(DiskProgress(Phase.COPY, one.disk.target, total - one.left + done, total))

        def on_durable(ends: list[int]) -> None:
            for one, end in zip(work, ends, strict=True):
                tasks.add(asyncio.create_task(self._note(journal.DURABLE, disk=one.disk.target, end=end)))

        on_written([0] * len(work))
        try:
            await transport.copy(
                self.source,
                self.destination,
                self.route,
                [one.job for one in work],
                parallel=self.options.parallel,
                rate=self.options.bandwidth_limit,
                on_written=on_written,
                on_durable=on_durable,
            )
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def prove(self, disks: Sequence[tuple[PlannedDisk, str]]) -> None:
        """Digest every disk at both ends; what differs is sent once more. Raises VerificationError if it still does."""
        started = time.monotonic()
        for disk, _ in disks:
            self.on_event(DiskProgress(Phase.PROVE, disk.target, 0, disk.image.virtual_size))
        found = await self._all_differing(disks)
        again = [
            Work(disk, part, tuple((at, min(at + SEGMENT, disk.image.virtual_size)) for at in found[disk.target]))
            for disk, part in disks
            if found[disk.target]
        ]
        if again:
            log.warning("%s differ after the copy, sending them again", ", ".join(one.disk.target for one in again))
            before = self.totals.sent
            await self._send(again)
            self.totals.resent += self.totals.sent - before
            await self._prove_again(again)
        for disk, _ in disks:
            await self._note(journal.PROVEN, disk=disk.target)
        self.totals.verified = True
        self.totals.prove_seconds = time.monotonic() - started

    async def _all_differing(self, disks: Sequence[tuple[PlannedDisk, str]]) -> dict[str, list[int]]:
        room = asyncio.Semaphore(self.options.parallel)

        async def one(disk: PlannedDisk, part: str) -> tuple[str, list[int]]:
            async with room:
                return disk.target, await self._differing(disk, part, None)

        return dict(await together(*(one(disk, part) for disk, part in disks)))

    async def _prove_again(self, again: Sequence[Work]) -> None:
        for one in again:
            differing = await self._differing(one.disk, one.part, one.ranges)
            if differing:
                raise VerificationError(
                    f"disk {one.disk.target} differs after the copy, and still after the differing parts were sent "
                    f"again, the first one at byte {differing[0]}",
                    subject=one.disk.image.path,
                    remedy="check the memory and storage of both hosts; then run the command again",
                )

    async def verify(self, disks: Sequence[PlannedDisk]) -> None:
        """Digest a finished clone's disks against the source's. Raises VerificationError."""
        for disk in disks:
            if await self._differing(disk, disk.final, None):
                raise VerificationError(
                    f"disk {disk.target} of the clone differs from the source's",
                    subject=disk.final,
                    remedy="replace the clone with --force",
                )
        self.totals.verified = True

    async def _differing(self, disk: PlannedDisk, staged: str, ranges: Ranges | None) -> list[int]:
        """The first bytes of the segments whose digests differ between the two hosts."""
        state = [0, 0]
        total = sum(end - start for start, end in ranges) if ranges is not None else disk.image.virtual_size

        def progress_of(end: int) -> Callable[[dict[str, Any]], None]:
            def progress(answer: dict[str, Any]) -> None:
                state[end] = answer["done"]
                self.on_event(DiskProgress(Phase.PROVE, disk.target, min(state), total))

            return progress

        how = {
            "image_format": disk.image.format,
            "ranges": None if ranges is None else [list(one) for one in ranges],
        }
        ours, theirs = await together(
            self.source.call("digest", progress_of(0), path=disk.image.path, **how),
            self.destination.call("digest", progress_of(1), path=staged, **how),
        )
        return compare(ours, theirs)

    async def _note(self, record: str, /, **fields: Any) -> None:
        await self.destination.call("note", record=record, fields=fields)


def _kept(disk: PlannedDisk) -> bool:
    return disk.staged is not None


def compare(ours: list[list[Any]], theirs: list[list[Any]]) -> list[int]:
    """Where two lists of [first byte, digest] differ: the segments' first bytes."""
    mine, other = dict(map(tuple, ours)), dict(map(tuple, theirs))
    return sorted(at for at in mine.keys() | other.keys() if mine.get(at) != other.get(at))
