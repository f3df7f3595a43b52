"""The contract that every kind of store keeps, and what staging does with one. A new kind registers in KINDS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import leftovers, records, stores
from kvm_clone.agent.staging.directory import DirectoryStore
from kvm_clone.agent.staging.journal import Journal, encode
from kvm_clone.agent.staging.stage import Stage
from kvm_clone.agent.staging.store import Store

from . import volumes
from .tools import KIB

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks", "_known")]

SPEC = {"format": "raw", "size": 64 * KIB, "options": {}, "mode": 0o600, "user": "root", "group": "root"}
KINDS = [DirectoryStore.kind, volumes.Volumes.kind]
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def _known() -> Iterator[None]:
    with volumes.known():
        yield


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    directory = tmp_path / "pool"
    directory.mkdir()
    return directory


def made(kind: str, directory: Path) -> tuple[Store, str, str]:
    store, final = stores.KINDS[kind], str(directory / "web.raw")
    part = store.part("0f", "vda", final)
    store.create(part, SPEC)
    return store, part, final


@each
def test_an_asset_s_life(kind: str, pool: Path) -> None:
    store, part, final = made(kind, pool)
    assert part == store.part("0f", "vda", final)
    assert store.holds(part)
    held = store.look(part)
    assert held is not None
    assert (held.size, held.allocated) == (64 * KIB, 0)
    Path(part).write_bytes(b"x" * 64 * KIB)
    identity = store.identity(part)
    store.publish(part, final)
    assert Path(final).read_bytes() == b"x" * 64 * KIB
    assert (store.identity(final), store.is_still(final, identity)) == (identity, True)
    assert store.holds(part) == (part == final)
    store.retract(final, part)
    assert (store.identity(part), store.holds(final)) == (identity, part == final)
    for _ in range(2):
        store.remove(part)
    assert store.look(part) is None
    assert list(pool.iterdir()) == []


@each
def test_nothing_is_made_where_something_is(kind: str, pool: Path) -> None:
    store, part, _ = made(kind, pool)
    Path(part).write_bytes(b"there")
    with pytest.raises(FileExistsError):
        store.create(part, SPEC)
    assert Path(part).read_bytes() == b"there"


@each
def test_one_asset_is_not_another(kind: str, pool: Path) -> None:
    store, part, _ = made(kind, pool)
    other = store.part("0f", "vdb", str(pool / "other.raw"))
    store.create(other, SPEC)
    assert store.identity(part) != store.identity(other)
    assert not store.is_still(other, store.identity(part))
    with pytest.raises(FileNotFoundError):
        store.identity(str(pool / "missing"))
    assert not store.is_still(str(pool / "missing"), store.identity(part))


def test_a_directory_publishes_over_nothing(pool: Path) -> None:
    store, part, final = made(DirectoryStore.kind, pool)
    Path(final).write_bytes(b"there")
    with pytest.raises(FileExistsError):
        store.publish(part, final)
    assert Path(final).read_bytes() == b"there"


def stage(directory: Path, operation: str = "0f", **how: Any) -> Stage:
    return Stage(str(directory), "web", operation, {}, directories=[str(directory)], **how)


def entries(directory: Path) -> list[records.Record]:
    (path,) = directory.glob(".kvm-clone-*.journal")
    opened = Journal(str(path), resume=True)
    opened.close()
    return opened.records


@each
def test_a_journal_names_every_store_but_a_directory(kind: str, pool: Path) -> None:
    """Version 0.1 wrote no store, and reads a journal of a directory's."""
    staged = stage(pool)
    staged.create("vda", str(pool / "web.raw"), {**SPEC, "store": kind})
    staged.release()
    begin, create, *more = entries(pool)
    assert create.get("store") == (None if kind == DirectoryStore.kind else kind)
    assert [one["record"] for one in more] == ([] if kind == DirectoryStore.kind else [records.MADE])
    assert leftovers.recover(str(pool), "web", begin["operation"], [str(pool)]) == []
    assert list(pool.iterdir()) == []


def test_a_store_that_nobody_knows_is_refused(pool: Path) -> None:
    staged = stage(pool)
    with pytest.raises(AgentError, match="knows no store 'tape'") as caught:
        staged.create("vda", str(pool / "web.raw"), {**SPEC, "store": "tape"})
    assert caught.value.kind == errors.UNSUPPORTED
    staged.undo()


def test_a_journal_of_a_store_that_nobody_knows_moves_nothing(pool: Path) -> None:
    staged = stage(pool)
    part = staged.create("vda", str(pool / "web.raw"), SPEC)
    staged.release()
    (path,) = pool.glob(".kvm-clone-*.journal")
    begin, create = entries(pool)
    path.write_bytes(encode(begin) + encode({**create, "store": "tape"}))
    (told,) = leftovers.staged([str(pool)], "web")
    assert "knows no store 'tape'" in told["error"]
    with pytest.raises(AgentError, match="knows no store"):
        leftovers.recover(str(pool), "web", "0f", [str(pool)])
    assert os.path.exists(part)


SOMEBODY: dict[str, Callable[[Path], None]] = {
    "before it was made": lambda final: None,
    "in the place of ours": os.unlink,
}


@pytest.mark.parametrize("how", SOMEBODY)
def test_what_is_not_known_to_be_ours_is_not_removed(how: str, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store whose names say nothing: by undoing, by a later run, and by the end of one."""
    final = pool / "web.raw"
    spec = {**SPEC, "store": volumes.Volumes.kind}
    staged = stage(pool)
    if how == "before it was made":
        with monkeypatch.context() as patched:
            patched.setattr(volumes.Volumes, "holds", lambda *_: False)
            final.write_bytes(b"somebody's")
            with pytest.raises(AgentError) as caught:
                staged.create("vda", str(final), spec)
            assert caught.value.kind == errors.EXISTS
    else:
        staged.create("vda", str(final), spec)
        stores.KINDS[volumes.Volumes.kind].remove(str(final))
        final.write_bytes(b"somebody's")
    with pytest.raises(AgentError, match="there already") as caught:
        staged.create("vda", str(final), spec)
    assert caught.value.kind == errors.EXISTS
    staged.release()
    (told,) = leftovers.staged([str(pool)], "web")
    assert told["disks"]["vda"]["durable"] == 0
    (left,) = leftovers.recover(str(pool), "web", "0f", [str(pool)])
    assert f"{final} is not known to be ours" in left
    with pytest.raises(AgentError, match="not known to be ours"):
        stage(pool, "1f", discards="0f")
    assert final.read_bytes() == b"somebody's"
    final.unlink()
    stage(pool, "1f", discards="0f").undo()
    assert list(pool.iterdir()) == []


def test_a_volume_that_was_made_and_not_journalled_is_left(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies between the two: nobody can say any more whose it is."""
    final = pool / "web.raw"
    staged = stage(pool)
    with monkeypatch.context() as patched:
        patched.setattr(volumes.Volumes, "identity", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            staged.create("vda", str(final), {**SPEC, "store": volumes.Volumes.kind})
    (left,) = staged.undo()
    assert "remove it" in left
    assert final.exists()


@each
def test_the_end_keeps_what_is_published_and_removes_what_is_not(kind: str, pool: Path) -> None:
    staged = stage(pool)
    for key in ("vda", "vdb"):
        staged.create(key, str(pool / key), {**SPEC, "store": kind})
    staged.publish("vda", str(pool / "vda"))
    staged.note(records.DEFINE, {"uuid": "u", "remove": []})
    staged.note(records.COMMITTED, {})
    staged.finish()
    assert [entry.name for entry in pool.iterdir()] == ["vda"]
