"""device.py and what uses it: block devices as images, on loop devices."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.disks import chain, device, fingerprint, image, qemu
from kvm_clone.agent.disks.disk import DATA
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from . import tools
from .tools import MIB, make_overlay, make_qcow2, make_raw, noise, read

SIZE = 4 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tools.device(make_raw(tmp_path / "disk", SIZE, [(MIB, noise(MIB))])) as path:
        yield path


def written(path: Path, offset: int = 0, data: bytes = b"x") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_what_is_known_of_a_device(disk: Path) -> None:
    said = host_info.disk(str(disk), "raw")
    assert (said["device"], said["regular"], said["virtual_size"], said["data"]) == (True, False, SIZE, SIZE)
    assert (said["mode"], said["user"], said["group"], said["layers"]) == (0o600, "root", "root", [])
    assert said["fingerprint"] == fingerprint.of(str(disk))


def test_an_image_on_a_device_has_its_own_size_and_content(tmp_path: Path) -> None:
    file = make_qcow2(tmp_path / "disk", 8 * MIB, [(MIB, noise(MIB))])
    os.truncate(file, file.stat().st_size + MIB)
    with tools.device(file) as path:
        said = host_info.disk(str(path), "qcow2")
        assert (said["device"], said["virtual_size"], said["data"]) == (True, 8 * MIB, MIB)
        assert said["image"]["format"] == "qcow2"
        assert qemu.is_sound(str(path), "qcow2")


def test_a_base_on_a_device(tmp_path: Path, disk: Path) -> None:
    """Whoever says its format may rest on it; what is written to it changes the fingerprint of the image above."""
    content = noise(64 << 10, 5)
    top = make_overlay(tmp_path / "top", disk, "raw", SIZE, [(2 * MIB, content)])
    assert [node.path for node in chain.layers(str(top), "qcow2")] == [str(top), str(disk)]
    opened = image.open_for_reading(str(top), "qcow2")
    expected = disk.read_bytes()
    assert read(opened) == expected[: 2 * MIB] + content + expected[2 * MIB + len(content) :]
    opened.close()
    before = host_info.image_fingerprint(str(top), "qcow2")
    assert host_info.image_fingerprint(str(top), "qcow2") == before
    written(disk)
    assert fingerprint.content(host_info.image_fingerprint(str(top), "qcow2")) != fingerprint.content(before)


def test_a_fingerprint_says_what_was_written(disk: Path) -> None:
    before = fingerprint.of(str(disk))
    disk.read_bytes()
    assert fingerprint.of(str(disk)) == before
    assert fingerprint.is_untouched(str(disk), before)
    written(disk)
    after = fingerprint.of(str(disk))  # although nobody has synced
    assert fingerprint.content(after) != fingerprint.content(before)
    assert fingerprint.file_id(after) == fingerprint.file_id(before)
    with closing(image.open_for_filling(str(disk), "raw")) as opened:
        opened.zero(MIB, MIB)
        opened.flush()
    assert fingerprint.content(fingerprint.of(str(disk))) != fingerprint.content(after)


def test_another_device_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    """They have the same node, size, and as much was written to them."""
    found = set()
    for name in ("one", "other"):
        with tools.device(make_raw(tmp_path / name, SIZE)) as path:
            found.add(fingerprint.content(fingerprint.of(str(path)))[0])
    assert len(found) == 2


def test_one_device_by_two_names(tmp_path: Path, disk: Path) -> None:
    about = os.stat(disk)
    os.mknod(tmp_path / "node", about.st_mode, about.st_rdev)
    (tmp_path / "link").symlink_to(disk)
    one, *others = (fingerprint.file_id(fingerprint.of(str(path))) for path in (disk, *sorted(tmp_path.glob("[ln]*"))))
    assert others == [one, one]


def test_uncounted_writes(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is called unchanged then, and a VM at rest is refused."""
    said = device._said

    def without_counts(about: os.stat_result, name: str) -> str:
        return "0" if name.endswith("iostats") else said(about, name)

    monkeypatch.setattr(device, "_said", without_counts)
    assert fingerprint.content(fingerprint.of(str(disk))) != fingerprint.content(fingerprint.of(str(disk)))
    answer = host_info.disk(str(disk), "raw")
    assert "are not counted" in answer["error"]
    assert "error" not in host_info.disk(str(disk), "raw", live=True)  # a backup job says what it reads


def test_a_kernel_that_tells_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(device, "_said", nothing)
    assert host_info.fingerprints([str(disk)]) == [None]
    assert host_info.disk(str(disk), "raw")["error"] == "No such file or directory"


def test_what_the_kernel_remembers_of_a_device_is_forgotten(tmp_path: Path) -> None:
    """Somebody has written below it meanwhile, and somebody has had it open all the time."""
    below = make_raw(tmp_path / "below", SIZE, [(0, b"old")])
    with tools.device(below) as path, path.open("rb") as reader:
        assert reader.read(3) == b"old"
        with below.open("r+b") as file:
            file.write(b"new")
        assert os.pread(reader.fileno(), 3, 0) == b"old"
        fingerprint.of(str(path))
        assert os.pread(reader.fileno(), 3, 0) == b"new"


HOLD = "import os, sys, time; os.open(sys.argv[1], int(sys.argv[2])); print(flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (os.O_RDWR, "open for writing"),
        (os.O_WRONLY, "open for writing"),
        (os.O_RDONLY | os.O_EXCL, "another process has it"),
        (os.O_RDONLY, ""),
    ],
    ids=["read and written", "written", "all of it", "read"],
)
def test_who_has_a_device(disk: Path, tmp_path: Path, flags: int, why: str) -> None:
    """By a node of its own, as libvirt gives one to each VM. The process is no child of this one."""
    about = os.stat(disk)
    os.mknod(tmp_path / "node", about.st_mode, about.st_rdev)
    script = f"setsid python3 -c {shlex.quote(HOLD)} {tmp_path}/node {flags} & echo $!"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        assert shell.stdout.readline() == "\n"
        shell.stdout.close()
    try:
        if why:
            with pytest.raises(AgentError, match=why) as caught:
                ImageLock(str(disk))
            assert caught.value.kind == errors.IN_USE
        else:
            ImageLock(str(disk)).release()
    finally:
        os.kill(pid, 9)


def test_a_mounted_device_is_in_use(tmp_path: Path) -> None:
    tools.need("mkfs.ext4")
    file = make_raw(tmp_path / "disk", SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(file)], check=True)
    (tmp_path / "mount").mkdir()
    with tools.device(file) as path:
        subprocess.run(["mount", "-o", "ro", str(path), str(tmp_path / "mount")], check=True)
        try:
            with pytest.raises(AgentError, match="is mounted"):
                ImageLock(str(path))
        finally:
            subprocess.run(["umount", str(tmp_path / "mount")], check=True)


def test_a_locked_device_cannot_be_mounted(tmp_path: Path) -> None:
    tools.need("mkfs.ext4")
    file = make_raw(tmp_path / "disk", SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(file)], check=True)
    (tmp_path / "mount").mkdir()
    with tools.device(file) as path:
        lock = ImageLock(str(path))
        done = subprocess.run(["mount", str(path), str(tmp_path / "mount")], capture_output=True, check=False)
        assert done.returncode != 0
        lock.release()


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_processes_that_cannot_be_looked_at(disk: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]) -> None:
    """One that has ended has nothing open; one of another user may have it."""
    listed = os.listdir

    def listing(path: Any) -> list[str]:
        if str(path).startswith("/proc/") and str(path).endswith("/fd"):
            raise error(1, "no")
        return listed(path)

    monkeypatch.setattr(os, "listdir", listing)
    if error is FileNotFoundError:
        ImageLock(str(disk)).release()
    else:
        with pytest.raises(AgentError, match="is not to be seen by this user"):
            ImageLock(str(disk))


def test_a_proc_that_hides_others(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "other_processes", lambda: [os.getppid()])
    with pytest.raises(AgentError, match="not to be seen by this user"):
        ImageLock(str(disk))


def test_a_device_that_is_gone(tmp_path: Path) -> None:
    """Its node is still there."""
    with tools.device(make_raw(tmp_path / "disk", SIZE)) as path:
        about = os.stat(path)
        os.mknod(tmp_path / "node", about.st_mode, os.makedev(240, 77))
    with pytest.raises(OSError, match="No such"):
        ImageLock(str(tmp_path / "node"))
    assert "error" in host_info.disk(str(tmp_path / "node"), "raw")
    assert host_info.fingerprints([str(tmp_path / "node")]) == [None]


def test_nothing_is_written_to_a_device_that_is_read(disk: Path) -> None:
    """Promise 1: neither locking nor reading it is a write."""
    before = fingerprint.of(str(disk))
    lock = ImageLock(str(disk))
    opened = image.open_for_reading(str(disk), "raw")
    read(opened)
    assert [extent.kind for extent in opened.extents()] == [DATA]
    opened.close()
    lock.release()
    assert fingerprint.of(str(disk)) == before
