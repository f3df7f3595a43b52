"""The names that we give to files, and the directory that our locks lie in: nobody else may put anything there."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.agent import names, watchdog
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError, from_exception
from kvm_clone.agent.staging import leftovers, scratch
from kvm_clone.agent.staging.hold import Hold
from kvm_clone.agent.staging.lock import OperationLock, holder_of
from kvm_clone.agent.staging.stage import Stage

from .tools import as_nobody, lacking

pytestmark = pytest.mark.timeout(60)


def made(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)


def of_another(path: Path) -> None:
    if os.geteuid() != 0:
        lacking("giving files away needs root")
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)


def to_a_good_one(path: Path) -> None:
    made(path.with_name("good"), 0o700)
    path.symlink_to("good")


DIRECTORIES: dict[str, Callable[[Path], object]] = {
    "a link to one of ours": to_a_good_one,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a file": Path.touch,
    "another user's": of_another,
    "one that all can write": lambda path: made(path, 0o777),
    "one that the group can write": lambda path: made(path, 0o770),
    "one that all can write, as /tmp": lambda path: made(path, 0o1777),
}


@pytest.mark.parametrize("what", DIRECTORIES)
def test_a_directory_that_is_not_ours_alone_holds_no_locks(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "locks"
    DIRECTORIES[what](path)
    monkeypatch.setattr(names, "_lock_directory", lambda: str(path))
    acts: list[Callable[[], object]] = [
        names.lock_directory,
        lambda: Hold("web", {}),
        lambda: watchdog.reader("a domain"),
        lambda: leftovers.recover(str(tmp_path), "web", "", [str(tmp_path)]),
        lambda: Stage(str(tmp_path), "web", "0f", {}, directories=[str(tmp_path)]),
    ]
    for act in acts:
        with pytest.raises(AgentError, match=rf"{path} is not ours alone") as caught:
            act()
        assert caught.value.kind == errors.PERMISSION
    assert {entry.name for entry in tmp_path.iterdir()} <= {"locks", "good"}
    assert not path.is_dir() or not list(path.iterdir())


def test_the_directory_is_made_for_us_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locks"
    monkeypatch.setattr(names, "_lock_directory", lambda: str(path))
    for _ in range(2):
        assert names.lock_directory() == str(path)
        assert path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(names, "_lock_directory", lambda: str(tmp_path / "none" / "locks"))
    with pytest.raises(AgentError, match=r"cannot make .*none/locks for our locks: No such file"):
        names.lock_directory()


def test_where_it_lies(open_to_all: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all of a user's logins, whatever their environment says."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if os.geteuid() == 0:
        before = names._lock_directory()
        assert before == "/run/kvm-clone"
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_to_all))
        assert names._lock_directory() == before
    with as_nobody():
        user = os.geteuid()
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if not os.path.isdir(f"/run/user/{user}"):
            assert names._lock_directory() == f"/tmp/kvm-clone-{user}"


@pytest.fixture
def stays() -> Iterator[None]:
    before = os.getcwd()
    yield
    os.chdir(before)


def bound(path: Path) -> None:
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def device(path: Path) -> None:
    if os.geteuid() != 0:
        lacking("making a device needs root")
    os.mknod(path, 0o020600, os.makedev(1, 5))


ODD: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a directory": Path.mkdir,
    "a socket": bound,
    "a device": device,
}


@pytest.mark.usefixtures("stays")
@pytest.mark.parametrize("kind", ODD)
def test_what_is_at_a_locks_name_and_is_no_file(kind: str, tmp_path: Path, locks: Path) -> None:
    """It is refused by its name, and neither followed nor waited for."""
    path = Path(names.lock_path("web"))
    ODD[kind](path)
    mode = os.lstat(path).st_mode
    before = len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    for act in (lambda: OperationLock(str(path), {}), lambda: Hold("web", {})):
        with pytest.raises((AgentError, OSError)) as caught:
            act()
        assert path.name in str(from_exception(caught.value))
    try:
        assert holder_of(str(path)) == ""
    except OSError as error:
        assert path.name in str(from_exception(error))
    assert time.monotonic() - started < 5
    assert os.lstat(path).st_mode == mode
    assert len(os.listdir("/proc/self/fd")) == before
    assert [entry.name for entry in locks.iterdir()] == [path.name]
    Hold("another", {}).release()


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_any_vm_has_its_own_names(name: str) -> None:
    path = names.journal_path("/pool", name)
    assert os.path.dirname(path) == "/pool"
    assert names.is_journal(os.path.basename(path))
    assert re.fullmatch("[0-9a-f]{16}", names.key_of(name))
    assert names.key_of(name) != names.key_of(name + " ")


def test_a_name_that_is_no_unicode() -> None:
    assert names.key_of("a\udcff") != names.key_of("a\udcfe")


def test_what_names_of_ours_look_like() -> None:
    """Other versions look for the same."""
    assert names.part_path("0f", "vda", "/pool/web.raw") == "/pool/.kvm-clone-0f-vda.part"
    assert names.mark_path("0f", "/pool") == "/pool/.kvm-clone-0f.mark"
    assert names.overlay_path("0f", "vda", "/pool/base.raw") == "/pool/kvm-clone-0f-vda.qcow2"
    assert names.journal_path("/pool", "web") == "/pool/.kvm-clone-4b5e57f6eb2f42b9.journal"


PLAIN = {"/": True, "/a/b": True, "/a/..b": True, "a": False, "": False, "/a/../b": False, "/..": False, "/a\0b": False}


@pytest.mark.parametrize("path", PLAIN)
def test_plain_paths(path: str) -> None:
    assert names.is_plain(path) == PLAIN[path]


OURS: dict[str, bool] = {
    "/pool/.kvm-clone-0f-vda.scratch": True,
    "/pool/.kvm-clone-0f-vda.part": False,
    "/pool/.kvm-clone-0f.journal": False,
    "/pool/vda.scratch": False,
    "/pool/kvm-clone-0f.scratch": False,
    ".kvm-clone-0f-vda.scratch": False,
    f"{scratch.SOCKETS}/kvm-clone-0f.sock": True,
    f"{scratch.SOCKETS}/domain-1-web/monitor.sock": False,
    f"{scratch.SOCKETS}/other.sock": False,
    f"{scratch.SOCKETS}/../kvm-clone-0f.sock": False,
    "/pool/kvm-clone-0f.sock": False,
    "/etc/passwd": False,
    "": False,
}


@pytest.mark.parametrize("path", OURS)
def test_which_files_of_backup_jobs_are_ours(path: str) -> None:
    assert scratch.is_ours(path) == OURS[path]
    if not OURS[path]:
        with pytest.raises(AgentError, match="no name of ours") as caught:
            scratch.remove([path])
        assert caught.value.kind == errors.UNSUPPORTED


def test_only_what_has_a_name_of_ours_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SOCKETS", str(tmp_path))
    ours = [tmp_path / name for name in (".kvm-clone-0f-vda.scratch", "kvm-clone-0f.sock", ".kvm-clone-0f-b.scratch")]
    ours[0].touch()
    monkeypatch.chdir(tmp_path)
    bound(ours[1])
    other = tmp_path / "other"
    other.touch()
    with pytest.raises(AgentError, match="no name of ours"):
        scratch.remove([str(ours[0]), str(other), str(ours[1])])
    scratch.remove(list(map(str, ours)))
    scratch.remove([*map(str, ours), f"{other}/.kvm-clone-0f.scratch"])
    assert list(tmp_path.iterdir()) == [other]


NOT_REMOVED: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to("other"),
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
}


@pytest.mark.parametrize("kind", NOT_REMOVED)
def test_what_has_a_name_of_ours_and_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".kvm-clone-0f-vda.scratch"
    NOT_REMOVED[kind](path)
    with pytest.raises(AgentError, match="neither a file nor a socket"):
        scratch.remove([str(path)])
    assert os.path.lexists(path)


def test_what_cannot_be_removed_is_told(open_to_all: Path) -> None:
    path = open_to_all / ".kvm-clone-0f-vda.scratch"
    path.touch()
    with as_nobody(), pytest.raises(AgentError, match=f"removing {path}: Permission denied") as caught:
        scratch.remove([str(path)])
    assert caught.value.kind == errors.PERMISSION
    assert path.exists()


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "a directory"])
def test_what_is_at_the_lock_directorys_name_is_told_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inspection asks, and makes nothing."""
    before = os.getcwd()
    path = tmp_path / "locks"
    monkeypatch.setattr(names, "_lock_directory", lambda: str(path))
    assert (names.lock_trouble(), path.exists()) == ("", False)
    ODD[kind](path)
    os.chdir(before)
    assert "is not ours alone" in names.lock_trouble()
    path.unlink()
    path.mkdir(mode=0o700)
    assert names.lock_trouble() == ""
    path.chmod(0o777)
    assert "is not ours alone" in names.lock_trouble()


def test_where_no_lock_directory_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_lock_directory", lambda: str(tmp_path / "none" / "locks"))
    assert "cannot be made" in names.lock_trouble()
