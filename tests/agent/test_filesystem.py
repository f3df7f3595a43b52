"""What a filesystem can do of what staging needs, on real ones that lack it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.disks import filesystem, fingerprint
from kvm_clone.agent.host import host_info

from .tools import MIB, lacking, need

Plain = Callable[..., Path]

ABLE = {
    "naming": "link",
    "owners": True,
    "modes": True,
    "sparse": True,
    "largest": filesystem.NO_LIMIT,
    "direct": True,
    "any_name": True,
    "folds": False,
    "trouble": "",
}

LACKING: dict[tuple[str, ...], dict[str, object]] = {
    (): {},
    ("no-links",): {"naming": "rename"},
    ("no-links", "no-noreplace"): {"naming": ""},
    ("no-noreplace",): {},
    ("no-owners",): {"owners": False},
    ("no-modes",): {"modes": False},
    ("dense",): {"sparse": False},
    ("full",): {"sparse": False},
    ("no-direct",): {"direct": False},
    ("plain-names",): {"any_name": False},
    ("folds",): {"folds": True},
    ("no-links", "no-owners", "no-modes", "dense", "plain-names", "folds"): {
        "naming": "rename",
        "owners": False,
        "modes": False,
        "sparse": False,
        "any_name": False,
        "folds": True,
    },
}


@pytest.mark.parametrize("options", LACKING, ids=" ".join)
def test_what_a_filesystem_lacks_is_found_and_nothing_stays(plain: Plain, options: tuple[str, ...]) -> None:
    directory = plain(*options)
    assert filesystem.abilities(str(directory)) == {**ABLE, **LACKING[options]}
    assert list(directory.iterdir()) == []


def test_where_files_need_no_name_nothing_is_changed_at_all(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        lacking("owners are tried as root")
    before = tmp_path.stat()
    assert {**filesystem.abilities(str(tmp_path)), "largest": 0} == {**ABLE, "largest": 0}
    after = tmp_path.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


@pytest.fixture
def small_blocks(tmp_path: Path) -> Iterator[Path]:
    """An ext2 with blocks of 1 KiB, whose files end at some 16 GiB."""
    need("mkfs.ext4", "mount", "umount")
    if os.geteuid() != 0:
        lacking("mounting needs root")
    image, directory = tmp_path / "ext2", tmp_path / "there"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-t", "ext2", "-b", "1024", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_the_largest_file_is_the_one_that_the_filesystem_takes(small_blocks: Path) -> None:
    largest = filesystem.abilities(str(small_blocks))["largest"]
    assert 1 << 34 < largest < 1 << 35
    (small_blocks / "file").touch()
    os.truncate(small_blocks / "file", largest)
    with pytest.raises(OSError, match="File too large"):
        os.truncate(small_blocks / "file", largest + 1)


@pytest.mark.parametrize("spoil", ["no inodes", "not there"])
def test_why_no_file_can_be_made(tmp_path: Path, spoil: str) -> None:
    directory = tmp_path / "there"
    if spoil == "not there":
        assert filesystem.abilities(str(directory))["trouble"] == "No such file or directory"
        return
    need("mount", "umount")
    if os.geteuid() != 0:
        lacking("mounting needs root")
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", str(directory)], check=True)
    try:
        assert filesystem.abilities(str(directory)) == {**ABLE, "trouble": "No space left on device"}
    finally:
        subprocess.run(["umount", str(directory)], check=True)


# Names.


@pytest.fixture(params=["links", "renames"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory, on a filesystem with hard links and on one without."""
    if request.param == "links":
        return tmp_path
    made: Path = request.getfixturevalue("plain")("no-links")
    return made


def test_a_file_gets_a_name_and_loses_the_old(pool: Path) -> None:
    (pool / "part").write_text("ours")
    filesystem.give_name(str(pool / "part"), str(pool / "final"))
    assert not (pool / "part").exists()
    assert (pool / "final").read_text() == "ours"
    filesystem.give_name(str(pool / "final"), str(pool / "part"))
    assert not (pool / "final").exists()
    assert (pool / "part").read_text() == "ours"


@pytest.mark.parametrize("taken", ["file", "directory"])
def test_what_has_the_name_is_never_replaced(pool: Path, taken: str) -> None:
    part, final = pool / "part", pool / "final"
    part.write_text("ours")
    if taken == "directory":
        final.mkdir()
    else:
        final.write_text("theirs")
    with pytest.raises(FileExistsError):
        filesystem.give_name(str(part), str(final))
    assert part.read_text() == "ours"
    assert taken != "file" or final.read_text() == "theirs"


def test_a_link_to_nothing_has_its_name_too(tmp_path: Path) -> None:
    (tmp_path / "part").touch()
    (tmp_path / "final").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        filesystem.give_name(str(tmp_path / "part"), str(tmp_path / "final"))
    assert (tmp_path / "part").exists()


def test_a_file_with_both_names_loses_the_old(tmp_path: Path) -> None:
    (tmp_path / "part").write_text("ours")
    os.link(tmp_path / "part", tmp_path / "final")
    filesystem.give_name(str(tmp_path / "part"), str(tmp_path / "final"))
    assert not (tmp_path / "part").exists()
    assert (tmp_path / "final").read_text() == "ours"


def test_without_links_and_such_renames_it_is_an_error(plain: Plain) -> None:
    directory = plain("no-links", "no-noreplace")
    (directory / "part").write_text("ours")
    with pytest.raises(OSError, match="Invalid argument"):
        filesystem.give_name(str(directory / "part"), str(directory / "final"))
    assert [path.name for path in directory.iterdir()] == ["part"]


def test_any_other_failure_is_told(tmp_path: Path) -> None:
    (tmp_path / "part").touch()
    with pytest.raises(FileNotFoundError):
        filesystem.give_name(str(tmp_path / "missing"), str(tmp_path / "final"))
    with pytest.raises(FileNotFoundError):
        filesystem.give_name(str(tmp_path / "part"), str(tmp_path / "missing" / "final"))


class OldLibrary:
    """A C library without renameat2."""

    def __init__(self) -> None:
        self.syscall = ctypes.CDLL(None, use_errno=True).syscall


def test_a_c_library_without_renameat2(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = plain("no-links")
    part, final = directory / "part", directory / "final"
    old = OldLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: old)
    part.write_text("ours")
    if platform.machine() in filesystem.RENAMEAT2:
        filesystem.give_name(str(part), str(final))
        assert final.read_text() == "ours"
        part.touch()
        with pytest.raises(FileExistsError):
            filesystem.give_name(str(final), str(part))
        part.unlink()
        final.rename(part)
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(OSError, match="Function not implemented"):
        filesystem.give_name(str(part), str(final))
    assert filesystem.abilities(str(directory))["naming"] == ""


# Owners and modes.


def test_owner_and_mode_are_given_where_they_can_be(pool: Path, plain: Plain) -> None:
    if os.geteuid() != 0:
        lacking("owners are given as root")
    (pool / "file").touch()
    filesystem.own(str(pool / "file"), 0o640, 7, 8)
    about = (pool / "file").stat()
    assert (about.st_mode & 0o777, about.st_uid, about.st_gid) == (0o640, 7, 8)
    poor = plain("no-owners", "no-modes") / "file"
    poor.touch()
    filesystem.own(str(poor), 0o640, 7, 8)
    about = poor.stat()
    assert (about.st_mode & 0o777, about.st_uid, about.st_gid) == (0o755, 0, 0)
    with pytest.raises(FileNotFoundError):
        filesystem.own(str(pool / "missing"), 0o640, 7, 8)


# What is in a directory.


def test_names_that_begin_as_wanted_and_not_too_many(tmp_path: Path) -> None:
    for name in ("web.qcow2", "Web-vda.qcow2", "web", "other.raw", "öl.raw", "ÖL-1.raw", "my-web"):
        (tmp_path / name).touch()
    assert filesystem.names_in(str(tmp_path), ["web"], 10) == (["Web-vda.qcow2", "web", "web.qcow2"], False)
    assert filesystem.names_in(str(tmp_path), ["web", "öl"], 10) == (
        ["Web-vda.qcow2", "web", "web.qcow2", "ÖL-1.raw", "öl.raw"],
        False,
    )
    assert filesystem.names_in(str(tmp_path), ["web"], 10, ".qcow2") == (["Web-vda.qcow2", "web.qcow2"], False)
    assert filesystem.names_in(str(tmp_path), ["web"], 3)[1] is False
    names, more = filesystem.names_in(str(tmp_path), ["web"], 2)
    assert (len(names), more) == (2, True)


def test_a_directory_tells_only_the_names_that_were_asked_for(tmp_path: Path) -> None:
    for number in range(host_info.MOST_NAMES + 10):
        (tmp_path / f"many-{number}").touch()
    (tmp_path / "web.qcow2").touch()
    told = host_info.directory(str(tmp_path))
    assert (told["names"], told["more"]) == ([], False)
    told = host_info.directory(str(tmp_path), ["web", "copy"])
    assert (told["names"], told["more"]) == (["web.qcow2"], False)
    told = host_info.directory(str(tmp_path), ["many"])
    assert (len(told["names"]), told["more"]) == (host_info.MOST_NAMES, True)
    missing = host_info.directory(str(tmp_path / "missing"), ["web"])
    assert {**told, **missing}.keys() == told.keys() == missing.keys()
    assert missing["exists"] is False


def test_nothing_is_tried_where_this_user_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(filesystem, "abilities", tried.append)
    assert host_info.directory(str(tmp_path), tried=False)["abilities"] == {}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert host_info.directory(str(tmp_path))["abilities"] == {}
    assert tried == []


def test_any_name_may_be_in_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        lacking("it takes root to be somebody else")
    directory = tmp_path / "there"
    directory.mkdir(mode=0o711)
    (directory / "web.qcow2").touch()
    for one in (tmp_path, *tmp_path.parents[:-2]):
        one.chmod(one.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        told = host_info.directory(str(directory), ["web"])
    finally:
        os.seteuid(0)
    assert (told["names"], told["more"]) == ([], True)


# What a killed process leaves.


def aged(path: Path, content: bytes = b"", age: float = filesystem.STALE_SECONDS + 60) -> Path:
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_old_probes_are_found_and_removed_and_nothing_else(tmp_path: Path) -> None:
    old = aged(tmp_path / ".kvm-clone-0011223344556677.probe")
    hole = aged(tmp_path / ".kvm-clone-8811223344556677.probe", bytes(MIB))
    others = [
        aged(tmp_path / ".kvm-clone-1.probe", age=60),
        aged(tmp_path / ".kvm-clone-2.probe", b"content"),
        aged(tmp_path / ".kvm-clone-3.part"),
        aged(tmp_path / "mine.probe"),
    ]
    (tmp_path / ".kvm-clone-4.probe").symlink_to("mine.probe")
    assert filesystem.stale_probes(str(tmp_path)) == [str(old), str(hole)]
    assert not any(filesystem.remove_probe(str(path)) for path in [*others, tmp_path / ".kvm-clone-4.probe"])
    assert filesystem.remove_probe(str(old))
    assert not filesystem.remove_probe(str(old)), "it is gone"
    assert filesystem.remove_probe(str(hole))
    assert len(list(tmp_path.iterdir())) == 5


def test_a_probe_is_removed_also_when_trying_fails(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = plain()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fail)
    assert filesystem.abilities(str(directory))["trouble"] == "Input/output error"
    assert list(directory.iterdir()) == []


# Inode numbers.


def test_an_inode_number_counts_where_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Plain) -> None:
    about = tmp_path.stat()
    assert filesystem.lasting_inode(about) == about.st_ino
    directory = plain()
    assert filesystem.kind(directory.stat().st_dev) == "fuse.plainfs"
    assert filesystem.kind(0xFFFF00FF) == ""
    monkeypatch.setattr(filesystem, "_PASSING_INODES", ("fuse.plainfs",))
    assert filesystem.lasting_inode(directory.stat()) == 0
    (directory / "file").touch()
    assert fingerprint.of(str(directory / "file")).split(":")[1] == "0"
