"""Whose a journal is: the lock on it, its lease, the host that it names; and journals that say nothing yet."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import names
from kvm_clone.agent.disks import qemu
from kvm_clone.agent.host import this_host as this_host_module
from kvm_clone.agent.host.this_host import Host, this_host
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import journal, leftovers
from kvm_clone.agent.staging.journal import LEASE_SECONDS, RENEWAL_SECONDS, Journal, look
from kvm_clone.agent.staging.stage import Stage

from .journals import (
    NAME,
    OPERATION,
    Record,
    begin,
    create,
    elsewhere,
    here,
    journal_path,
    line,
    overlay,
    plant,
    publish,
)
from .tools import ending, python

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]

OLD = time.time() - 10 * LEASE_SECONDS


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    directory = tmp_path / "pool"
    directory.mkdir()
    return directory


HOLDER = """
import sys
from kvm_clone.agent.staging.journal import Journal
path, resume = sys.argv[1:]
held = Journal(path, resume=resume == "resume")
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path, how: str) -> Iterator[Any]:
    """Another process that has the journal."""
    with ending(python(HOLDER, path, how)) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        yield holder


@pytest.mark.parametrize("how", ["resume", "new"])
def test_a_journal_belongs_to_one_process(how: str, pool: Path) -> None:
    path = plant(pool, [here(), create(pool)]) if how == "resume" else journal_path(pool)
    with held(path, how) as holder:
        before = path.read_bytes()
        assert look(str(path)).active
        (found,) = leftovers.staged([str(pool)])
        assert found["active"]
        assert found["holder"]
        with pytest.raises(AgentError, match="another operation is under way"):
            Journal(str(path), resume=True)
        for act in ACTS.values():
            with pytest.raises(AgentError, match="another operation is under way") as caught:
                act(pool)
            assert caught.value.kind == errors.LOCKED
        assert path.read_bytes() == before
        holder.kill()
        holder.wait()
    assert not look(str(path)).active
    Journal(str(path), resume=True).close()


def test_what_this_process_has_is_active_too(pool: Path) -> None:
    path = plant(pool, [here()])
    opened = Journal(str(path), resume=True)
    assert look(str(path)).active
    opened.close()
    assert not look(str(path)).active


def begins(pool: Path, operation: str, **how: Any) -> None:
    Stage(str(pool), NAME, operation, {}, directories=[str(pool)], **how).abandon()


WHICH = (NAME, OPERATION)
ACTS: dict[str, Callable[[Path], object]] = {
    "recover": lambda pool: leftovers.recover(str(pool), *WHICH, [str(pool)]),
    "settle, committed": lambda pool: leftovers.record_outcome(str(pool), *WHICH, [str(pool)], committed=True),
    "settle, withdrawn": lambda pool: leftovers.record_outcome(str(pool), *WHICH, [str(pool)], committed=False),
    "begin": lambda pool: begins(pool, "10", discards=OPERATION),
    "resume": lambda pool: begins(pool, OPERATION, resume=True),
    "finish": lambda pool: begins(pool, OPERATION, finishing=True),
}

HISTORIES: dict[str, Callable[[Path], list[Record]]] = {
    "begun": lambda pool: [],
    "staged": lambda pool: [create(pool)],
    "published": lambda pool: [create(pool), publish(pool)],
    "in its commit": lambda pool: [create(pool), publish(pool), overlay(pool)],
    "committed": lambda pool: [create(pool), publish(pool), overlay(pool), {"record": "committed"}],
}


def snapshot(pool: Path) -> dict[str, tuple[bytes, int]]:
    return {entry.name: (entry.read_bytes(), entry.stat().st_mtime_ns) for entry in pool.iterdir()}


@pytest.mark.parametrize("fresh", [True, False], ids=["live", "dead"])
@pytest.mark.parametrize("history", HISTORIES)
def test_another_hosts_journal_is_left_alone(
    history: str, fresh: bool, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a filesystem that both see: only its own host can tell whether it lives, and ask its own libvirt."""
    Path(create(pool)["part"]).write_bytes(b"staged elsewhere")
    (pool / "vda.raw").write_bytes(b"published elsewhere")
    content = b"".join(map(line, [elsewhere(), *HISTORIES[history](pool)]))
    path = plant(pool, content + b"a record that is being wr")
    if not fresh:
        os.utime(path, (OLD, OLD))
    before = snapshot(pool)
    monkeypatch.setattr(qemu, "is_sound", None)
    (found,) = leftovers.staged([str(pool)])
    assert (found["foreign"], found["active"], found["disks"]) == ("kc-x", fresh, {})
    assert ("kc-x" in found["holder"]) == fresh
    for what, act in ACTS.items():
        if what.startswith("settle") and not found["defining"]:
            act(pool)  # there is nothing to settle
        else:
            with pytest.raises(AgentError, match="kc-x, which alone can end it") as caught:
                act(pool)
            assert caught.value.kind == errors.UNSUPPORTED
        assert snapshot(pool) == before


def test_our_own_journal_is_ours_however_old(pool: Path) -> None:
    path = plant(pool, [here(), create(pool)])
    (found,) = leftovers.staged([str(pool)])
    assert (found["foreign"], found["active"]) == ("", False), "a lease is for those who do not see our locks"
    os.utime(path, (OLD, OLD))
    assert leftovers.recover(str(pool), *WHICH, [str(pool)]) == []
    assert not list(pool.iterdir())


ID, OTHER_ID = "a" * 32, "b" * 32
HOSTS: dict[str, tuple[Host, Record | None, str]] = {
    "the same": (Host(ID, "kc-a"), {"machine": ID, "name": "kc-a"}, ""),
    "another": (Host(ID, "kc-a"), {"machine": OTHER_ID, "name": "kc-b"}, "kc-b"),
    "a copied machine-id": (Host(ID, "kc-a"), {"machine": ID, "name": "kc-b"}, "kc-b"),
    "another of the same name": (Host(ID, "kc-a"), {"machine": OTHER_ID, "name": "kc-a"}, "kc-a"),
    "none here": (Host("", "kc-a"), {"machine": OTHER_ID, "name": "kc-a"}, ""),
    "none there": (Host(ID, "kc-a"), {"machine": "", "name": "kc-a"}, ""),
    "none anywhere, other names": (Host("", "kc-a"), {"machine": "", "name": "kc-b"}, "kc-b"),
    "no names": (Host(ID, "kc-a"), {"machine": OTHER_ID}, "another host"),
    "nothing said": (Host(ID, "kc-a"), {}, "another host"),
    "version 0.1": (Host(ID, "kc-a"), None, ""),
}


@pytest.mark.parametrize("what", HOSTS)
def test_whose_a_journal_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    this, said, expected = HOSTS[what]
    monkeypatch.setattr(journal, "this_host", lambda: this)
    assert journal.elsewhere(begin() if said is None else begin(host=said)) == expected


def test_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_host().name == os.uname().nodename

    def failing(path: str, **how: Any) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(this_host_module, "open", failing, raising=False)
    assert this_host() == Host("", os.uname().nodename)


def test_a_journal_names_its_host(pool: Path) -> None:
    staged = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)])
    assert look(names.journal_path(str(pool), NAME)).records[0]["host"] == this_host()._asdict()
    staged.undo()


def test_the_lease_is_renewed_now_and_then(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    staged = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)])
    path = journal_path(pool)
    touched: list[float] = []
    for step in range(100):
        os.utime(path, (OLD, OLD))
        now = 1000.0 + step
        staged.renew()
        if path.stat().st_mtime != OLD:
            touched.append(now)
    assert touched == [1000.0 + at for at in range(int(RENEWAL_SECONDS), 100, int(RENEWAL_SECONDS))]
    assert RENEWAL_SECONDS * 3 <= LEASE_SECONDS
    staged.undo()
    staged.renew()
    assert not list(pool.iterdir())


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that carries no locks."""
    refuse(monkeypatch, request.param)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refusing(fd: int, command: int, *more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refusing)


@pytest.mark.usefixtures("without_locks")
def test_a_filesystem_without_locks_has_the_lease_alone(pool: Path) -> None:
    staged = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)])
    (found,) = leftovers.staged([str(pool)])
    assert found["holder"] == f"pid {os.getpid()}, operation 0f", "the lock on this host says so"
    staged.undo()
    path = plant(pool, [elsewhere()])
    assert leftovers.staged([str(pool)])[0]["active"]
    os.utime(path, (OLD, OLD))
    assert not leftovers.staged([str(pool)])[0]["active"]


def test_a_lock_that_fails_otherwise(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plant(pool, [here()])
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        Journal(str(path), resume=True)
    assert "Input/output" in leftovers.staged([str(pool)])[0]["error"]


def test_a_journal_that_another_one_has_just_taken_the_place_of(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder removes it between our open and our lock, and somebody on another host begins."""
    path = plant(pool, [])
    real = Journal._lock

    def late(self: Journal) -> None:
        path.rename(path.with_name("removed"))
        plant(pool, [elsewhere()])
        real(self)

    monkeypatch.setattr(Journal, "_lock", late)
    with pytest.raises(AgentError, match="another operation") as caught:
        leftovers.recover(str(pool), *WHICH, [str(pool)])
    assert caught.value.kind == errors.LOCKED
    assert look(str(path)).records == [elsewhere()]


TORN: dict[str, bytes] = {
    "empty": b"",
    "half a begin": line(here())[:-20],
    "a begin without its end": line(here())[:-1],
    "zeros": bytes(4096),
    "a begin with a wrong sum": b"00000000" + line(here())[8:],
    "null": line(None),
}


@pytest.mark.parametrize("what", TORN)
def test_a_journal_without_a_record_is_nothing(what: str, pool: Path) -> None:
    """Its operation was killed between its creation and its first record."""
    for act in ("staged", "settle", "recover", "begin"):
        path = plant(pool, TORN[what])
        assert leftovers.staged([str(pool)]) == leftovers.staged([str(pool)], NAME) == []
        if act == "recover":
            assert leftovers.recover(str(pool), NAME, "", [str(pool)]) == []
            assert not path.exists()
        elif act == "settle":
            leftovers.record_outcome(str(pool), NAME, "", [str(pool)], committed=True)
            assert path.read_bytes() == TORN[what]
        elif act == "begin":
            Stage(str(pool), NAME, "0f", {}, directories=[str(pool)]).finish()
            assert not path.exists()


@pytest.mark.parametrize("what", TORN)
@pytest.mark.parametrize("how", [{"resume": True}, {"finishing": True}])
def test_there_is_nothing_to_go_on_with_in_it(how: dict[str, bool], what: str, pool: Path) -> None:
    path = plant(pool, TORN[what])
    with pytest.raises(AgentError, match="it had just begun") as caught:
        begins(pool, OPERATION, **how)
    assert caught.value.kind == errors.MISSING
    assert path.read_bytes() == TORN[what]


@pytest.mark.parametrize("what", TORN)
def test_one_that_is_locked_has_just_begun(what: str, pool: Path) -> None:
    path = plant(pool, TORN[what])
    with held(path, "resume"):
        (found,) = leftovers.staged([str(pool)])
        assert (found["active"], found["operation"], found["name"]) == (True, "", "")
        assert "just begun" in found["holder"]
        with pytest.raises(AgentError) as caught:
            begins(pool, "10")
        assert caught.value.kind == errors.LOCKED
        assert path.read_bytes() == TORN[what]


def test_the_torn_tail_begins_where_the_bytes_do_that_were_read(pool: Path) -> None:
    """Another version may write its JSON with other spaces."""
    records = [here(), create(pool), {"record": "durable", "disk": "vda", "end": 5}]
    content = b"".join(line(record, spaced=True) for record in records)
    path = plant(pool, content + b"12345678 {torn")
    opened = Journal(str(path), resume=True)
    assert opened.records == records
    opened.append("copied", disk="vda")
    opened.close()
    assert path.read_bytes() == content + line({"record": "copied", "disk": "vda"})


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_an_attempt_whose_last_record_is_torn_is_gone_on_with(cut: int, pool: Path) -> None:
    staged = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)])
    spec = {"format": "raw", "size": 4096, "options": {}, "mode": 0o600, "user": "root", "group": "root"}
    staged.create("vda", str(pool / "vda.raw"), spec)
    staged.release()
    path = journal_path(pool)
    whole = path.read_bytes()
    path.write_bytes(whole + line({"record": "durable", "disk": "vda", "end": 4096, "more": "x" * 200})[:cut])
    again = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)], resume=True)
    again.note("proven", {"disk": "vda"})
    assert path.read_bytes() == whole + line({"record": "proven", "disk": "vda"})
    again.undo()
    assert not list(pool.iterdir())


def test_one_malformed_journal_hurts_only_itself(pool: Path) -> None:
    plant(pool, b"damaged\ndamaged\n", "damaged")
    plant(pool, [begin(name="forged"), create(pool, part="/etc/passwd")], "forged")
    plant(pool, [elsewhere(name="foreign")], "foreign")
    journal_path(pool, "directory").mkdir()
    plant(pool, [here(), create(pool)])
    found = {one["path"]: one for one in leftovers.staged([str(pool), str(pool), "/nowhere"])}
    assert len(found) == 5
    assert {found[path].get("name") for path in found} == {None, NAME, "foreign"}
    assert [one["name"] for one in leftovers.staged([str(pool)], NAME)] == [NAME]
    assert leftovers.recover(str(pool), *WHICH, [str(pool)]) == []
    begins(pool, "10")
    assert len(list(pool.iterdir())) == 4


SWEPT: dict[str, tuple[Callable[[Path], object], bool]] = {
    **{what: (functools.partial(plant, content=content), True) for what, content in TORN.items()},
    "one that says something": (lambda pool: plant(pool, [here()]), False),
    "another host's": (lambda pool: plant(pool, [elsewhere()]), False),
    "a damaged one": (lambda pool: plant(pool, b"damaged\ndamaged\n"), False),
    "a link to an empty file": (lambda pool: journal_path(pool).symlink_to(made(pool / "empty")), False),
    "one with another name": (lambda pool: (pool / "empty").hardlink_to(plant(pool, b"")), False),
    "one that others can write": (lambda pool: plant(pool, b"").chmod(0o666), False),
    "a FIFO": (lambda pool: os.mkfifo(journal_path(pool)), False),
    "a file of another name": (lambda pool: made(pool / ".kvm-clone-journal"), False),
}


def made(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("what", SWEPT)
def test_only_journals_that_say_nothing_are_swept(what: str, pool: Path) -> None:
    make, goes = SWEPT[what]
    make(pool)
    before = sorted(pool.iterdir())
    assert leftovers.sweep([str(pool)]) == [], "one that is young may be about to say something"
    for entry in before:
        os.utime(entry, (OLD, OLD), follow_symlinks=False)
    assert leftovers.sweep([str(pool), str(pool), "/nowhere"]) == ([str(journal_path(pool))] if goes else [])
    assert sorted(pool.iterdir()) == ([] if goes else before)


def test_one_that_somebody_has_is_not_swept(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plant(pool, b"")
    os.utime(path, (OLD, OLD))
    with held(path, "resume"):
        assert leftovers.sweep([str(pool)]) == []
        monkeypatch.setattr(leftovers, "look", lambda path: look(path)._replace(active=False))
        assert leftovers.sweep([str(pool)]) == [], "it was taken after it was looked at"
    assert path.exists()
    monkeypatch.setattr(leftovers, "look", lambda path: journal.Look([], False, OLD))
    plant(pool, [here()])
    assert leftovers.sweep([str(pool)]) == [], "somebody has begun since it was looked at"
    assert path.exists()
