"""The lock on an operation: who has lost it changes nothing, and nothing gets past its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import names
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import journal, leftovers, records
from kvm_clone.agent.staging.hold import Hold
from kvm_clone.agent.staging.lock import OperationLock
from kvm_clone.agent.staging.stage import Stage

from .journals import NAME, OPERATION, here, journal_path, plant
from .synced import Synced
from .tools import as_nobody, eventually, need

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]

SPEC = {"format": "raw", "size": 4096, "options": {}, "mode": 0o600, "user": "root", "group": "root"}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    directory = tmp_path / "pool"
    directory.mkdir()
    return directory


def begin(pool: Path, operation: str = OPERATION, **how: Any) -> Stage:
    return Stage(str(pool), NAME, operation, {}, directories=[str(pool)], **how)


def contents(pool: Path) -> dict[str, tuple[int, bytes]]:
    return {entry.name: (entry.stat().st_ino, entry.read_bytes()) for entry in pool.iterdir() if entry.is_file()}


def identity(path: Path) -> str:
    about = os.lstat(path)
    return f"{about.st_dev}:{about.st_ino}"


Lose = Callable[[Path, Path], object]


def lock_gone(locks: Path, pool: Path) -> None:
    for path in locks.iterdir():
        path.unlink()


def lock_taken(locks: Path, pool: Path) -> OperationLock:
    lock_gone(locks, pool)
    return OperationLock(names.lock_path(NAME), {"operation": "another"})


def journal_gone(locks: Path, pool: Path) -> None:
    journal_path(pool).unlink()


def journal_replaced(locks: Path, pool: Path) -> None:
    journal_path(pool).unlink()
    plant(pool, [here(operation="77")])


def journal_copied(locks: Path, pool: Path) -> None:
    """Even one that says the same is another one."""
    content = journal_path(pool).read_bytes()
    journal_path(pool).rename(pool / "moved")
    plant(pool, content)


def lock_a_link(locks: Path, pool: Path) -> None:
    (path,) = locks.iterdir()
    path.rename(locks / "moved")
    path.symlink_to(locks / "moved")


LOSE: dict[str, Lose] = {
    "its lock file is removed": lock_gone,
    "another process has taken its lock": lock_taken,
    "a link leads to its lock file": lock_a_link,
    "its journal is removed": journal_gone,
    "its journal is replaced": journal_replaced,
    "its journal is replaced by a copy": journal_copied,
}

CHANGE: dict[str, Callable[[Stage, Path], object]] = {
    "create": lambda staged, pool: staged.create("vdb", str(pool / "vdb.raw"), SPEC),
    "create again": lambda staged, pool: staged.create("vda", str(pool / "vda.raw"), SPEC),
    "publish": lambda staged, pool: staged.publish("vda", str(pool / "vda.raw")),
    "note": lambda staged, pool: staged.note(records.COPIED, {"disk": "vda"}),
    "unmark": lambda staged, pool: staged.unmark(),
    "remove": lambda staged, pool: staged.remove(
        [{"path": str(pool / "old"), "identity": identity(pool / "old")}]
    ),
    "merge": lambda staged, pool: staged.merge(),
    "merged": lambda staged, pool: staged.merged(),
    "undo": lambda staged, pool: staged.undo(),
    "undo past the commit": lambda staged, pool: staged.undo(past_commit=True),
    "finish": lambda staged, pool: staged.finish(),
    "a fence": lambda staged, pool: staged.add_fence(Gate(staged)),
}  # fmt: skip


@pytest.mark.parametrize("how", LOSE)
def test_who_has_lost_the_lock_changes_nothing(how: str, pool: Path, locks: Path) -> None:
    (pool / "old").write_bytes(b"old")
    staged = begin(pool, marks=[str(pool)])
    staged.create("vda", str(pool / "vda.raw"), SPEC)
    other = LOSE[how](locks, pool)
    before = contents(pool), contents(locks)
    assert not staged.is_held
    for act in CHANGE.values():
        with pytest.raises(AgentError, match="is not ours any more") as caught:
            act(staged, pool)
        assert caught.value.kind == errors.LOCKED
        assert (contents(pool), contents(locks)) == before
    staged.abandon()
    after = contents(locks)
    if "lock" not in how:  # what it has still, it lets go of
        assert after == {}
    else:
        assert after == before[1]
    assert contents(pool) == before[0]
    del other


@pytest.mark.parametrize("how", LOSE)
@pytest.mark.parametrize("merged", [False, True])
def test_who_has_lost_the_lock_does_not_merge(merged: bool, how: str, pool: Path, locks: Path) -> None:
    need("qemu-img", "qemu-io")
    synced = Synced(pool, "raw")
    if merged:
        synced.stage.merge()
    other = LOSE[how](locks, pool)
    before = contents(pool)
    for act in (synced.stage.merge, synced.stage.merged, synced.stage.finish):
        with pytest.raises(AgentError, match="is not ours any more"):
            act()
    assert contents(pool) == before
    synced.stage.release()
    assert contents(pool) == before
    del other


def test_the_lock_alone_is_held_without_a_journal(pool: Path, locks: Path) -> None:
    held = Hold(NAME, {"operation": "0f"})
    with pytest.raises(AgentError, match=r"pid \d+, operation 0f"):
        begin(pool)
    (pool / "old").write_bytes(b"old")
    which = [{"path": str(pool / "old"), "identity": identity(pool / "old")}]
    lock_gone(locks, pool)
    for act in (lambda: held.remove(which), lambda: held.add_fence(Gate(held)), held.check):
        with pytest.raises(AgentError, match="is not ours any more"):
            act()
    assert (pool / "old").exists()
    held.release()
    held.abandon()
    assert held.is_over


def replaced(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.write_bytes(b"new")


def made_a_link(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")


def made_a_directory(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.mkdir()


def moved(path: Path) -> None:
    path.rename(path.with_name("kept"))


def below_a_file(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.touch()


REMOVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "the file that was looked at": (lambda path: None, "removed"),
    "another file": (replaced, "error"),
    "a link to it": (made_a_link, "error"),
    "a directory": (made_a_directory, "error"),
    "nothing": (moved, "missing"),
    "nothing below a file": (below_a_file, "error"),
}


@pytest.mark.parametrize("what", REMOVED)
def test_remove_leaves_what_is_not_the_file_that_was_looked_at(what: str, pool: Path) -> None:
    change, expected = REMOVED[what]
    path = pool / "below" / "disk"
    path.parent.mkdir()
    path.write_bytes(b"old")
    about = identity(path)
    change(path)
    before = sorted(str(entry) for entry in pool.rglob("*"))
    held = Hold(NAME, {})
    (answer,) = held.remove([{"path": str(path), "identity": about}])
    assert answer["result"] == expected
    assert answer["path"] == str(path)
    assert bool(answer.get("error")) == (expected == "error")
    after = sorted(str(entry) for entry in pool.rglob("*"))
    assert after == [entry for entry in before if entry != str(path) or expected != "removed"]
    held.release()


def test_removing_is_not_overtaken_by_the_end(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run side by side, and the controller may go away in the midst of one."""
    for number in range(3):
        (pool / str(number)).write_bytes(b"x")
    which = [{"path": str(pool / str(number)), "identity": identity(pool / str(number))} for number in range(3)]
    held = Hold(NAME, {})
    begun, go_on = threading.Event(), threading.Event()
    real = os.unlink

    def slowly(path: str, **how: Any) -> None:
        if str(path).startswith(str(pool)):
            begun.set()
            go_on.wait(10)
            assert held.is_held
        real(path, **how)

    monkeypatch.setattr(os, "unlink", slowly)
    answers: list[dict[str, str]] = []
    removing = threading.Thread(target=lambda: answers.extend(held.remove(which)))
    removing.start()
    begun.wait(10)
    ending = threading.Thread(target=held.abandon)
    ending.start()
    ending.join(0.3)
    assert held.is_held
    go_on.set()
    removing.join()
    ending.join()
    assert [answer["result"] for answer in answers] == ["removed"] * 3
    assert held.is_over


class Gate:
    """A fence that looks, when it is closed, whether the operation is still its holder's."""

    def __init__(self, held: Hold, pool: Path | None = None) -> None:
        self.held = held
        self.pool = pool
        self.seen: list[Any] = []

    def close(self) -> None:
        with suppress(AgentError):
            OperationLock(names.lock_path(NAME), {}).release()
            self.seen.append("the lock can be had")
        if self.pool is not None:
            path = journal_path(self.pool)
            self.seen.append("locked" if journal.look(str(path)).active else "not locked")
            self.seen.append(sorted(contents(self.pool)))


ENDS: dict[str, Callable[[Stage], object]] = {
    "release": lambda staged: staged.release(),
    "abandon": lambda staged: staged.abandon(),
    "undo": lambda staged: staged.undo(),
    "finish": lambda staged: staged.finish(),
}


@pytest.mark.parametrize("how", ENDS)
def test_fences_are_closed_before_anything_else_ends(how: str, pool: Path) -> None:
    """What was asked of libvirt may still be under way: until it has ended, nobody else may begin."""
    staged = begin(pool)
    staged.create("vda", str(pool / "vda.raw"), SPEC)
    gates = [Gate(staged, pool), Gate(staged, pool)]
    for gate in gates:
        staged.add_fence(gate)
    there = sorted(contents(pool))
    ENDS[how](staged)
    for gate in gates:
        assert gate.seen == ["locked", there], "closed once, with everything as it was"
    with pytest.raises(AgentError, match="not ours"):
        staged.add_fence(Gate(staged))
    staged.release()
    assert len(gates[0].seen) == 2


def test_the_fences_of_a_hold(pool: Path) -> None:
    held = Hold(NAME, {})
    gate = Gate(held)
    held.add_fence(gate)
    held.release()
    assert gate.seen == []
    OperationLock(names.lock_path(NAME), {}).release()


def test_an_undo_that_is_refused_closes_no_fence(pool: Path) -> None:
    staged = begin(pool)
    gate = Gate(staged, pool)
    staged.add_fence(gate)
    staged.note(records.DEFINE, {"uuid": "u"})
    with pytest.raises(AgentError, match="libvirt has to be asked"):
        staged.undo()
    assert gate.seen == []
    staged.undo(past_commit=True)
    assert gate.seen


@pytest.fixture
def marked(pool: Path, tmp_path: Path) -> Iterator[list[Path]]:
    """Two directories to be marked."""
    (tmp_path / "other").mkdir()
    yield [pool, tmp_path / "other"]


def marks(directories: list[Path], operation: str = OPERATION) -> list[str | None]:
    return host_info.marks(operation, list(map(str, directories)))


UNMARKS: dict[str, Callable[[Stage, Path], object]] = {
    "unmark": lambda staged, pool: staged.unmark(),
    "undo": lambda staged, pool: staged.undo(),
    "finish": lambda staged, pool: staged.finish(),
    "abandon": lambda staged, pool: staged.abandon(),
    "recover": lambda staged, pool: leftovers.recover(str(pool), NAME, OPERATION, [str(pool)]),
    "the next run": lambda staged, pool: begin(pool, "10", discards=OPERATION).finish(),
    "a resumed one": lambda staged, pool: begin(pool, resume=True).undo(),
}


@pytest.mark.parametrize("how", UNMARKS)
def test_marks_are_made_and_removed(how: str, pool: Path, marked: list[Path]) -> None:
    staged = begin(pool, marks=list(map(str, marked)))
    assert marks(marked) == list(map(str, marked))
    assert marks(marked, "77") == [None, None]
    (pool.parent / "link").symlink_to(pool)
    assert marks([pool.parent / "link", Path("/nowhere")]) == [str(pool), None], "whose way it is, is in it"
    if how in ("recover", "the next run", "a resumed one"):
        staged.release()
    UNMARKS[how](staged, pool)
    assert marks(marked) == [None, None]
    assert not list(marked[1].iterdir())
    staged.release()


def test_marks_are_made_anew_when_an_attempt_is_resumed(pool: Path, marked: list[Path]) -> None:
    staged = begin(pool, marks=list(map(str, marked)))
    staged.release()
    again = begin(pool, resume=True, marks=list(map(str, marked)))
    assert marks(marked) == list(map(str, marked))
    again.undo()
    assert marks(marked) == [None, None]


@pytest.mark.parametrize("how", ["unmark", "undo", "finish", "abandon", "release"])
def test_marks_that_the_first_run_did_not_make_are_removed_too(how: str, pool: Path, marked: list[Path]) -> None:
    begin(pool, marks=[str(pool)]).release()
    again = begin(pool, resume=True, marks=list(map(str, marked)))
    assert marks(marked) == list(map(str, marked))
    getattr(again, how)()
    assert not list(marked[1].iterdir())
    again.release()


def test_a_directory_that_cannot_be_marked(pool: Path, marked: list[Path], locks: Path) -> None:
    with pytest.raises(AgentError, match="marking /nowhere") as caught:
        begin(pool, marks=[*map(str, marked), "/nowhere"])
    assert caught.value.kind == errors.MISSING
    assert not any(list(directory.iterdir()) for directory in (*marked, locks))


def test_a_mark_that_may_not_be_read_is_not_taken_for_none(open_to_all: Path) -> None:
    path = Path(names.mark_path(OPERATION, str(open_to_all)))
    path.touch(mode=0o600)
    with as_nobody(), pytest.raises(AgentError, match=path.name) as caught:
        marks([open_to_all])
    assert caught.value.kind == errors.PERMISSION


ODD_MARKS: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", ODD_MARKS)
def test_what_is_at_a_marks_name_and_is_no_file(kind: str, pool: Path) -> None:
    path = Path(names.mark_path(OPERATION, str(pool)))
    ODD_MARKS[kind](path)
    assert marks([pool]) == [None]
    with pytest.raises(AgentError, match="no regular file"):
        begin(pool, marks=[str(pool)])
    assert os.path.lexists(path)
    assert not (pool.parent / "elsewhere").exists()


WRONG: dict[str, Callable[[Stage, Path], object]] = {
    "a name with detours": lambda staged, pool: staged.create("vdb", f"{pool}/../x", SPEC),
    "a disk with a slash": lambda staged, pool: staged.create("../vdb", str(pool / "x"), SPEC),
    "a name that is ours": lambda staged, pool: staged.create("vdb", str(pool / ".kvm-clone-x"), SPEC),
    "a format of no kind of ours": lambda staged, pool: staged.create("vdb", f"{pool}/x", {**SPEC, "format": "vmdk"}),
    "a disk that was not made": lambda staged, pool: staged.note(records.COPIED, {"disk": "vdb"}),
    "a record of no kind": lambda staged, pool: staged.note("frobnicate", {}),
    "another begin": lambda staged, pool: staged.note(records.BEGIN, {"operation": "0f", "name": NAME}),
    "an overlay of no name of ours": lambda staged, pool: staged.note(
        records.DEFINE,
        {"merge": [{"disk": "vda", "path": str(pool / "x"), "base": str(pool / "b"), "base_format": "raw"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_no_reader_would_take_for_ours_is_not_journalled(what: str, pool: Path) -> None:
    """Else the journal would be none of ours, and the VM could never be cloned again."""
    staged = begin(pool)
    staged.create("vda", str(pool / "vda.raw"), SPEC)
    before = contents(pool)
    with pytest.raises(AgentError, match="the journal cannot say this") as caught:
        WRONG[what](staged, pool)
    assert caught.value.kind == errors.UNSUPPORTED
    assert contents(pool) == before
    assert staged.undo() == []
    assert not list(pool.iterdir())


def test_a_stage_that_another_one_waits_for(pool: Path) -> None:
    """Who only looks at a lock does not keep others out."""
    stop = threading.Event()
    seen: list[int] = []

    def looking() -> None:
        while not stop.is_set():
            seen.append(len(leftovers.staged([str(pool)])))

    thread = threading.Thread(target=looking)
    thread.start()
    try:
        assert eventually(lambda: bool(seen))
        for _ in range(20):
            begin(pool).undo()
    finally:
        stop.set()
        thread.join()
