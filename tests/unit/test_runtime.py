"""runtime.py: whose directories are removed, and whose are not."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_clone.runtime import make_directory


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a short path, which pytest's own have not."""
    with tempfile.TemporaryDirectory(prefix="kc-", dir="/tmp") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is over."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_directory_of_our_own(root: Path) -> None:
    one, two = make_directory(), make_directory()
    assert one != two
    for path in (one, two):
        assert path.parent == root
        assert path.is_dir()
        assert list(path.iterdir()) == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.name.startswith(f"kvm-clone-{os.getpid()}-")
        assert len(str(path / "01234567.libvirt")) < 107


def test_what_a_dead_process_left_is_removed(root: Path, dead: int) -> None:
    stale = root / f"kvm-clone-{dead}-x1y2"
    (stale / "below").mkdir(parents=True)
    (stale / "below" / "file").touch()
    empty = root / f"kvm-clone-{dead}-"
    empty.mkdir()
    made = make_directory()
    assert sorted(root.iterdir()) == [made]


@pytest.mark.parametrize(
    "name",
    [
        "kvm-clone-{alive}-x1y2",
        "kvm-clone-{me}-x1y2",
        "kvm-clone-{dead}",
        "kvm-clone-{dead}x-y",
        "kvm-clone-x-{dead}-y",
        "kvm-clone--{dead}-x",
        "kvm-clone-",
        "kvm-clone-lab-{dead}",
        "my-kvm-clone-{dead}-x",
        "other-{dead}-x",
    ],
)
def test_what_is_not_a_dead_process_s_stays(root: Path, dead: int, name: str) -> None:
    path = root / name.format(alive=os.getppid(), me=os.getpid(), dead=dead)
    path.mkdir()
    (path / "file").touch()
    made = make_directory()
    assert sorted(root.iterdir()) == sorted([made, path])
    assert (path / "file").exists()


def test_a_file_of_such_a_name_stays(root: Path, dead: int) -> None:
    path = root / f"kvm-clone-{dead}-x1y2"
    path.write_text("mine")
    make_directory()
    assert path.read_text() == "mine"


def test_a_link_of_such_a_name_stays_and_is_not_followed(root: Path, dead: int) -> None:
    precious = root / "precious"
    precious.mkdir()
    (precious / "file").touch()
    link = root / f"kvm-clone-{dead}-x1y2"
    link.symlink_to(precious)
    make_directory()
    assert link.is_symlink()
    assert (precious / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_user_s_directory_stays(root: Path, dead: int) -> None:
    path = root / f"kvm-clone-{dead}-x1y2"
    path.mkdir()
    os.chown(path, 65534, 65534)
    make_directory()
    assert path.is_dir()


@pytest.mark.parametrize("directory", ["", "missing", "long" * 15])
def test_a_runtime_directory_that_will_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: str) -> None:
    if directory.startswith("long"):
        (tmp_path / directory).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / directory) if directory else "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    path = make_directory()
    try:
        assert path.parent == Path("/tmp")
    finally:
        path.rmdir()
