"""The journal: what was appended is there after any crash."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import records
from kvm_clone.agent.staging.journal import Journal, encode, replay

from .tools import ending, lacking, python

DISK = {"disk": "vda", "part": "/line\nbreak/.kvm-clone-0f-vda.part", "final": "/line\nbreak/\u00e4 \u4e16"}
RECORDS: list[dict[str, Any]] = [
    {"record": "begin", "operation": "0f", "name": "a 'quoted' \"name\"", "started": 1.5},
    {"record": "create", **DISK, "size": 2**40, "format": "raw"},
    {"record": "publish", **DISK, "device": 2**40, "identity": "1:2:3"},
]
CONTENT = b"".join(map(encode, RECORDS))
LAST = len(CONTENT) - len(encode(RECORDS[-1]))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5), st.text())
def test_round_trip(more: list[dict[str, Any]], name: str) -> None:
    """What later versions may add to a record is kept."""
    wanted = [{**RECORDS[0], "name": name}, *({**one, "record": "define"} for one in more)]
    wanted = [{**wanted[0], **one} if number == 0 else known(one) for number, one in enumerate(wanted)]
    content = b"".join(map(encode, wanted))
    assert replay(content) == (wanted, len(content))


def known(define: dict[str, Any]) -> dict[str, Any]:
    """The record without the fields that have a form."""
    formed = ("uuid", "remove", "forget", "merge", "images", "disk")
    return {key: value for key, value in define.items() if key not in formed}


def test_a_record_is_one_line_of_ascii() -> None:
    for record in RECORDS:
        assert encode(record).isascii()
        assert encode(record).count(b"\n") == 1


@pytest.mark.parametrize("garbage", [b"", b"\0" * 100, b"\xff"])
def test_a_torn_last_record_never_was(garbage: bytes) -> None:
    for cut in range(LAST, len(CONTENT)):
        assert replay(CONTENT[:cut] + garbage) == (RECORDS[:-1], LAST)


def damaged(at: int) -> bytes:
    content = bytearray(CONTENT)
    content[at] ^= 0x80
    return bytes(content)


def test_a_damaged_last_record_never_was() -> None:
    for at in range(LAST, len(CONTENT) - 1):
        assert replay(damaged(at)) == (RECORDS[:-1], LAST)


def test_a_damaged_inner_record_is_an_error() -> None:
    # A newline that is gone makes one line of two, and the last line of the file cannot be told from a torn one.
    for at in range(LAST - 1):
        with pytest.raises(AgentError, match="damaged") as caught:
            replay(damaged(at))
        assert caught.value.kind == errors.UNSUPPORTED


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"half a line", b"\n", b"00000000 {}\n"])
def test_nothing_that_counts(content: bytes) -> None:
    assert replay(content) == ([], 0)


def append(opened: Journal, entry: dict[str, Any]) -> None:
    opened.append(entry["record"], **{key: value for key, value in entry.items() if key != "record"})


HISTORIES = st.lists(
    st.tuples(st.sampled_from(["copied", "durable", "retract"]), st.integers(0, 1 << 40), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(HISTORIES, st.data())
def test_a_history_torn_at_any_byte_replays_its_last_durable_state(
    history: list[tuple[str, int, bool]], data: st.DataObject
) -> None:
    """Appends, now and then torn off at a byte, and gone on with by another run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        path.write_bytes(b"".join(map(encode, RECORDS[:2])))
        path.chmod(0o600)
        opened, durable = Journal(str(path), resume=True), RECORDS[:2]
        for record, end, torn in history:
            before = len(b"".join(map(encode, durable)))
            opened.append(record, disk="vda", end=end)
            durable = [*durable, {"record": record, "disk": "vda", "end": end}]
            if torn:
                opened.close()
                length = data.draw(st.integers(before, path.stat().st_size))
                if length < path.stat().st_size:
                    durable = durable[:-1]
                os.truncate(path, length)
                assert replay(path.read_bytes()).records == durable
                opened = Journal(str(path), resume=True)
            assert opened.records == durable
        opened.close()
        assert replay(path.read_bytes()).records == durable


def test_going_on_drops_the_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for cut in range(len(CONTENT) + 1):
        path.write_bytes(CONTENT[:cut])
        path.chmod(0o600)
        opened = Journal(str(path), resume=True)
        kept = list(opened.records)
        assert path.read_bytes() == CONTENT[:cut], "opening changes nothing"
        following = {"record": "define"} if kept else RECORDS[0]
        append(opened, following)
        opened.close()
        assert replay(path.read_bytes()).records == [*kept, following]
        assert kept == RECORDS[: sum(cut >= len(b"".join(map(encode, RECORDS[:count]))) for count in (1, 2, 3))]


def test_what_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal(str(tmp_path / "missing"), resume=True)
    (tmp_path / "damaged").write_bytes(damaged(10))
    (tmp_path / "damaged").chmod(0o600)
    with pytest.raises(AgentError, match="damaged"):
        Journal(str(tmp_path / "damaged"), resume=True)
    assert (tmp_path / "damaged").read_bytes() == damaged(10)
    (tmp_path / "link").symlink_to(tmp_path / "damaged")
    with pytest.raises(AgentError, match="no regular file"):
        Journal(str(tmp_path / "link"), resume=True)


WRITER = """
import sys
from kvm_clone.agent.staging.journal import Journal
journal = Journal(sys.argv[1])
journal.append("begin", operation="0f", name="a name")
journal.append("define", number=1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_appended_records_outlive_their_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with ending(python(WRITER, path)) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert replay(path.read_bytes()).records == [
        {"record": "begin", "operation": "0f", "name": "a name"},
        {"record": "define", "number": 1},
    ]


def test_append_is_durable_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    synced: list[bytes] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    opened = Journal(str(path))
    append(opened, RECORDS[0])
    assert synced == [encode(RECORDS[0])]
    assert opened.records == replay(synced[-1]).records
    opened.remove()
    assert not list(tmp_path.iterdir())


def test_an_existing_journal_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(CONTENT)
    with pytest.raises(FileExistsError):
        Journal(str(path))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Journal(str(tmp_path / "link"))
    assert path.read_bytes() == CONTENT
    assert not (tmp_path / "elsewhere").exists()


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    Journal(str(tmp_path / "journal")).close()
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600


def test_a_record_that_found_no_room_does_not_spoil_the_next(small: Path) -> None:
    opened = Journal(str(small / "journal"))
    append(opened, RECORDS[0])
    space = os.statvfs(small)
    (small / "filler").write_bytes(bytes((space.f_bavail - 1) * space.f_frsize))
    with pytest.raises(OSError):
        opened.append("define", uuid="x" * 64 * 1024)
    (small / "filler").unlink()
    opened.append("define", uuid="y")
    opened.close()
    assert replay((small / "journal").read_bytes()).records == opened.records
    assert [record.get("uuid") for record in opened.records] == [None, "y"]


def test_a_full_disk_at_begin() -> None:
    if not os.path.exists("/dev/full"):
        lacking("/dev/full is not there")
    opened = Journal.__new__(Journal)
    opened.path, opened.records, opened._fd, opened._end = "/dev/full", [], os.open("/dev/full", os.O_WRONLY), 0
    with pytest.raises(OSError):
        opened.append(records.BEGIN)
    assert opened.records == []
    opened.close()


NAMES = (
    "begin",
    "create",
    "durable",
    "copied",
    "proven",
    "publish",
    "retract",
    "define",
    "withdrawn",
    "committed",
    "merging",
    "merged",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_records(name: str) -> None:
    """Later versions read the journals of this one."""
    assert getattr(records, name.upper()) == name
