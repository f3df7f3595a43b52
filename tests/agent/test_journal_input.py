"""A journal is input: whoever can write in a pool's directory may have put it there."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent import names
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import leftovers
from kvm_clone.agent.staging.journal import LARGEST, Journal
from kvm_clone.agent.staging.stage import Stage

from .journals import NAME, OPERATION, Record, begin, create, identity_of, journal_path, line, overlay, plant, publish
from .tools import as_nobody, lacking, make_raw

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    directory = tmp_path / "pool"
    directory.mkdir()
    (directory / "base.raw").write_bytes(b"a VM's")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "other").mkdir()
    return directory


def contents(root: Path) -> dict[str, bytes | str]:
    """Everything below the directory, but the locks."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        if "locks" not in path.parts:
            found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else "no file"
    return found


Act = Callable[[Path, str], object]


def durable(ranges: Any) -> dict[str, Any]:
    return {"record": "durable", "disk": "vda", "end": 4, "ranges": ranges}


def begins(pool: Path, operation: str, **how: Any) -> None:
    Stage(str(pool), NAME, operation, {}, directories=[str(pool)], **how).abandon()


ACTS: dict[str, Act] = {
    "recover": lambda pool, operation: leftovers.recover(str(pool), NAME, operation, [str(pool)]),
    "settle, committed": lambda pool, operation: leftovers.record_outcome(
        str(pool), NAME, operation, [str(pool)], committed=True
    ),
    "settle, withdrawn": lambda pool, operation: leftovers.record_outcome(
        str(pool), NAME, operation, [str(pool)], committed=False
    ),
    "begin": lambda pool, operation: begins(pool, "10", discards=operation),
    "resume": lambda pool, operation: begins(pool, operation, resume=True),
    "finish": lambda pool, operation: begins(pool, operation, finishing=True),
}


FORGED: dict[str, Callable[[Path], list[object]]] = {
    "no record": lambda pool: [[1, 2]],
    "null in the midst": lambda pool: [begin(), None, create(pool)],
    "a text": lambda pool: ["begin"],
    "no kind": lambda pool: [{"operation": OPERATION, "name": NAME}],
    "a kind that is no text": lambda pool: [{**begin(), "record": ["begin"]}],
    "a begin without a name": lambda pool: [{"record": "begin"}],
    "a name of another type": lambda pool: [begin(name=5)],
    "an operation of another type": lambda pool: [begin(operation=5)],
    "an operation with a slash": lambda pool: [begin(operation="../x"), create(pool)],
    "an empty operation": lambda pool: [begin(operation="")],
    "an operation like an option": lambda pool: [begin(operation="-x")],
    "a source of another type": lambda pool: [begin(source="kc-a")],
    "a host of another type": lambda pool: [begin(host={"machine": 5})],
    "marks that are no paths": lambda pool: [begin(marks=["relative"])],
    "marks with detours": lambda pool: [begin(marks=["/etc/../etc"])],
    "a process below zero": lambda pool: [begin(process=-1)],
    "an unknown record": lambda pool: [begin(), {"record": "frobnicate"}],
    "two begins": lambda pool: [begin(), begin()],
    "no begin": lambda pool: [create(pool)],
    "durable before create": lambda pool: [begin(), {"record": "durable", "disk": "vda", "end": 5}],
    "publish before create": lambda pool: [begin(), publish(pool)],
    "publish of another disk": lambda pool: [begin(), create(pool), publish(pool, "vdb")],
    "retract before create": lambda pool: [begin(), {"record": "retract", "disk": "vda"}],
    "an end that is a text": lambda pool: [begin(), create(pool), {"record": "durable", "disk": "vda", "end": "x"}],
    "an end below zero": lambda pool: [begin(), create(pool), {"record": "durable", "disk": "vda", "end": -1}],
    "an end that is true": lambda pool: [begin(), create(pool), {"record": "durable", "disk": "vda", "end": True}],
    "a range that ends before it begins": lambda pool: [begin(), create(pool), durable([[8, 4]])],
    "ranges out of order": lambda pool: [begin(), create(pool), durable([[8, 9], [4, 5]])],
    "a range of three ends": lambda pool: [begin(), create(pool), durable([[1, 2, 3]])],
    "ranges that are none": lambda pool: [begin(), create(pool), durable("x")],
    "an endless end": lambda pool: [begin(), create(pool), {"record": "durable", "disk": "vda", "end": 1 << 64}],
    "a create without a size": lambda pool: [begin(), {**create(pool), "size": None}],
    "a disk with a slash": lambda pool: [begin(), create(pool, disk="a/b")],
    "a disk that is no text": lambda pool: [begin(), {**create(pool), "disk": {}}],
    "a format that we do not stage": lambda pool: [begin(), create(pool, format="vmdk")],
    "a part that is not ours": lambda pool: [begin(), create(pool, part=str(pool.parent / "precious"))],
    "a part of the operation in another directory": lambda pool: [
        begin(),
        create(pool, part=f"{pool.parent}/other/.kvm-clone-{OPERATION}-vda.part"),
    ],
    "a part of another operation": lambda pool: [begin(), create(pool, part=f"{pool}/.kvm-clone-77-vda.part")],
    "a part of another disk": lambda pool: [begin(), create(pool, part=f"{pool}/.kvm-clone-{OPERATION}-vdb.part")],
    "a final in another directory": lambda pool: [
        begin(),
        create(pool, part=f"{pool.parent}/.kvm-clone-{OPERATION}-vda.part", final=f"{pool.parent}/precious"),
    ],
    "a final with detours": lambda pool: [
        begin(),
        create(pool, part=f"{pool}/../.kvm-clone-{OPERATION}-vda.part", final=f"{pool}/../precious"),
    ],
    "a final that is a journal of ours": lambda pool: [begin(), create(pool, final=f"{pool}/.kvm-clone-77-vda.part")],
    "a final with a zero byte": lambda pool: [begin(), create(pool, final=f"{pool}/a\0b")],
    "a published file that is not ours": lambda pool: [
        begin(),
        create(pool),
        publish(pool, final=f"{pool.parent}/precious", identity=identity_of(pool.parent / "precious")),
    ],
    "a published file beside": lambda pool: [
        begin(),
        create(pool),
        publish(pool, final=f"{pool}/base.raw", identity=identity_of(pool / "base.raw")),
    ],
    "a publish without an identity": lambda pool: [begin(), create(pool), {**publish(pool), "identity": None}],
    "a backing of another form": lambda pool: [begin(), create(pool, backing={"path": "/x"})],
    "a backing that is no path": lambda pool: [
        begin(),
        create(pool, backing={"path": "nbd://x", "format": "raw", "fingerprint": "1:2:3:4:5"}),
    ],
    "a merge of another form": lambda pool: [begin(), {**overlay(pool), "merge": {}}, {"record": "committed"}],
    "an overlay that is not ours": lambda pool: [
        begin(),
        overlay(pool, path=str(pool / "base.raw")),
        {"record": "committed"},
    ],
    "an overlay of another operation": lambda pool: [
        begin(),
        overlay(pool, path=str(pool / "kvm-clone-77-vda.qcow2")),
        {"record": "committed"},
    ],
    "an overlay on a base in another directory": lambda pool: [
        begin(),
        overlay(
            pool, base=f"{pool.parent}/precious", path=f"{pool.parent}/kvm-clone-{OPERATION}-vda.qcow2"
        ),
        {"record": "committed"},
    ],
    "an overlay of a disk with a slash": lambda pool: [begin(), overlay(pool, disk="../x")],
    "images of another form": lambda pool: [begin(), {**overlay(pool), "images": {"vda": "x"}}],
    "a remove of another form": lambda pool: [begin(), {**overlay(pool), "remove": [5]}],
    "a merged that does not say how": lambda pool: [begin(), overlay(pool), {"record": "merged"}],
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_journal_does_nothing(what: str, pool: Path) -> None:
    """It is named and left as it is, whoever comes along."""
    path = plant(pool, FORGED[what](pool))
    for final in (pool / "vda.raw", pool / "kvm-clone-77-vda.qcow2"):
        final.write_bytes(b"somebody's")
    before = contents(pool.parent)
    (found,) = leftovers.staged([str(pool)])
    assert found == {"directory": str(pool), "path": str(path), "error": found["error"]}
    assert "journal" in found["error"]
    for act in ACTS.values():
        with suppress(AgentError):
            act(pool, OPERATION)
        assert contents(pool.parent) == before
    with pytest.raises(AgentError) as caught:
        begins(pool, "10", discards=OPERATION)
    assert caught.value.kind == errors.UNSUPPORTED


def test_a_journal_that_counts_is_undone(pool: Path) -> None:
    """What the forged ones are beside: the table above is no proof without it."""
    part, final = Path(create(pool)["part"]), pool / "vda.raw"
    for published in (False, True):
        (final if published else part).write_bytes(b"staged")
        plant(pool, [begin(marks=[str(pool)]), create(pool), *([publish(pool)] if published else [])])
        Path(names.mark_path(OPERATION, str(pool))).touch()
        (found,) = leftovers.staged([str(pool)])
        assert found["operation"] == OPERATION
        assert leftovers.recover(str(pool), NAME, OPERATION, [str(pool)]) == []
        assert {entry.name for entry in pool.iterdir()} == {"base.raw"}


def test_the_directories_that_are_asked_about_count(pool: Path) -> None:
    """A second pool's directory is one only where libvirt has it as a pool."""
    other = pool.parent / "other"
    plant(pool, [begin(), create(pool), create(other, "vdb")])
    (found,) = leftovers.staged([str(pool)])
    assert "none of ours would have put a disk" in found["error"]
    found, *more = leftovers.staged([str(pool), str(other)])
    assert set(found["disks"]) == {"vda", "vdb"}
    assert more == []
    with pytest.raises(AgentError, match="none of ours"):
        leftovers.recover(str(pool), NAME, OPERATION, [str(pool)])
    assert leftovers.recover(str(pool), NAME, OPERATION, [str(pool), str(other)]) == []


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "random bytes": lambda pool: os.urandom(100_000) + b"\n\n",
    "a deep record": lambda pool: line(begin()) + deep() + line(create(pool)),
    "a record with a wrong sum": lambda pool: line(begin()).replace(b"clone", b"Clone", 1) + line(create(pool)),
    "binary in the midst": lambda pool: line(begin()) + bytes(range(256)) + b"\n" + line(create(pool)),
    "a number that is none": lambda pool: line(begin()) + line({**create(pool), "size": float("nan")}),
}


def deep() -> bytes:
    body = b"[" * 100_000 + b"]" * 100_000
    return b"%08x %s\n" % (zlib.crc32(body), body)


@pytest.mark.parametrize("what", CONTENTS)
def test_a_journal_of_any_bytes_is_left_alone(what: str, pool: Path) -> None:
    plant(pool, CONTENTS[what](pool))
    before = contents(pool.parent)
    (found,) = leftovers.staged([str(pool)])
    assert "error" in found
    for act in ACTS.values():
        with pytest.raises(AgentError):
            act(pool, OPERATION)
    assert contents(pool.parent) == before


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)
        listener.bind(path.name)


def linked(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(line(begin()) + line(create(path.parent)))
    path.symlink_to(target)


def hard_linked(path: Path) -> None:
    plant(path.parent, [begin(), create(path.parent)])
    (path.parent.parent / "another name").hardlink_to(path)


def of_another(path: Path) -> None:
    if os.geteuid() != 0:
        lacking("giving files away needs root")
    plant(path.parent, [begin(), create(path.parent)])
    os.chown(path, 1, 1)


def with_mode(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        plant(path.parent, [begin(), create(path.parent)])
        path.chmod(mode)

    return make


def large(path: Path) -> None:
    plant(path.parent, [begin()])
    os.truncate(path, LARGEST + 1)


def device(path: Path) -> None:
    if os.geteuid() != 0:
        lacking("making a device needs root")
    os.mknod(path, 0o020600, os.makedev(1, 5))  # /dev/zero: endless


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "no regular file"),
    "a socket": (bound, "no regular file"),
    "a device": (device, "no regular file"),
    "a directory": (Path.mkdir, "no regular file"),
    "a link to a journal": (linked, "no regular file"),
    "a link to nowhere": (lambda path: path.symlink_to("/nowhere/at all"), "no regular file"),
    "a link to itself": (lambda path: path.symlink_to(path), "no regular file"),
    "a file with another name": (hard_linked, "has another name"),
    "another user's": (of_another, "belongs to another user"),
    "one that the group can write": (with_mode(0o620), "can be written by others"),
    "one that all can write": (with_mode(0o602), "can be written by others"),
    "a very large one": (large, "is larger than"),
}


@pytest.fixture
def stays() -> Iterator[None]:
    """The working directory is where it was afterwards."""
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.mark.usefixtures("stays")
@pytest.mark.parametrize("what", FILES)
def test_what_is_no_file_of_ours_is_refused_by_name(what: str, pool: Path) -> None:
    """It is never followed, waited for, or removed; journals of other VMs count beside it."""
    make, why = FILES[what]
    path = journal_path(pool)
    make(path)
    plant(pool, [begin(name="other"), create(pool, "vdz")], "other")
    kinds = {entry.name: os.lstat(entry).st_mode for entry in pool.iterdir()}
    started = time.monotonic()
    by_path = {found["path"]: found for found in leftovers.staged([str(pool)])}
    assert why in by_path[str(path)]["error"]
    assert str(path) in by_path[str(path)]["error"]
    assert by_path[str(journal_path(pool, "other"))]["operation"] == OPERATION
    for act in ACTS.values():
        with pytest.raises(AgentError, match=why) as caught:
            act(pool, OPERATION)
        assert caught.value.kind == errors.UNSUPPORTED
    with suppress(FileExistsError), pytest.raises(AgentError):
        Journal(str(path)).close()
    assert {entry.name: os.lstat(entry).st_mode for entry in pool.iterdir()} == kinds
    assert time.monotonic() - started < 10


def test_a_journal_that_we_may_not_read(open_to_all: Path) -> None:
    path = plant(open_to_all, [begin()])
    other = plant(open_to_all, [begin(name="other")], "other")
    other.chmod(0o644)
    with as_nobody():
        found = {one["path"]: one["error"] for one in leftovers.staged([str(open_to_all)])}
    assert "Permission denied" in found[str(path)]
    if os.geteuid() == 0:
        assert "error" not in leftovers.staged([str(open_to_all)], "other")[0], "root's own"


def test_a_server_that_gives_roots_files_to_somebody_else(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with NFS and root_squash: what we make there belongs to nobody, and so may our journal."""
    if os.geteuid() != 0:
        lacking("giving files away needs root")
    path = plant(pool, [begin()])
    os.chown(path, 65534, 65534)
    assert "another user" in leftovers.staged([str(pool)])[0]["error"]
    real = os.fstat

    def squashed(fd: int) -> os.stat_result:
        about = real(fd)
        probe = os.readlink(f"/proc/self/fd/{fd}").endswith(".probe")
        return os.stat_result([*about[:4], 65534, *about[5:]]) if probe else about

    monkeypatch.setattr(os, "fstat", squashed)
    assert leftovers.staged([str(pool)])[0]["operation"] == OPERATION
    assert {entry.name for entry in pool.iterdir()} == {path.name, "base.raw"}


def test_a_directory_in_which_others_can_write_all_files(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a FAT filesystem that is mounted with umask=0."""
    real = os.open

    def open_(path: str, flags: int, mode: int = 0o777, **how: Any) -> int:
        fd = real(path, flags, mode, **how)
        if flags & os.O_CREAT and str(path).endswith(".journal"):
            os.fchmod(fd, 0o666)
        return fd

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(AgentError, match="no journal is safe there"):
        begins(pool, "10")
    assert {entry.name for entry in pool.iterdir()} == {"base.raw"}


def test_many_journals_are_bounded(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "MOST_JOURNALS", 3)
    for number in range(5):
        plant(pool, [begin(name=str(number))], str(number))
    *found, last = leftovers.staged([str(pool)])
    assert [one["operation"] for one in found] == [OPERATION] * 3
    assert "more than 3 journals" in last["error"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([OPERATION, NAME, "vda", "raw", "POOL/vda.raw", "POOL/base.raw", "ROOT/precious", "1:2:3"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["disk", "path", "base", "base_format", "vda"]) | st.text(max_size=3), inner)
    ),
    max_leaves=4,
)
KINDS = (
    "begin",
    "create",
    "durable",
    "copied",
    "publish",
    "retract",
    "define",
    "withdrawn",
    "committed",
    "merged",
    "x",
)
FIELDS = ("disk", "part", "final", "size", "end", "identity", "format", "backing", "merge", "images", "remove", "marks")
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)


def entry(kind: str, changes: Record, pool: Path, *, whole: bool) -> object:
    right: dict[str, Record] = {
        "begin": begin(),
        "create": create(pool),
        "publish": publish(pool),
        "define": overlay(pool),
        "durable": {"record": "durable", "disk": "vda", "end": 5},
        "merged": {"record": "merged", "untouched": True},
    }
    record = right.get(kind, {"record": kind, "disk": "vda"}) if whole else {"record": kind}
    text = json.dumps({**record, **changes}).replace("POOL", str(pool)).replace("ROOT", str(pool.parent))
    return json.loads(text)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), CHANGES, st.booleans()), max_size=6),
    st.lists(VALUES, max_size=1),
    st.sampled_from(sorted(ACTS)),
)
def test_no_records_make_anybody_remove_what_they_may_not_name(
    entries: list[tuple[str, Record, bool]], more: list[object], act: str
) -> None:
    """Whatever they say, only our names go, and final names of disks that they made."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        root = Path(directory)
        pool = root / "pool"
        pool.mkdir()
        patched.setattr(names, "_lock_directory", lambda: str(root / "locks"))
        for path in (pool / "base.raw", root / "precious", pool / f".kvm-clone-{OPERATION}-vda.part"):
            make_raw(path, 4096)
        said = [begin(), *(entry(kind, changes, pool, whole=whole) for kind, changes, whole in entries), *more]
        plant(pool, said)
        before = contents(root)
        for found in leftovers.staged([str(pool)]):
            assert ("error" in found) != ("operation" in found)
        with suppress(AgentError, OSError):
            ACTS[act](pool, OPERATION)
        gone = {path for path in before if path not in contents(root)}
        assert gone <= {str(journal_path(pool)), f"{pool}/.kvm-clone-{OPERATION}-vda.part"}
        assert (pool / "base.raw").read_bytes() == (root / "precious").read_bytes() == bytes(4096)
