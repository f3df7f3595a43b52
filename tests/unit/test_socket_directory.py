"""runtime.py: whose directories are removed, and whose are not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_clone import socket_directory
from kvm_clone.errors import UsageError
from kvm_clone.socket_directory import make_directory


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


@pytest.mark.parametrize(
    "directory",
    ["", "missing", "file", "long" * 15, "a b", "a%d", "a'b", 'a"b', "a:b", "größe", "a\nb", "$HOME", "a?b&c", "a~b"],
)
def test_a_runtime_directory_that_will_not_do(monkeypatch: pytest.MonkeyPatch, root: Path, directory: str) -> None:
    """Neither it nor a TMPDIR like it."""
    if directory == "file":
        (root / directory).touch()
    elif directory not in ("", "missing"):
        (root / directory).mkdir()
    for variable in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(variable, str(root / directory) if directory else "")
    path = make_directory()
    try:
        assert path.parent == Path("/tmp")
    finally:
        path.rmdir()


@pytest.mark.parametrize("value", ["relative", ".", "/proc", "/proc/self", "/dev/null"])
def test_a_place_where_nothing_can_be_made(monkeypatch: pytest.MonkeyPatch, root: Path, value: str) -> None:
    (root / "relative").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    monkeypatch.setenv("TMPDIR", str(root))
    assert make_directory().parent == root


def test_nowhere_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_directory, "_USUAL", ("/proc", "/nonexistent"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/null")
    monkeypatch.setenv("TMPDIR", "/a b")
    with pytest.raises(
        UsageError, match=r"/dev/null: Not a directory; /proc: .*; /nonexistent: No such file"
    ) as caught:
        make_directory()
    assert "XDG_RUNTIME_DIR" in caught.value.remedy


OTHER_USER = """
import os
from kvm_clone.socket_directory import make_directory
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(make_directory())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_runtime_directory_of_somebody_else(root: Path) -> None:
    """As su leaves it in the environment."""
    (root / "below").mkdir()
    root.chmod(0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(root / "below"), "TMPDIR": str(root)}
    argv = [sys.executable, "-c", OTHER_USER]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    made = Path(done.stdout.strip())
    assert made.parent == Path("/tmp")
    made.rmdir()
