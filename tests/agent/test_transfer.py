"""One stream from a sender to a receiver, whole and torn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from kvm_clone.agent import transfer
from kvm_clone.agent.digests import digest
from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import Extent, Ranges
from kvm_clone.agent.disks.file import FileDisk
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
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
)
from kvm_clone.agent.transfer import Job, Receiver, Sender

from .naive_hash import BY_SHA256
from .tools import (
    KIB,
    MIB,
    Write,
    arriving,
    device,
    ending,
    eventually,
    filled,
    make_overlay,
    make_qcow2,
    make_raw,
    need,
    noise,
    processes,
    python,
    qcow2_content,
    read,
    through_pipe,
)

pytestmark = pytest.mark.timeout(30)


def copy(source: Sequence[Job], target: Sequence[Job], parallel: int = 1, rate: int = 0) -> list[int]:
    """Send through a real pipe; what the receiver reports at its end. Raises what either end raised."""
    incoming, out = os.pipe()
    failures: list[AgentError] = []

    def send() -> None:
        try:
            Sender(out, list(source), parallel, rate).run()
        except AgentError as error:
            failures.append(error)
        finally:
            os.close(out)

    sender = threading.Thread(target=send)
    sender.start()
    reports: list[list[int]] = []
    try:
        Receiver(incoming, list(target), lambda written: reports.append(list(written))).run()
    except AgentError as error:
        failures.append(error)
    finally:
        os.close(incoming)
        sender.join()
    if failures:
        raise failures[0]
    return reports[-1]


def same(first: Job, second: Job, *, strict: bool = False) -> bool:
    """Whether QEMU finds both equal; `strict`, with the same clusters in use."""
    need("qemu-img")
    argv = ["qemu-img", "compare", *(["-s"] if strict else []), "-f", first.format, "-F", second.format]
    return subprocess.run([*argv, first.path, second.path], stdout=subprocess.DEVNULL).returncode == 0


def digests(job: Job) -> list[bytes]:
    disk = image.open_for_reading(job.path, job.format)
    try:
        return [segment.digest for segment in digest.segments(disk, BY_SHA256)]
    finally:
        disk.close()


SIZE = 5 * MIB + 512
WRITES = [(0, noise(100_000)), (MIB - 3, noise(7, 1)), (2 * MIB, noise(MIB + 4097, 2)), (SIZE - 1, b"\x01")]


def make(
    path: Path,
    format_: str,
    size: int = SIZE,
    writes: Sequence[Write] = WRITES,
    options: Mapping[str, str] | None = None,
) -> Job:
    if format_ == image.RAW:
        return Job(str(make_raw(path, size, writes)), format_)
    return Job(str(make_qcow2(path, size, writes, options)), format_)


@pytest.mark.parametrize(
    ("parallel", "format_", "to"),
    [
        (1, "raw", "raw"),
        (2, "raw", "qcow2"),
        (2, "qcow2", "raw"),
        (3, "qcow2", "qcow2"),
        (9, "raw", "raw"),
    ],
)
def test_several_disks(parallel: int, format_: str, to: str, tmp_path: Path) -> None:
    contents: list[Sequence[Write]] = [WRITES, [], [(3 * MIB, noise(2 * MIB, 3))], [(0, noise(SIZE, 4))]]
    source = [make(tmp_path / f"from {number}", format_, writes=writes) for number, writes in enumerate(contents)]
    target = [make(tmp_path / f"to {number}", to, writes=[]) for number in range(len(contents))]
    written = copy(source, target, parallel)
    for one, other in zip(source, target, strict=True):
        assert same(one, other)
    assert written[1] == 0
    assert written[3] == SIZE
    assert not processes(str(tmp_path))


def test_both_ways_of_moving(way: str, tmp_path: Path) -> None:
    for to in ("raw", "qcow2"):
        source, target = make(tmp_path / f"from-{to}", "qcow2"), make(tmp_path / f"to-{to}", to, writes=[])
        copy([source], [target])
        assert same(source, target)


@pytest.mark.parametrize("size", [1, 511, CHUNK - 1, CHUNK, CHUNK + 1])
def test_raw_sizes(size: int, tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", size, [(0, noise(size))])
    target = make(tmp_path / "to", "raw", size, [])
    copy([source], [target])
    assert Path(target.path).read_bytes() == noise(size)


OPTIONS: list[dict[str, str]] = [
    {"cluster_size": "512"},
    {"cluster_size": "4096"},
    {"cluster_size": "65536", "extended_l2": "on"},
    {"cluster_size": "2097152"},
    {"compat": "0.10"},
    {"lazy_refcounts": "on"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_qcow2_of_every_kind(options: dict[str, str], tmp_path: Path) -> None:
    source = make(tmp_path / "from", "qcow2", options=options)
    target = make(tmp_path / "to", "qcow2", writes=[], options=options)
    copy([source], [target])
    assert same(source, target, strict=True)
    subprocess.run(["qemu-img", "check", "-q", target.path], check=True)


def stored(job: Job) -> int:
    """How many bytes the image's file takes."""
    return os.stat(job.path).st_blocks * 512


def compressed_clusters(job: Job) -> int:
    """As `qemu-img check` counts them."""
    argv = ["qemu-img", "check", "--output=json", "-f", "qcow2", job.path]
    answer = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return int(answer.get("compressed-clusters", 0))


SQUEEZABLE = b"squeeze me " * (MIB // 11)


def make_compressed(path: Path, size: int = 3 * MIB, cluster_size: int = 64 * KIB) -> Job:
    writes = [(MIB - 700, SQUEEZABLE), (size - 5, b"tail")]
    return Job(str(make_qcow2(path, size, writes, {"cluster_size": str(cluster_size)}, compress=True)), "qcow2")


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 1048576])
def test_compressed_stays_compressed(cluster_size: int, tmp_path: Path) -> None:
    source = make_compressed(tmp_path / "from", cluster_size=cluster_size)
    target = make(tmp_path / "to", "qcow2", 3 * MIB, [], options={"cluster_size": str(cluster_size)})
    copy([source], [target])
    assert same(source, target, strict=True)
    assert compressed_clusters(target) == compressed_clusters(source) > 0
    assert stored(target) <= stored(source) * 1.05 + 8 * KIB  # the filesystem counts in blocks


def test_compressed_and_plain_in_one_image(tmp_path: Path) -> None:
    source = make_compressed(tmp_path / "from")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 100k", "-c", "write -P 8 2M 64k", source.path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    targets = [make(tmp_path / f"to {number}", "qcow2", 3 * MIB, []) for number in (0, 1)]
    copy([source, source], targets, parallel=2)
    for target in targets:
        assert same(source, target, strict=True)
        assert compressed_clusters(target) == compressed_clusters(source) > 0


@pytest.mark.parametrize(("size", "cluster_size"), [(4 * MIB, 2 * MIB), (4 * MIB + 512, 64 * KIB)])
def test_compressed_clusters_that_no_record_can_carry_arrive_plain(
    size: int, cluster_size: int, tmp_path: Path
) -> None:
    source = make_compressed(tmp_path / "from", size, cluster_size)
    target = make(tmp_path / "to", "qcow2", size, [], options={"cluster_size": str(cluster_size)})
    copy([source], [target])
    assert same(source, target)


@pytest.mark.parametrize("times", [1, 2])
def test_compressed_over_old_data(times: int, tmp_path: Path) -> None:
    source = make_compressed(tmp_path / "from")._replace(fresh=False)
    target = make(tmp_path / "to", "qcow2", 3 * MIB, [(0, noise(3 * MIB))])
    for _ in range(times):
        copy([source], [target])
    assert same(source, target)


@pytest.mark.parametrize("to", ["raw", "qcow2"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_old_data_is_overwritten_with_zeros_unless_fresh(format_: str, to: str, tmp_path: Path) -> None:
    source = make(tmp_path / "from", format_)
    target = make(tmp_path / "to", to, writes=[(0, noise(SIZE, 9))])
    copy([source._replace(fresh=False)], [target])
    assert digests(source) == digests(target)
    assert stored(target) < 2 * MIB


def test_holes_stay_holes(tmp_path: Path) -> None:
    for format_ in ("raw", "qcow2"):
        source = make(tmp_path / f"from-{format_}", format_, 64 * MIB, [(32 * MIB, b"x")])
        target = make(tmp_path / f"to-{format_}", format_, 64 * MIB, [])
        assert copy([source], [target])[0] <= 64 * KIB
        assert stored(target) < MIB


def test_a_format_that_is_not_handled(tmp_path: Path) -> None:
    make_raw(tmp_path / "disk", 512)
    for open_ in (image.open_for_reading, image.open_for_filling):
        with pytest.raises(AgentError, match="vmdk") as caught:
            open_(str(tmp_path / "disk"), "vmdk")
        assert caught.value.kind == errors.UNSUPPORTED


def test_the_rate_is_held(tmp_path: Path) -> None:
    rate, size = 4 * MIB, 9 * MIB
    source = make(tmp_path / "from", "raw", size, [(0, noise(size))])
    target = make(tmp_path / "to", "raw", size, [])
    begun = time.monotonic()
    copy([source], [target], rate=rate)
    seconds = time.monotonic() - begun
    assert seconds >= 2
    assert 0.9 * rate < size / seconds < 1.05 * rate


RANGES: list[list[list[int]]] = [
    [],
    [[0, 0]],
    [[0, SIZE]],
    [[0, 1], [SIZE - 1, SIZE]],
    [[MIB - 2, MIB + 1], [2 * MIB + 5, 4 * MIB + 77]],
    [[99_999, 2 * MIB], [3 * MIB, 3 * MIB], [5 * MIB, SIZE]],
]


@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize(("format_", "to"), [("raw", "raw"), ("qcow2", "qcow2"), ("raw", "qcow2")])
def test_only_the_ranges_are_sent(format_: str, to: str, ranges: list[list[int]], tmp_path: Path) -> None:
    old = noise(SIZE, 9)
    source, target = make(tmp_path / "from", format_), make(tmp_path / "to", to, writes=[(0, old)])
    written = copy([source._replace(fresh=False, ranges=ranges)], [target])
    expected, content = bytearray(old), filled(SIZE, WRITES)
    for start, end in ranges:
        expected[start:end] = content[start:end]
    assert content_of(target) == bytes(expected)
    assert written[0] <= sum(end - start for start, end in ranges)


def content_of(job: Job) -> bytes:
    disk = image.open_for_reading(job.path, job.format)
    try:
        return read(disk)
    finally:
        disk.close()


@pytest.mark.parametrize("to", ["raw", "qcow2"])
def test_zeros_over_stale_data_take_no_space(to: str, tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 8 * MIB, [])
    target = make(tmp_path / "to", to, 8 * MIB, [(MIB, noise(2 * MIB))])
    assert copy([source._replace(fresh=False, ranges=[[0, 8 * MIB]])], [target]) == [0]
    assert content_of(target) == bytes(8 * MIB)
    assert stored(target) < MIB


def receive(
    content: bytes, target: Job, honest: Callable[[int], None] = lambda _: None, cut: int | None = None
) -> list[int]:
    """What the receiver of a stream, cut off at a byte, says is durable; `honest` hears it at that moment."""
    said = [target.durable[0][1] if target.durable else 0]

    def durable(ranges: list[Ranges | None]) -> None:
        assert ranges[0] is not None
        ((start, end),) = ranges[0]
        assert start == 0
        said.append(end)
        honest(end)

    with arriving(content[:cut]) as incoming, contextlib.suppress(AgentError):
        Receiver(incoming, [target], lambda _: None, durable).run()
    return said


KINDS = {"raw": "raw", "qcow2": "qcow2", "compressed": "qcow2"}


def source_of(kind: str, directory: Path) -> Job:
    if kind == "compressed":
        source = make_compressed(directory / "from")
        command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 100k", "-c", "write -P 8 2M 64k", source.path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return source
    return make(directory / "from", KINDS[kind], 3 * MIB, [(0, noise(100_000)), (MIB - 3, noise(MIB + 4097, 2))])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_be_durable_is_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At that moment, for another reader beside the receiver."""
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    source = source_of(kind, tmp_path)
    target = make(tmp_path / "to", source.format, 3 * MIB, [])
    whole = content_of(source)
    content, _ = stream_of([source])
    path = Path(target.path)

    def honest(end: int) -> None:
        there = path.read_bytes() if target.format == "raw" else qcow2_content(path)
        assert_there(kind, there, whole, end)

    said = receive(content, target, honest)
    assert said == sorted(said)
    assert len(said) > 2
    assert said[-1] == 3 * MIB


RECEIVER = """
import sys
from kvm_clone.agent import transfer
transfer.DURABLE_BYTES = 1
path, format_ = sys.argv[1:]
say = lambda said: print(said[0][0][1], flush=True)
transfer.Receiver(0, [transfer.Job(path, format_)], lambda _: None, say).run()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_said_to_be_durable_outlives_a_killed_receiver(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    target = make(tmp_path / "to", source.format, 3 * MIB, [])
    content, records = stream_of([source])
    with ending(python(RECEIVER, target.path, target.format)) as receiver:
        assert receiver.stdin
        assert receiver.stdout
        receiver.stdin.write(content[: records[-2][0] - 100])  # the last content is torn
        receiver.stdin.flush()
        plain = [record for _, record in records if record.type == DATA and not record.flags & COMPRESSED]
        last, end = plain[-2].offset + plain[-2].length if len(plain) > 1 else 0, 0
        while end < last:
            end = int(receiver.stdout.readline())
        receiver.kill()
    assert eventually(lambda: not processes(target.path))
    whole = content_of(source)
    assert_there(kind, content_of(target), whole, end)
    resume(source, target, end)
    assert content_of(target) == whole


def assert_there(kind: str, there: bytes, whole: bytes, end: int) -> None:
    """Everything before `end`; of an image that is compressed in part, the plain clusters may be missing."""
    blocks = [(there[at : at + 65536], whole[at : at + 65536]) for at in range(0, end, 65536)]
    missing = [held for held, wanted in blocks if held != wanted]
    assert not any(map(any, missing))
    assert len(missing) <= (len(blocks) // 2 if kind == "compressed" else 0)


def resume(source: Job, target: Job, durable: int) -> int:
    """Send what is not durable and what differs before; how many bytes of content that were."""
    there, whole = content_of(target), content_of(source)
    mend = [[at, at + 65536] for at in range(0, durable, 65536) if there[at : at + 65536] != whole[at : at + 65536]]
    ranges = [*mend, [durable, 3 * MIB]]
    return copy([source._replace(fresh=False, ranges=ranges)], [target._replace(durable=[[0, durable]])])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_transfer_is_resumed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    source = source_of(kind, tmp_path)
    content, records = stream_of([source])
    whole = content_of(source)
    cuts = list(cuts_of(content, records))
    reused = set()
    for number, cut in enumerate(cuts[:: max(1, len(cuts) // 6)]):
        target = make(tmp_path / f"to {number}", source.format, 3 * MIB, [])
        end = max(receive(content, target, cut=cut))
        assert_there(kind, content_of(target), whole, end)
        sent_again = resume(source, target, end)
        assert kind == "compressed" or sent_again <= 3 * MIB - end
        assert content_of(target) == whole
        reused.add(end)
    assert len(reused) > 1


def test_a_mended_range_says_nothing_of_what_lies_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    source = make(tmp_path / "from", "raw", 3 * MIB, [(0, noise(3 * MIB))])
    target = make(tmp_path / "to", "raw", 3 * MIB, [(0, noise(MIB))])._replace(durable=[[0, 2 * MIB]])
    content, _ = stream_of([source._replace(fresh=False, ranges=[[0, MIB], [2 * MIB, 3 * MIB]])])
    assert [said for said in receive(content, target) if said < 2 * MIB] == []


def reports(jobs: list[tuple[Job, Job]], parallel: int = 1) -> list[list[Ranges | None]]:
    """What a receiver of these copies says is durable, report by report."""
    content, _ = stream_of([source for source, _ in jobs], parallel)
    said: list[list[Ranges | None]] = []
    with arriving(content) as incoming:
        Receiver(incoming, [target for _, target in jobs], lambda _: None, said.append).run()
    return said


def test_what_is_durable_further_on_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    source = make(tmp_path / "from", "raw", 4 * MIB, [(0, noise(4 * MIB))])
    target = make(tmp_path / "to", "raw", 4 * MIB, [(2 * MIB, noise(MIB))])._replace(durable=[[2 * MIB, 3 * MIB]])
    ranges = [[0, 2 * MIB], [3 * MIB, 4 * MIB]]
    said = reports([(source._replace(fresh=False, ranges=ranges), target)])
    assert said[0] == [[(0, MIB), (2 * MIB, 3 * MIB)]]
    assert said[1:] == [[[(0, 3 * MIB)]], [[(0, 4 * MIB)]]]


def test_only_what_advanced_is_told_to_be_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    pairs = []
    for name in ("one", "other"):
        source = make(tmp_path / f"from {name}", "raw", 2 * MIB, [(0, noise(2 * MIB))])
        pairs.append((source, make(tmp_path / f"to {name}", "raw", 2 * MIB, [])))
    said = reports(pairs)
    assert said == [
        [[(0, MIB)], None],
        [[(0, 2 * MIB)], None],
        [None, [(0, MIB)]],
        [None, [(0, 2 * MIB)]],
    ]


def test_the_ranges_that_are_told_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_BYTES", 1)
    monkeypatch.setattr(transfer, "MOST_DURABLE", 2)
    source = make(tmp_path / "from", "raw", 2 * MIB, [(0, noise(2 * MIB))])._replace(ranges=[[0, MIB]], fresh=False)
    held = [[MIB + at, MIB + at + 4096 * (1 + at // 65536)] for at in (65536, 2 * 65536, 3 * 65536)]
    target = make(tmp_path / "to", "raw", 2 * MIB, [])._replace(durable=held)
    assert reports([(source, target)])[0] == [[(0, MIB), tuple(held[2])]]


def stream_of(jobs: Sequence[Job], parallel: int = 1) -> tuple[bytes, list[tuple[int, Record]]]:
    """A whole stream, and its records with their positions."""
    content = through_pipe(lambda out: Sender(out, list(jobs), parallel, 0).run())
    records, position = [], 0
    while position < len(content):
        record = unpack_record(content[position : position + RECORD_HEADER.size])
        records.append((position, record))
        position += RECORD_HEADER.size + (record.length if record.type == DATA else 0)
    return content, records


def cuts_of(content: bytes, records: list[tuple[int, Record]]) -> Iterator[int]:
    """Every border between records, and places within headers and contents."""
    for position, record in records:
        yield from (position, position + 1, position + RECORD_HEADER.size - 1)
        if record.type == DATA:
            yield from (position + RECORD_HEADER.size, position + RECORD_HEADER.size + 1)
            yield position + RECORD_HEADER.size + record.length - 1


@pytest.mark.parametrize("to", ["raw", "qcow2"])
def test_a_torn_stream_is_never_a_success(to: str, tmp_path: Path) -> None:
    writes = [(0, noise(5000)), (200_000, noise(100_000)), (MIB, b"x")]
    source = [make(tmp_path / f"from {number}", "raw", 2 * MIB, writes)._replace(fresh=not number) for number in (0, 1)]
    target = [make(tmp_path / f"to {number}", to, 2 * MIB, []) for number in (0, 1)]
    content, records = stream_of(source, parallel=2)
    assert {record.type for _, record in records} == {DATA, ZERO, DISK_END, END}
    cuts = list(cuts_of(content, records))
    for cut in cuts if to == "raw" else cuts[::5]:
        with arriving(content[:cut]) as incoming, pytest.raises(AgentError) as caught:
            Receiver(incoming, target, lambda _: None).run()
        assert caught.value.kind == errors.INTERRUPTED, f"{cut}: {caught.value}"
        assert not processes(str(tmp_path))
    with arriving(content) as incoming:
        Receiver(incoming, target, lambda _: None).run()
    assert [digests(job) for job in source] == [digests(job) for job in target]


@pytest.mark.parametrize(
    "records",
    [
        [Record(END, 0, 0, 1)],
        [Record(ZERO, 0, 0, 512), Record(END, 0, 0, 0)],
        [Record(DISK_END, 0, 4096, 0), Record(END, 0, 0, 77)],
    ],
)
def test_an_end_that_does_not_fit_what_came(records: list[Record], tmp_path: Path) -> None:
    target = make(tmp_path / "to", "raw", 4096, [])
    with (
        arriving(b"".join(record.pack() for record in records)) as incoming,
        pytest.raises(AgentError) as caught,
    ):
        Receiver(incoming, [target], lambda _: None).run()
    assert caught.value.kind == errors.INTERRUPTED


NOT_RECORDS = {
    "wrong magic": b"KVMX" + Record(END, 0, 0, 0).pack()[4:],
    "text": b"Last login: Thu Jan  1 00:00:00",
    "unknown type": Record(IDLE + 1, 0, 0, 0).pack(),
    "type 0": Record(0, 0, 0, 0).pack(),
    "longer than a chunk": Record(DATA, 0, 0, CHUNK + 1).pack() + bytes(CHUNK + 1),
    "a disk that is not in the request": Record(DATA, 1, 0, 1).pack() + b"x",
    "outside the disk": Record(DATA, 0, 4095, 2).pack() + b"xx",
    "zeros outside the disk": Record(ZERO, 0, 4095, 2).pack(),
    "another size at the end": Record(DISK_END, 0, 8192, 0).pack(),
}


@pytest.mark.parametrize("name", NOT_RECORDS)
def test_what_is_not_the_protocol(name: str, tmp_path: Path) -> None:
    target = make(tmp_path / "to", "raw", 4096, [])
    with (
        arriving(NOT_RECORDS[name] + Record(END, 0, 0, 0).pack()) as incoming,
        pytest.raises(AgentError) as caught,
    ):
        Receiver(incoming, [target], lambda _: None).run()
    assert caught.value.kind == errors.PROTOCOL
    assert Path(target.path).stat().st_size == 4096


@pytest.mark.parametrize("size", [0, 1, 3 * MIB])
def test_a_source_that_shrinks_under_the_sender(size: int, tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 8 * MIB, [(0, noise(4 * MIB)), (6 * MIB, noise(2 * MIB))])
    incoming, out = os.pipe()
    sender = Sender(out, [source], 1, 0)
    failures: list[AgentError] = []

    def send() -> None:
        try:
            sender.run()
        except AgentError as error:
            failures.append(error)
        finally:
            os.close(out)

    thread = threading.Thread(target=send)
    thread.start()
    os.read(incoming, 1)
    os.truncate(source.path, size)
    while os.read(incoming, MIB):
        pass
    thread.join()
    os.close(incoming)
    assert [source.path in str(error) for error in failures] == [True]
    assert failures[0].kind == errors.IO


def test_a_source_that_shrinks_before_a_hole_is_looked_for(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", 8 * MIB, [(0, b"x"), (4 * MIB, b"y")])
    disk = FileDisk(str(path))
    extents = disk.extents()
    next(extents)
    os.truncate(path, MIB)
    with pytest.raises(OSError):
        list(extents)
    disk.close()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    missing = Job(str(tmp_path / "nowhere"), "raw")
    with pytest.raises(AgentError, match="nowhere") as caught:
        copy([missing], [make(tmp_path / "to", "raw", 512, [])])
    assert caught.value.kind == errors.MISSING


def test_a_receiver_that_goes_away(tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 8 * MIB, [(0, noise(8 * MIB))])
    incoming, out = os.pipe()
    os.close(incoming)
    with pytest.raises(AgentError) as caught:
        Sender(out, [source], 1, 0).run()
    os.close(out)
    assert caught.value.kind == errors.INTERRUPTED


def test_a_full_target(small: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 16 * MIB, [(0, noise(16 * MIB))])
    for format_ in ("raw", "qcow2"):
        target = make(small / format_, format_, 16 * MIB, [])
        with pytest.raises(AgentError, match=f"writing {target.path}") as caught:
            receive_only([source], [target])
        assert caught.value.kind == errors.NO_SPACE
        os.unlink(target.path)


def receive_only(source: Sequence[Job], target: Sequence[Job]) -> None:
    content, _ = stream_of(source)
    with arriving(content) as incoming:
        Receiver(incoming, list(target), lambda _: None).run()


SILENT_AFTER = {
    "nothing": 0,
    "a record": RECORD_HEADER.size,
    "a part of a header": RECORD_HEADER.size + 7,
    "a data record's header": 2 * RECORD_HEADER.size,
    "a part of a data record": 2 * RECORD_HEADER.size + 2048,
}


@pytest.mark.parametrize(
    ("after", "how"), [*((after, "pipe") for after in SILENT_AFTER), ("a part of a data record", "socket")]
)
def test_silence(after: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.1)
    content = Record(IDLE, 0, 0, 0).pack() + Record(DATA, 0, 0, 4096).pack() + noise(4096)
    target = make(tmp_path / "to", "qcow2", 4096, [])
    with arriving(content[: SILENT_AFTER[after]], how=how, then_silence=True) as incoming:
        with pytest.raises(AgentError, match="nothing came from the source") as caught:
            Receiver(incoming, [target], lambda _: None).run()
        assert caught.value.kind == errors.INTERRUPTED
    assert not processes(str(tmp_path))


def test_idle_records_break_the_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(transfer, "IDLE_SECONDS", 0.1)
    size = 2 * 4096
    source = make(tmp_path / "from", "raw", size, [(0, noise(size))])
    target = make(tmp_path / "to", "raw", size, [])
    assert copy([source], [target], rate=8192) == [size]
    assert Path(target.path).read_bytes() == noise(size)


def test_flags_of_a_record_survive_the_wire() -> None:
    record = Record(DATA, 65_535, (1 << 64) - 1, CHUNK, COMPRESSED)
    assert unpack_record(record.pack()) == record
    with pytest.raises(ProtocolError):
        unpack_record(bytes(RECORD_HEADER.size))


DEVICE_SIZE = 5 * MIB
DEVICE_WRITES = [(70_000, b"x"), (2 * MIB, noise(MIB)), (4 * MIB - 5, bytes(10)), (DEVICE_SIZE - 1, b"x")]
DEVICE_DATA = MIB + 2 * 64 * KIB
"""Bytes: what is written in whole blocks of 64 KiB, those of which are zeros left out."""


@pytest.mark.parametrize("rate", [0, 8 * MIB, 1 << 40])
@pytest.mark.parametrize("to", ["raw", "qcow2"])
def test_blocks_of_zeros_on_a_device_are_not_sent(to: str, rate: int, tmp_path: Path) -> None:
    """Whatever a rate makes of the pieces."""
    target = make(tmp_path / "to", to, DEVICE_SIZE, [])
    with device(make_raw(tmp_path / "from", DEVICE_SIZE, DEVICE_WRITES)) as path:
        (written,) = copy([Job(str(path), "raw")], [target], rate=rate)
        assert content_of(target) == path.read_bytes()
    assert written == DEVICE_DATA
    assert stored(target) <= DEVICE_DATA + MIB


@pytest.mark.parametrize("to", ["raw", "qcow2"])
def test_zeros_on_a_device_are_told_to_a_target_that_has_old_data(to: str, tmp_path: Path) -> None:
    target = make(tmp_path / "to", to, DEVICE_SIZE, [(0, noise(DEVICE_SIZE, 9))])._replace(fresh=False)
    ranges = [[0, MIB], [MIB + 4096, 3 * MIB - 512]]
    with device(make_raw(tmp_path / "from", DEVICE_SIZE, DEVICE_WRITES)) as path:
        copy([Job(str(path), "raw", fresh=False, ranges=ranges)], [target])
        new, old = path.read_bytes(), noise(DEVICE_SIZE, 9)
    expected = new[:MIB] + old[MIB : MIB + 4096] + new[MIB + 4096 : 3 * MIB - 512] + old[3 * MIB - 512 :]
    assert content_of(target) == expected


def test_a_device_of_zeros_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to read what need not be sent, the receiver hears of its sender."""
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(transfer, "IDLE_SECONDS", 0.1)
    read_slowly = FileDisk.content

    def content(disk: FileDisk, piece: Extent) -> memoryview:
        time.sleep(0.05)
        return read_slowly(disk, piece)

    monkeypatch.setattr(FileDisk, "content", content)
    target = make(tmp_path / "to", "raw", 40 * CHUNK, [])
    with device(make_raw(tmp_path / "from", 40 * CHUNK, [])) as path:
        assert copy([Job(str(path), "raw")], [target]) == [0]
    assert stored(target) == 0


def over(directory: Path, base_format: str, size: int) -> tuple[Path, Job]:
    """A base with stale content, shorter than what it is to become, and an empty overlay on it."""
    stale = [(0, noise(MIB, 8)), (2 * MIB, noise(MIB, 9))]
    base = make(directory / "base", base_format, 3 * MIB, stale)
    return Path(base.path), Job(str(make_overlay(directory / "over", Path(base.path), base_format, size)), "qcow2")


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("from_", ["raw", "qcow2", "compressed"])
def test_what_differs_is_sent_into_an_overlay(from_: str, base_format: str, tmp_path: Path) -> None:
    """Zeros are written where there is old data below, and what is below stays as it was."""
    source = source_of(from_, tmp_path)
    whole = content_of(source)
    base, target = over(tmp_path, base_format, len(whole))
    before = base.read_bytes()
    there = content_of(target)
    unit = 64 * KIB
    differs = [
        [at, min(at + unit, len(whole))] for at in range(0, len(whole), unit) if there[at:][:unit] != whole[at:][:unit]
    ]
    assert any(not any(whole[start:end]) for start, end in differs), "some of it is zeros over old data"
    copy([source._replace(fresh=False, ranges=differs)], [target._replace(fresh=False)])
    assert content_of(target) == whole
    assert digests(target) == digests(source)
    assert base.read_bytes() == before


def test_nothing_lands_in_an_overlay_but_what_was_sent(tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 3 * MIB, [(0, noise(3 * MIB, 5))])
    _, target = over(tmp_path, "raw", 3 * MIB)
    there = content_of(target)
    assert copy([source._replace(fresh=False, ranges=[[MIB, MIB + 64 * KIB]])], [target]) == [64 * KIB]
    assert content_of(target) == there[:MIB] + content_of(source)[MIB:][: 64 * KIB] + there[MIB + 64 * KIB :]
    assert os.stat(target.path).st_blocks * 512 < MIB


def test_zeros_over_zeros_leave_an_overlay_empty(tmp_path: Path) -> None:
    source = make(tmp_path / "from", "raw", 3 * MIB, [])
    base = make_raw(tmp_path / "base", 2 * MIB)
    target = Job(str(make_overlay(tmp_path / "over", base, "raw", 3 * MIB)), "qcow2")
    before = stored(target)
    copy([source._replace(fresh=False)], [target])
    assert stored(target) == before
    assert content_of(target) == bytes(3 * MIB)


def test_an_overlay_that_was_cut_off_is_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DURABLE_LEAST", 256 * KIB)
    source = make(tmp_path / "from", "raw", 3 * MIB, [(0, noise(3 * MIB, 5))])
    _, target = over(tmp_path, "raw", 3 * MIB)
    content, _ = stream_of([source._replace(fresh=False)])
    durable = max(receive(content, target, cut=len(content) // 2))
    assert 0 < durable < 3 * MIB
    there, whole = content_of(target), content_of(source)
    assert there[:durable] == whole[:durable]
    assert resume(source, target, durable) == 3 * MIB - durable
    assert content_of(target) == whole
