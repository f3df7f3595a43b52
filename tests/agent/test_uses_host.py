"""Who uses a file: what the host itself says, beside all definitions. Mounts and loop devices need root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import server
from kvm_clone.agent.disks import qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.host import uses
from kvm_clone.agent.host.uses import FILE, FREE, TREE, UNKNOWN, USED

from .images import SIZE, make
from .tools import as_nobody, ending, lacking, make_raw, need, python

pytestmark = pytest.mark.timeout(60)


def state_of(path: Path, claims: list[list[str]] | None = None, **how: Any) -> tuple[str, str]:
    question: dict[str, Any] = {"directories": [], "elsewhere": [], "processes": True, **how}
    (answer,) = uses.uses([str(path)], claims or [], **question)
    return answer["state"], answer["why"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "disk", SIZE)


def root_only(*programs: str) -> None:
    need(*programs)
    if os.geteuid() != 0:
        lacking("this needs root")


@contextmanager
def bound(what: Path, where: Path) -> Iterator[Path]:
    """The file or directory mounted at another place too."""
    root_only("mount", "umount")
    if what.is_dir():
        where.mkdir()
    else:
        where.touch()
    subprocess.run(["mount", "--bind", str(what), str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_another_mount_of_it(disk: Path, tmp_path: Path) -> None:
    with bound(disk, tmp_path / "other") as other:
        assert state_of(other, [["the VM web", FILE, str(disk), ""]])[0] == USED
        assert state_of(disk, [["the VM web", FILE, str(other), ""]])[0] == USED
        assert state_of(disk)[0] == FREE


def test_another_mount_of_its_directory(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    disk = disk.rename(tmp_path / "pool" / "disk")
    with bound(tmp_path / "pool", tmp_path / "other") as other:
        for kind in (FILE, TREE):
            named = other / "disk" if kind == FILE else other
            assert state_of(disk, [["the VM web", kind, str(named), ""]]) == (USED, "the VM web uses it")


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    root_only("losetup")
    made = subprocess.run(["losetup", "--find", "--show", str(path)], check=False, capture_output=True, text=True)
    if made.returncode:
        lacking(f"no loop device can be had: {made.stderr}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_file_behind_a_loop_device(disk: Path) -> None:
    with loop_device(disk) as device:
        assert state_of(disk, processes=False) == (USED, f"the loop device {Path(device).name} uses it")
    assert state_of(disk, processes=False) == (FREE, "")


def test_a_file_behind_a_loop_device_has_got_another_name(disk: Path) -> None:
    with loop_device(disk) as device:
        disk = disk.rename(disk.with_name("renamed"))
        other = disk.with_name("other")
        other.hardlink_to(disk)
        disk.unlink()
        assert state_of(other, processes=False) == (USED, f"the loop device {Path(device).name} uses it")


OPENER = """
import os, sys
fd = os.open(sys.argv[1], int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The number of a process that has the file open and is none of our children: its parent has ended."""
    code = f"import os, sys\nif os.fork(): os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\n{OPENER}"
    with ending(python(code, path, flags)) as parent:
        assert parent.stdin
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"ready\n"
        parent.wait()
        try:
            yield pid
        finally:
            os.kill(pid, 9)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_PATH], ids=["to read", "to write", "its path alone"])
def test_a_file_that_a_process_has_open(flags: int, disk: Path) -> None:
    link = disk.with_name("link")
    link.hardlink_to(disk)
    with opened(link, flags) as pid:
        state, why = state_of(disk)
        assert (state, f"process {pid} (" in why) == (USED, True)
        assert state_of(disk, processes=False) == (FREE, ""), "nobody has asked for processes"
    assert state_of(disk) == (FREE, "")


def test_what_we_and_our_children_have_open_does_not_count(disk: Path) -> None:
    with disk.open("rb"), ending(python(OPENER, disk, os.O_RDONLY)) as child:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        assert state_of(disk) == (FREE, "")


def test_a_user_who_may_not_look_at_processes(open_to_all: Path) -> None:
    disk = make_raw(open_to_all / "disk", SIZE)
    with as_nobody():
        state, why = state_of(disk)
        assert (state, "cannot be looked at by this user" in why) == (UNKNOWN, True)
        assert state_of(disk, processes=False) == (FREE, "")


def test_a_host_that_hides_processes(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hidepid=2: a user sees none but his own."""
    monkeypatch.setattr(uses, "other_processes", lambda: [os.getppid()])
    state, why = state_of(disk)
    assert (state, "not all processes" in why) == (UNKNOWN, True)


def test_processes_that_end_meanwhile(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = python("")
    gone.communicate()
    monkeypatch.setattr(uses, "other_processes", lambda: [1, gone.pid])
    assert state_of(disk) == (FREE, "")
    assert uses._name(gone.pid) == "ended"


@contextmanager
def locked_by_qemu(path: Path, format_: str, *, writable: bool) -> Iterator[None]:
    with closing(qemu.open_nbd([Node(str(path), format_)], writable=writable)):
        yield


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_a_file_that_qemu_has_locked(format_: str, writable: bool, tmp_path: Path) -> None:
    """The process is one of ours here, as one on another host is none that we see: the lock alone tells."""
    path = make_raw(tmp_path / "disk", SIZE) if format_ == "raw" else make(tmp_path / "disk")
    with locked_by_qemu(path, format_, writable=writable):
        state, why = state_of(path)
        assert (state, "QEMU's lock" in why) == (USED, True)
        about = path.stat()
        assert state_of(path, held=[(about.st_dev, about.st_ino)]) == (FREE, ""), "what this process itself has locked"
    assert state_of(path) == (FREE, "")


def test_what_the_agent_itself_has_locked_is_no_use(disk: Path) -> None:
    serving = server.Server(0, 1)
    question: dict[str, Any] = {"candidates": [str(disk)], "claims": [], "directories": [], "elsewhere": []}
    serving._lock_image(str(disk), "raw")
    assert serving._uses(**question, processes=True)[0]["state"] == FREE
    serving._unlock_images()
    lock = ImageLock(str(disk))
    assert serving._uses(**question, processes=True)[0]["state"] == USED
    lock.release()


def test_locks_that_cannot_be_looked_at(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: str) -> bool:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(uses, "is_locked_by_qemu", failing)
    state, why = state_of(disk)
    assert (state, "the locks on" in why) == (UNKNOWN, True)


def test_a_host_without_loop_devices(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.listdir

    def listing(path: str = ".") -> list[str]:
        if path == "/sys/block":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listing)
    assert state_of(disk) == (FREE, "")
