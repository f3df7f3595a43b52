"""Copy, compare, resume and prove the content of assets."""

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
from kvm_clone.gather import together, undisturbed
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image
from kvm_clone.options import TransferOptions, Verify
from kvm_clone.planning.assets import Asset
from kvm_clone.progress import DiskProgress, OnEvent, Phase
from kvm_clone.transfer import room, transport
from kvm_clone.transfer.compare import Ranges, Side, aligned, common, complement, differing, total, union, whole_blocks

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Bytes of content: `sent` in this run, `resent` of them because they differed, `reused` from an earlier run.

    `sent_by_disk`: what the copy sent, by the asset's key. `compared`: bytes whose digests were compared to find the
    differences. `proof`: how much of the result was proven equal.
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
class Offer:
    """How a backup job offers an asset's content. `dirty_ranges`: what a dirty bitmap names, None without a bitmap."""

    image: Image
    dirty_ranges: Ranges | None = None


@dataclass(frozen=True)
class Work:
    """What is to be sent of one asset, from the source's image to the staged one.

    `ranges`: None for everything, onto an image that is known to be all zeros. `durable`: what is
    durable already. `left`: bytes of content that are still to be sent.
    """

    asset: Asset
    source: Image
    staged: Image
    ranges: Ranges | None = None
    durable: Ranges = ()
    left: int = 0

    @property
    def job(self) -> transport.Job:
        """The same as the data path takes it."""
        return transport.Job(self.source, self.staged, self.ranges is None, self.ranges, self.durable)


class PreparedStream:
    """A stream that is set up in the background: an asynchronous context manager like the stream's own."""

    def __init__(self, opening: contextlib.AbstractAsyncContextManager[transport.Stream]) -> None:
        self._opening = opening
        self._task = asyncio.create_task(opening.__aenter__())

    async def is_good(self) -> bool:
        """Whether the stream is ready and waits for its orders.

        A failure in the background is not raised: setting up a new stream fails again if the cause is still there.
        """
        await asyncio.wait([self._task])
        return not self._task.cancelled() and self._task.exception() is None and self._task.result().fresh

    async def close(self) -> None:
        """End the stream, whether it is ready or not."""
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
    """Moves and proves content between two hosts.

    `vm`: the destination's. `offers`: what a backup job offers of a running VM, by key.
    """

    source: Host
    destination: Host
    vm: str
    transfer: TransferOptions
    on_event: OnEvent
    totals: Totals = field(default_factory=Totals)
    offers: dict[str, Offer] = field(default_factory=dict)
    _sent: dict[str, Ranges] = field(default_factory=dict)
    _prepared: PreparedStream | None = None

    def offer(self, asset: Asset) -> Offer:
        """Return where the asset is read: what a backup job offers, else the image itself."""
        return self.offers.get(asset.key, Offer(asset.source))

    async def copy(self, assets: Sequence[tuple[Asset, str]]) -> None:
        """Bring every (asset, staged path) to the source's content, and send only what is not there yet.

        Raises RefusedError where there is no room for what a sync would send, TransferError and its kinds.
        """
        started = time.monotonic()
        work = await self._each(assets, self._work)
        await self._check_room(work)
        await self._send([one for one in work if one.ranges is None or one.ranges])
        self.totals.copy_seconds = time.monotonic() - started
        for asset, _ in assets:
            await self._note(records.COPIED, disk=asset.key, bytes=asset.data)

    async def _check_room(self, work: Sequence[Work]) -> None:
        updates = [
            room.Update(one.asset, one.source, one.staged, one.ranges)
            for one in work
            if one.asset.base is not None and one.ranges
        ]
        await room.check(self.source, self.destination, updates)

    async def _work(self, asset: Asset, staged: Image) -> Work:
        """Return what is left to be sent of one asset."""
        source = self.offer(asset).image
        if asset.base is not None:
            ranges = await self._delta(asset, staged)
            self._sent[asset.key] = ranges
            if asset.staged is not None and asset.below is not None:
                await self._count_kept(asset, staged, ranges)
            return Work(asset, source, staged, ranges, left=total(ranges))
        if asset.staged is not None:
            return await self._resumed(asset, staged)
        return Work(asset, source, staged, left=asset.data)

    async def _delta(self, asset: Asset, staged: Image) -> Ranges:
        """Return where an older state differs from the source: by a dirty bitmap, else by comparing everything."""
        dirty = self.offer(asset).dirty_ranges
        if dirty is not None and self.follows_bitmap(asset):
            doubtful = await self._without_a_bit(asset, staged)
            return union(dirty, await self._differing(asset, staged, doubtful, Phase.COMPARE))
        return await self._differing(asset, staged, _whole(asset), Phase.COMPARE)

    async def _count_kept(self, asset: Asset, staged: Image, ranges: Ranges) -> None:
        """Count what an interrupted attempt wrote into the overlay; `ranges` is what remains to be sent."""
        overlay = Side(self.destination, staged)
        everything, again = await together(overlay.data_in(_whole(asset), own=True), overlay.data_in(ranges, own=True))
        self.totals.resent += again
        self.totals.reused += everything - again

    async def _without_a_bit(self, asset: Asset, staged: Image) -> Ranges:
        """Return where the source is known to be zero and the replica is not.

        QEMU sets no bit for what an image loses when it is made smaller, nor when it then grows again.
        """
        ours, theirs = Side(self.source, self.offer(asset).image), Side(self.destination, staged)
        zero, data = await together(ours.ranges_of(data=False), theirs.ranges_of(data=True))
        return aligned(common(zero, data), asset.size)

    async def _resumed(self, asset: Asset, staged: Image) -> Work:
        """Digest the durable part on both hosts; what differs and the rest are left to be sent."""
        assert asset.staged is not None
        durable = whole_blocks(asset.staged.durable_ranges, asset.size)
        differs = await self._differing(asset, staged, durable, Phase.COMPARE)
        rest = complement(durable, asset.size)
        source = Side(self.source, self.offer(asset).image)
        data, again = await together(source.data_in(union(differs, rest)), source.data_in(differs))
        self.totals.resent += again
        self.totals.reused += max(0, asset.data - data)
        return Work(asset, source.image, staged, union(differs, rest), durable, data)

    async def _send(self, work: Sequence[Work]) -> None:
        if not work:
            return
        tasks: set[asyncio.Task[None]] = set()
        before = self.totals.sent
        sent_before = dict(self.totals.sent_by_disk)

        def on_written(written: list[int]) -> None:
            self.totals.sent = before + sum(written)
            for one, done in zip(work, written, strict=True):
                key, whole = one.asset.key, max(one.asset.data, one.left)
                self.totals.sent_by_disk[key] = sent_before.get(key, 0) + done
                everything = one.left if one.asset.base is not None else whole
                self.on_event(DiskProgress(Phase.COPY, key, everything - one.left + done, everything))

        def on_durable(said: list[list[list[int]] | None]) -> None:
            for one, ranges in zip(work, said, strict=True):
                if ranges is not None:
                    fields = records.durable(one.asset.key, ranges)
                    tasks.add(asyncio.create_task(self._note(records.DURABLE, **fields)))

        on_written([0] * len(work))
        try:
            orders = transport.Orders(self.vm, [one.job for one in work], self.transfer)
            async with await self._stream() as stream:
                await stream.run(orders, on_written, on_durable)
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)

    def prepare(self) -> None:
        """Begin to set up the stream that `copy` will use."""
        self._prepared = PreparedStream(transport.opened(self.source, self.destination, self.transfer.route))

    async def close(self) -> None:
        """End a stream that was prepared and not used."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            await prepared.close()

    async def _stream(self) -> contextlib.AbstractAsyncContextManager[transport.Stream]:
        """Return the stream that was prepared if it is still good, else a new one."""
        if self._prepared is not None:
            good = await self._prepared.is_good()  # cancelled meanwhile, it is still there to be closed
            prepared, self._prepared = self._prepared, None
            if good:
                return prepared
            await prepared.close()
        return transport.opened(self.source, self.destination, self.transfer.route)

    async def prove(self, assets: Sequence[tuple[Asset, str]], proof: Verify) -> None:
        """Digest every (asset, staged path) on both hosts, and send once more what differs.

        `proof`: of what was brought up to date, prove what was sent, or everything. Raises VerificationError where
        something still differs, TransferError and its kinds.
        """
        started = time.monotonic()
        wanted = {asset.key: self._to_prove(asset, proof) for asset, _ in assets}

        async def one(asset: Asset, staged: Image) -> Work:
            ranges = await self._differing(asset, staged, wanted[asset.key], Phase.PROVE)
            return Work(asset, self.offer(asset).image, staged, ranges, left=total(ranges))

        again = [work for work in await self._each(assets, one) if work.ranges]
        if again:
            log.warning("%s differ after the copy, sending them again", ", ".join(one.asset.key for one in again))
            before = self.totals.sent
            await self._send(again)
            self.totals.resent += self.totals.sent - before
            await self._prove_again(again)
        for asset, _ in assets:
            await self._note(records.PROVEN, disk=asset.key)
        self.totals.proof = proof if any(self.follows_bitmap(asset) for asset, _ in assets) else Verify.FULL
        self.totals.prove_seconds = time.monotonic() - started

    def follows_bitmap(self, asset: Asset) -> bool:
        """Whether a dirty bitmap says what is sent, and the rest is not compared.

        A bitmap says what the replica lacks, and not what an interrupted attempt has written beside it: the source may
        have gone back to an older state since.
        """
        return asset.base is not None and asset.staged is None and self.offer(asset).dirty_ranges is not None

    def _to_prove(self, asset: Asset, proof: Verify) -> Ranges:
        return self._sent[asset.key] if asset.base is not None and proof is Verify.SENT else _whole(asset)

    async def _prove_again(self, again: Sequence[Work]) -> None:
        for one in again:
            assert one.ranges is not None
            found = await self._differing(one.asset, one.staged, one.ranges, Phase.PROVE)
            if found:
                raise VerificationError(
                    f"disk {one.asset.key} differs after the copy, and still after the differing parts were sent "
                    f"again, the first one at byte {found[0][0]}",
                    subject=one.asset.source.path,
                    remedy="check the memory and storage of both hosts; then run the command again",
                )

    async def verify(self, assets: Sequence[Asset]) -> None:
        """Digest a finished clone against its source. Raises VerificationError, TransferError and its kinds."""
        for asset in assets:
            finished = asset.at(asset.place.path)
            why = await self._other_size(asset, finished)
            if not why and await self._differing(asset, finished, _whole(asset), Phase.PROVE):
                why = "differs from the source's"
            if why:
                raise VerificationError(
                    f"disk {asset.key} of the clone {why}",
                    subject=finished.path,
                    remedy="replace the clone with --force",
                )
        self.totals.proof = Verify.FULL

    async def _other_size(self, asset: Asset, finished: Image) -> str:
        """Return why the finished image cannot be equal whatever it holds; nothing when it has the source's size."""
        found = await self.destination.agent.disk(finished.path, finished.format, live=True)
        if found.error or not found.regular:
            return f"cannot be read: {found.error or 'it is no regular file'}"
        size, wanted = found.virtual_size, asset.size
        return f"has {size} bytes, the source's {wanted}" if size != wanted else ""

    async def _each(
        self, assets: Sequence[tuple[Asset, str]], work: Callable[[Asset, Image], Awaitable[Any]]
    ) -> list[Any]:
        """Do the work for every asset and its staged image, `parallel` of them at once."""
        turns = asyncio.Semaphore(self.transfer.parallel)

        async def one(asset: Asset, path: str) -> Any:
            async with turns:
                return await work(asset, asset.at(path))

        return await together(*(one(asset, path) for asset, path in assets))

    async def _differing(self, asset: Asset, theirs: Image, ranges: Ranges, phase: Phase) -> Ranges:
        """Return where the asset's content differs between the source and an image at the destination."""
        ours, whole = self.offer(asset).image, total(ranges)

        def on_done(done: int) -> None:
            self.on_event(DiskProgress(phase, asset.key, done, whole))

        on_done(0)
        found = await differing(Side(self.source, ours), Side(self.destination, theirs), ranges, on_done)
        self.totals.compared += whole if phase is Phase.COMPARE else 0
        return found

    async def _note(self, record: str, /, **fields: object) -> None:
        await self.destination.agent.note(record=record, fields=fields)


def _whole(asset: Asset) -> Ranges:
    return ((0, asset.size),) if asset.size else ()
