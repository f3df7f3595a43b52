"""The one copy engine: a sender that reads disks into a stream of records, and a receiver that writes them.

Nothing here knows of ssh: the sender gets a descriptor to write to, the receiver one to read from.
"""

from __future__ import annotations

import contextlib
import time
from typing import Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Set, Tuple

from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import DATA as DATA_KIND
from kvm_clone.agent.disks.disk import Disk, Extent, Ranges, ahead, split, union, without_zeros, zero_data
from kvm_clone.agent.protocol.errors import INTERRUPTED, PROTOCOL, AgentError, from_exception
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import (
    CHUNK,
    COMPRESSED,
    DATA,
    DISK_END,
    END,
    IDLE,
    RECORD_HEADER,
    ZERO,
    ProtocolError,
    Record,
    unpack_record,
    write_all,
)
from kvm_clone.agent.staging.lock import WriterLock

IDLE_SECONDS = 5.0
"""A sender with nothing to send says so this often."""

SILENCE_SECONDS = 60.0
"""A receiver that hears nothing for so long takes the sender for dead: TCP notices a cut network much later."""

DURABLE_PARTS = 256
DURABLE_LEAST, DURABLE_BYTES = 4 * CHUNK, 64 * CHUNK
DURABLE_SECONDS = 2.0
"""A receiver makes durable what it has, and says so: after a part of the disks' size, of so many bytes at least and at
most, or after so many seconds. It is what a resumed copy can spare."""

MOST_DURABLE = 64
"""Ranges of one disk that are reported as durable: of more, the largest. What is left out is only sent once more."""

REPORT_SECONDS = 0.25
"""A receiver reports what it has written this often."""


class Job(NamedTuple):
    """One disk's copy: its image at one end, and whether the other end is known to read as zeros.

    `ranges`: [start, end) pairs in bytes, in order, that are to be sent; None is the whole disk. `durable`: at the
    receiving end, what was durable already, likewise.
    """

    path: str
    format: str
    fresh: bool = True
    ranges: Optional[List[List[int]]] = None
    durable: Ranges = ()


class Pacer:
    """Spreads bytes over time so that they keep to `bandwidth_limit` bytes per second; None is no limit."""

    def __init__(self, bandwidth_limit: Optional[int], idle: Callable[[], None]) -> None:
        self._bandwidth_limit = bandwidth_limit
        self._idle = idle
        self._due = time.monotonic()
        # A tenth of a second's worth at a time keeps a low rate even.
        self.most = min(CHUNK, max(4096, bandwidth_limit // 10)) if bandwidth_limit else CHUNK

    def wait(self, count: int) -> None:
        """Return when `count` more bytes may go."""
        if not self._bandwidth_limit:
            return
        now = time.monotonic()
        self._due = max(self._due, now - 0.05)  # time that was not used is lost, lest a burst follows a stall
        while self._due > now:
            time.sleep(min(self._due - now, IDLE_SECONDS))
            now = time.monotonic()
            if self._due > now:
                self._idle()
        self._due += count / self._bandwidth_limit


class Sender:
    """Reads up to `parallel` disks in turn, a chunk of each at a time."""

    def __init__(self, out: int, jobs: List[Job], parallel: int, bandwidth_limit: Optional[int]) -> None:
        self._out = out
        self._jobs = jobs
        self._parallel = parallel
        self._pacer = Pacer(bandwidth_limit, self._say_idle)
        self._sent = 0
        self._said = time.monotonic()

    def run(self) -> None:
        """Send every disk and the end record. Raises AgentError; a reader that went away is `interrupted`."""
        waiting = iter(range(len(self._jobs)))
        active: List[Tuple[int, Generator[None, None, None]]] = []
        try:
            while True:
                while len(active) < self._parallel:
                    index = next(waiting, None)
                    if index is None:
                        break
                    active.append((index, self._disk(index)))
                if not active:
                    break
                active = [(index, disk) for index, disk in active if self._step(index, disk)]
        finally:
            for _, disk in active:  # there are any only if something went wrong, which is the news
                with contextlib.suppress(OSError, AgentError):
                    disk.close()
        self._record(Record(END, 0, 0, self._sent))

    def _step(self, index: int, disk: Iterator[None]) -> bool:
        """Send the disk's next piece; False when it has none."""
        try:
            next(disk)
        except StopIteration:
            return False
        except BrokenPipeError as error:
            raise AgentError(INTERRUPTED, "the receiver went away") from error
        except Exception as error:
            raise from_exception(error, f"reading {self._jobs[index].path}") from error
        return True

    def _disk(self, index: int) -> Generator[None, None, None]:
        job = self._jobs[index]
        disk = image.open_for_reading(job.path, job.format)
        try:
            # Compressed ranges first: see image.StagedImage.
            if job.fresh and job.format == image.QCOW2 and any(extent.compressed for extent in disk.extents()):
                yield from self._extents(index, disk, job, compressed=True)
            yield from self._extents(index, disk, job, compressed=False)
            self._record(Record(DISK_END, index, disk.size, 0))
        finally:
            disk.close()

    def _extents(self, index: int, disk: Disk, job: Job, *, compressed: bool) -> Iterator[None]:
        for (piece,) in ahead(disk, self._pieces(disk, job, compressed=compressed)):
            if piece.kind == DATA_KIND:
                self._data(index, disk, piece)
                yield
            elif not job.fresh:
                self._record(Record(ZERO, index, piece.offset, piece.length))
            elif time.monotonic() - self._said > IDLE_SECONDS:  # there may be much that need not be sent
                self._say_idle()
                yield

    def _pieces(self, disk: Disk, job: Job, *, compressed: bool) -> Iterator[List[Extent]]:
        """What becomes a record each: data of one kind, and zeros if the other end is not known to read as zeros.

        Zeros that only reading finds are pieces in any case: meanwhile the other end waits for a sign.
        """
        ranges = job.ranges if job.ranges is not None else [[0, disk.size]]
        left = sum(end - start for start, end in ranges)
        for extent in disk.within(ranges):
            left -= extent.length
            if not job.fresh:  # QEMU stores compressed only what was never written
                extent = extent._replace(compressed=False)
            if extent.kind != DATA_KIND:
                if not job.fresh:
                    yield [extent]
            elif extent.compressed == compressed:
                for piece in split(extent, CHUNK if compressed else self._pacer.most):
                    for part in (piece,) if disk.knows_zeros else without_zeros(disk, piece):
                        yield [part]
        if left:  # what no extent covers would be missing at the other end
            raise AgentError(PROTOCOL, f"the extents of {job.path} leave out {left} bytes")

    def _data(self, index: int, disk: Disk, piece: Extent) -> None:
        self._pacer.wait(piece.length)
        flags = COMPRESSED if piece.compressed else 0
        self._record(Record(DATA, index, piece.offset, piece.length, flags))
        disk.send(piece, self._out)
        self._sent += piece.length

    def _say_idle(self) -> None:
        self._record(Record(IDLE, 0, 0, 0))

    def _record(self, record: Record) -> None:
        write_all(self._out, record.pack())
        self._said = time.monotonic()


class Receiver:
    """Writes the records of one stream to staged images."""

    def __init__(
        self,
        source: int,
        jobs: List[Job],
        report: Callable[[List[int]], None],
        durable: Callable[[List[Optional[Ranges]]], None] = lambda _: None,
    ) -> None:
        """`report` is called with the bytes that each disk got, `durable` with the ranges that have become durable.

        `durable` gets None for a disk of which nothing has since its last call.
        """
        self._source = Incoming(source, SILENCE_SECONDS)
        self._durable = durable
        self._reached = [0] * len(jobs)
        self._reported_durable: List[Ranges] = [union(job.durable, ()) for job in jobs]
        self._durable_since = time.monotonic()
        self._not_durable = 0
        self._jobs = jobs
        self._report = report
        self._reported = time.monotonic()
        self._open: Dict[int, Disk] = {}
        self._finished: Set[int] = set()
        self.written = [0] * len(jobs)

    def run(self) -> None:
        """Write everything up to the end record and make it durable. Raises AgentError."""
        locks: List[WriterLock] = []
        try:
            locks += [WriterLock(job.path) for job in self._jobs]
            while True:
                record = self._next()
                if record.type == END:
                    self._end(record)
                    return
                self._apply(record)
                self._report_now_and_then()
        except (EOFError, OSError, ProtocolError) as error:
            raise from_exception(error, "receiving") from error
        finally:
            for disk in self._open.values():  # there are any only if something went wrong, which is the news
                with contextlib.suppress(OSError, AgentError):
                    disk.close()
            for lock in locks:
                lock.release()
            self._source.close()

    def _next(self) -> Record:
        header = self._source.read(RECORD_HEADER.size)
        if not header:
            raise AgentError(INTERRUPTED, "the stream from the source ended before its end")
        return unpack_record(header)

    def _apply(self, record: Record) -> None:
        if record.type == IDLE:
            return
        if record.disk >= len(self._jobs):
            raise ProtocolError(f"a record for disk {record.disk} of {len(self._jobs)}")
        if record.disk in self._finished:
            raise ProtocolError(f"a record for disk {record.disk} behind its end")
        job = self._jobs[record.disk]
        try:
            disk = self._disk(record.disk)
            _check(record, disk.size)
            if record.type == DATA:
                if isinstance(disk, image.StagedImage):
                    disk.compress(bool(record.flags & COMPRESSED))
                disk.receive(record.offset, record.length, self._source)
                self.written[record.disk] += record.length
                self._reach(record)
            elif record.type == ZERO:
                zero_data(disk, record.offset, record.offset + record.length)
                self._reach(record)
            elif record.type == DISK_END:
                self._finish(record.disk)
        except Exception as error:
            raise from_exception(error, f"writing {job.path}") from error

    def _reach(self, record: Record) -> None:
        """Ranges come in order, so that everything before the last one's end is written.

        Of an image that is compressed in part, the compressed ranges come first: the plain ones before that point may
        be missing yet, which a resumed copy finds by their digests.
        """
        self._reached[record.disk] = max(self._reached[record.disk], record.offset + record.length)
        self._not_durable += record.length if record.type == DATA else 0
        now = time.monotonic()
        enough = min(DURABLE_BYTES, max(DURABLE_LEAST, sum(disk.size for disk in self._open.values()) // DURABLE_PARTS))
        if self._not_durable >= enough or now - self._durable_since >= DURABLE_SECONDS:
            for disk in self._open.values():
                disk.flush()
            self._report_durable(list(self._open))
            self._durable_since, self._not_durable = time.monotonic(), 0

    def _report_durable(self, flushed: List[int]) -> None:
        """Report the disks of which more is durable than was said before."""
        said: List[Optional[Ranges]] = [None] * len(self._jobs)
        for index in flushed:
            ranges = _fewest(union(self._reported_durable[index], [(0, self._reached[index])]))
            if ranges != self._reported_durable[index]:
                self._reported_durable[index] = said[index] = ranges
        if any(ranges is not None for ranges in said):
            self._durable(said)

    def _disk(self, index: int) -> Disk:
        if index not in self._open:
            self._open[index] = image.open_for_filling(self._jobs[index].path, self._jobs[index].format)
        return self._open[index]

    def _finish(self, index: int) -> None:
        disk = self._open.pop(index)
        size = disk.size
        try:
            disk.flush()
        finally:
            disk.close()
        image.flush_and_drop_cache(self._jobs[index].path)
        self._finished.add(index)
        self._reached[index] = size
        self._report_durable([index])

    def _end(self, record: Record) -> None:
        if record.length != sum(self.written):
            raise AgentError(INTERRUPTED, f"the source sent {record.length} bytes, {sum(self.written)} arrived here")
        if len(self._finished) != len(self._jobs):
            missing = len(self._jobs) - len(self._finished)
            raise AgentError(INTERRUPTED, f"the stream ended before the end of {missing} of its disks")
        self._report(self.written)

    def _report_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self._report(self.written)


def _fewest(ranges: List[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """At most MOST_DURABLE of the ranges, the largest, in order."""
    largest = sorted(ranges, key=lambda one: one[0] - one[1])[:MOST_DURABLE]
    return sorted(largest)


def _check(record: Record, size: int) -> None:
    """Raises AgentError (protocol) when the record does not fit a disk of `size` bytes."""
    if record.type == DISK_END and record.offset != size:
        raise AgentError(PROTOCOL, f"the source's disk has {record.offset} bytes, this one {size}")
    if record.offset + record.length > size:
        raise AgentError(PROTOCOL, f"a record up to byte {record.offset + record.length} of {size}")
