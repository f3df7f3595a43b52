"""What becomes of a running source when its controller dies."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm_clone.agent import server, watchdog
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import hold, stage
from kvm_clone.agent.watchdog import Watchdog

from .tools import arriving, need

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]

UUID = "6695eb01-f6a4-4304-b9aa-97f2502e193f"
SOCKET = "/var/lib/libvirt/qemu/kvm-clone-0f.sock"

VIRSH = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in
*domfsthaw*) exit {thaw} ;;
*backup-dumpxml*) echo '{backup}'; exit {dump} ;;
esac
"""


Virsh = Callable[..., Path]


@pytest.fixture
def virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Virsh:
    """A virsh that notes what it is called with."""
    need("timeout")

    def make(*, backup: str = "", thaw: int = 0, dump: int = 0) -> Path:
        programs = tmp_path / "bin"
        programs.mkdir()
        monkeypatch.setattr("kvm_clone.agent.watchdog.time.sleep", lambda _: None)
        program = programs / "virsh"
        program.write_text(VIRSH.format(backup=backup, thaw=thaw, dump=dump))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return programs / "virsh.log"

    return make


def watching(operation: str = "0f") -> Watchdog:
    watcher = Watchdog()
    watcher.watch(UUID, SOCKET, operation)
    return watcher


def called(log: Path) -> list[str]:
    """The commands, without what each of them has."""
    if not log.exists():
        return []
    said = [line.split() for line in log.read_text().splitlines()]
    assert [words for words in said if words[:3] != ["-q", "-c", "qemu:///system"]] == []
    assert [words for words in said if words[4:6] != ["--domain", UUID]] == []
    return [words[3] for words in said]


def test_one_backup_of_a_domain_at_a_time(locks: Path) -> None:
    assert watchdog.reader(UUID) == ""
    first = watching()
    assert watchdog.reader(UUID) == f"operation 0f, pid {os.getpid()}"
    with pytest.raises(AgentError, match="operation 0f") as caught:
        watching("10")
    assert caught.value.kind == errors.LOCKED
    assert watchdog.reader("another domain") == ""
    first.done()
    assert watchdog.reader(UUID) == ""
    watching("10").done()
    assert not list(locks.iterdir())


def test_done_twice_and_without_a_watch(locks: Path) -> None:
    watcher = Watchdog()
    watcher.done()
    watcher.watch(UUID, SOCKET, "0f")
    watcher.done()
    watcher.done()
    watcher.watch(UUID, SOCKET, "0f")
    watcher.done()
    assert not list(locks.iterdir())


def test_the_lock_on_reading_is_not_the_one_on_writing(tmp_path: Path) -> None:
    """On one machine a VM may be source and destination at once."""
    pool = tmp_path / "pool"
    pool.mkdir()
    watcher = watching()
    stage.Stage(str(pool), UUID, "0f", {}, directories=[str(pool)]).finish()
    watcher.done()


OURS = f'<domainbackup><server transport="unix" socket="{SOCKET}"/></domainbackup>'
OTHERS = OURS.replace("kvm-clone-0f", "kvm-clone-10")
DUMP, THAW, ABORT, WAIT = "backup-dumpxml", "domfsthaw", "domjobabort", "guest-agent-timeout"


@pytest.mark.parametrize(
    ("frozen", "backup", "expected"),
    [
        (False, OURS, [DUMP, ABORT]),
        (True, OURS, [WAIT, THAW, DUMP, ABORT]),
        (True, "", [WAIT, THAW, DUMP]),
        (False, "", [DUMP]),
        (False, OTHERS, [DUMP]),
        (True, OTHERS, [WAIT, THAW, DUMP]),
    ],
)
def test_stepping_in(frozen: bool, backup: str, expected: list[str], virsh: Virsh, locks: Path) -> None:
    """The guest is thawed first, and a job ends only if it is ours."""
    log = virsh(backup=backup)
    watcher = watching()
    watcher.freezing(frozen)
    watcher.step_in()
    assert called(log) == expected
    assert not list(locks.iterdir())
    watcher.step_in()
    assert called(log) == expected


def test_a_guest_that_was_thawed_is_left_alone(virsh: Virsh) -> None:
    log = virsh(backup=OURS)
    watcher = watching()
    watcher.freezing(True)
    watcher.freezing(False)
    watcher.step_in()
    assert called(log) == [DUMP, ABORT]


@pytest.mark.parametrize("ended", [False, True])
def test_without_a_job_nothing_is_done(ended: bool, virsh: Virsh) -> None:
    log = virsh(backup=OURS)
    watcher = Watchdog()
    watcher.freezing(True)
    if ended:
        watcher.watch(UUID, SOCKET, "0f")
        watcher.done()
    watcher.step_in()
    assert called(log) == []


@pytest.mark.parametrize(("thaw", "dump", "expected"), [(1, 0, [WAIT, *[THAW] * 5, DUMP, ABORT]),
    (0, 1, [WAIT, THAW, DUMP]), (124, 1, [WAIT, *[THAW] * 5, DUMP])])  # fmt: skip
def test_a_virsh_that_fails_keeps_nothing_else_from_being_done(
    thaw: int, dump: int, expected: list[str], virsh: Virsh, locks: Path
) -> None:
    log = virsh(backup=OURS, thaw=thaw, dump=dump)
    watcher = watching()
    watcher.freezing(True)
    watcher.step_in()
    assert called(log) == expected
    assert not list(locks.iterdir())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lacks", ["virsh", "everything"])
def test_a_host_without_virsh(
    frozen: bool, lacks: str, tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    if lacks == "virsh":
        need("timeout")
        os.symlink("/usr/bin/timeout", programs / "timeout")
    monkeypatch.setenv("PATH", str(programs))
    watcher = watching()
    watcher.freezing(frozen)
    watcher.step_in()
    assert not list(locks.iterdir())


def test_a_virsh_that_hangs_is_given_up(virsh: Virsh, monkeypatch: pytest.MonkeyPatch, locks: Path) -> None:
    log = virsh(backup=OURS)
    (log.parent / "virsh").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(watchdog, "_VIRSH", ("timeout", "0.2", *watchdog._VIRSH[2:]))
    watcher = watching()
    watcher.freezing(True)
    started = time.monotonic()
    watcher.step_in()
    assert time.monotonic() - started < 20
    assert not list(locks.iterdir())


def test_the_guest_is_thawed_whatever_becomes_of_what_is_staged(
    virsh: Virsh, locks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = virsh(backup=OURS)

    def fail(_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with arriving(b"") as source:
        serving = server.Server(source, -1)
        serving._watchdog = watching()
        serving._watchdog.freezing(True)
        serving._begin(hold.Hold, name="web", about={})
        with monkeypatch.context() as patched:
            patched.setattr(hold.Hold, "abandon", fail)
            with pytest.raises(OSError, match="Too many open files"):
                serving.serve()
        assert serving._hold is not None
        serving._hold.release()
    assert "domfsthaw" in called(log)
    assert "domjobabort" in called(log)
    assert not list(locks.iterdir())
