"""Who uses a file: a table of everything that definitions, images and the host can say of it."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.host import uses
from kvm_clone.agent.host.uses import ABSENT, DOUBT, FILE, FREE, IMAGE, ODD, TREE, UNKNOWN, USED

from .images import SIZE, encrypted, forged, make, put, qcow2_header, without_base_format
from .tools import as_nobody, make_raw

pytestmark = pytest.mark.timeout(60)

Claims = list[list[str]]


def state_of(path: Path, claims: Claims, **how: Any) -> tuple[str, str]:
    """What is known of the one file, and why."""
    question: dict[str, Any] = {"directories": [], "elsewhere": [], **how}
    (answer,) = uses.uses([str(path)], claims, **question)
    assert answer["path"] == str(path)
    assert bool(answer["why"]) == (answer["state"] != FREE)
    return answer["state"], answer["why"]


def claim(path: object, kind: str = IMAGE, format_: str = "raw") -> list[str]:
    return ["the VM web", kind, str(path), format_]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A directory with a `disk` that is asked about."""
    directory = tmp_path / "pool"
    directory.mkdir()
    make_raw(directory / "disk", SIZE)
    (directory / "below").mkdir()
    return directory


def linked(pool: Path, *, hard: bool = False) -> Path:
    link = pool / "below" / "link"
    if hard:
        link.hardlink_to(pool / "disk")
    else:
        link.symlink_to(pool / "disk")
    return link


def over(pool: Path, base: str, base_format: str = "raw") -> list[str]:
    """The claim of an image that rests on this base."""
    return claim(make(pool / "over", base=base, base_format=base_format), format_="qcow2")


def nodes(path: Path, driver: str = "raw") -> str:
    return "json:" + json.dumps({"driver": driver, "file": {"driver": "file", "filename": str(path)}})


def deep(pool: Path) -> list[str]:
    two = make(pool / "below" / "2", base="../disk", base_format="raw")
    one = make(pool / "1", base=nodes(two, "qcow2"), base_format="qcow2")
    return over(pool, f"file:{one}", "qcow2")


ARE_USED: dict[str, Callable[[Path], list[str]]] = {
    "the same path": lambda pool: claim(pool / "disk"),
    "a path with detours": lambda pool: claim(f"{pool}/below/..//./disk"),
    "a symbolic link to it": lambda pool: claim(linked(pool)),
    "a hard link": lambda pool: claim(linked(pool, hard=True)),
    "a way through a link to a directory": lambda pool: claim(through(pool) / "disk"),
    "a file that is no image": lambda pool: claim(pool / "disk", FILE),
    "a hard link that is no image": lambda pool: claim(linked(pool, hard=True), FILE),
    "its directory": lambda pool: claim(pool, TREE),
    "a directory above": lambda pool: claim(pool.parent, TREE),
    "a link to its directory": lambda pool: claim(through(pool), TREE),
    "a base": lambda pool: over(pool, str(pool / "disk")),
    "a base by a relative path": lambda pool: over(pool, "disk"),
    "a base by a path with detours": lambda pool: over(pool, "below/../disk"),
    "a base by file:": lambda pool: over(pool, f"file:{pool}/disk"),
    "a base by nodes": lambda pool: over(pool, nodes(pool / "disk")),
    "a base by flat nodes": lambda pool: over(
        pool, json.dumps({"driver": "raw", "file.filename": f"{pool}/disk", "file.driver": "file"}).join(["json:", ""])
    ),
    "a base by a hard link": lambda pool: over(pool, str(linked(pool, hard=True))),
    "a base of a format that is not said": lambda pool: [
        *over(pool, str(pool / "disk"))[:2],
        str(without_base_format(pool / "over")),
        "qcow2",
    ],
    "an image whose format nobody says": lambda pool: [*over(pool, str(pool / "disk"))[:3], ""],
    "a data file": lambda pool: claim(
        put(make(pool / "over", "-o", f"data_file={pool}/made"), 0, data_header(pool / "disk")), format_="qcow2"
    ),
    "the bottom of a chain": deep,
}


def through(pool: Path) -> Path:
    link = pool.parent / "link"
    link.symlink_to(pool)
    return link


def data_header(path: Path) -> bytes:
    return qcow2_header(b"", data_file=os.fsencode(path))


@pytest.mark.parametrize("how", ARE_USED)
def test_what_a_definition_names_is_used(how: str, pool: Path) -> None:
    state, why = state_of(pool / "disk", [ARE_USED[how](pool)])
    assert (state, why) == (USED, "the VM web uses it")


@pytest.mark.parametrize("hard", [False, True])
def test_another_name_of_what_a_vm_has_is_used(hard: bool, pool: Path) -> None:
    assert state_of(linked(pool, hard=hard), [claim(pool / "disk")]) == (USED, "the VM web uses it")


def test_a_path_that_a_definition_names_is_used_whatever_is_there(pool: Path) -> None:
    assert state_of(pool / "none", [claim(pool / "none")])[0] == USED


ARE_FREE: dict[str, Callable[[Path], list[str]]] = {
    "another file": lambda pool: claim(make_raw(pool / "other", SIZE)),
    "what is not there": lambda pool: claim(pool / "none", FILE),
    "a directory beside it": lambda pool: claim(pool / "below", TREE),
    "a raw disk whose guest says that it rests on it": lambda pool: claim(
        make_raw(pool / "over", SIZE, [(0, qcow2_header(os.fsencode(pool / "disk"), base_format=b"raw"))])
    ),
    "an image on a remote base": lambda pool: over(pool, "nbd://host/disk"),
    "an encrypted image": lambda pool: claim(encrypted(pool), format_="qcow2"),
}


@pytest.mark.parametrize("how", ARE_FREE)
def test_what_no_definition_names_is_free(how: str, pool: Path) -> None:
    assert state_of(pool / "disk", [ARE_FREE[how](pool)], directories=[str(pool)]) == (FREE, "")


@pytest.mark.parametrize("format_", sorted(forged(b"")))
def test_a_raw_disk_uses_nothing_whatever_its_guest_writes(format_: str, pool: Path) -> None:
    head = forged(os.fsencode(pool / "disk"))[format_]
    other = make_raw(pool / "other", SIZE, [(0, head)])
    assert state_of(pool / "disk", [claim(other)], directories=[str(pool)]) == (FREE, "")


NOT_KNOWN: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a doubt": (lambda _pool: claim("its disk vdb is of a kind that is not known", DOUBT), "its disk vdb is of"),
    "a missing base": (lambda pool: over(pool, "none", "qcow2"), "none cannot be read"),
    "a missing image": (lambda pool: claim(pool / "none", format_="qcow2"), "none cannot be read"),
    "an image of another format": (lambda pool: claim(make_raw(pool / "b", 9), format_="qcow2"), "no qcow2 image"),
    "an image of a format that we cannot read": (lambda pool: claim(pool / "below", format_="vmdk"), "format vmdk"),
    "a base of a format that we cannot read": (lambda pool: over(pool, "other", "qed"), "format qed"),
    "a base by a way that we do not know": (lambda pool: over(pool, "fat:rw:/tmp"), "not understood"),
    "a base that two say differently of": (lambda pool: over(pool, nodes(pool / "x"), "qcow2"), "qcow2 and raw"),
    "a loop of links": (lambda pool: claim(loop(pool), FILE), "cannot be looked at"),
    "a base behind a loop of links": (lambda pool: over(pool, str(loop(pool)), "qcow2"), "cannot be"),
    "an image with a zero byte in its base's name": (
        lambda pool: claim(put(make(pool / "over"), 0, qcow2_header(b"/a\0b")), format_="qcow2"),
        "damaged",
    ),
}


def loop(pool: Path) -> Path:
    path = pool / "loop"
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("what", NOT_KNOWN)
def test_what_is_not_known_makes_nothing_free(what: str, pool: Path) -> None:
    how, expected = NOT_KNOWN[what]
    state, why = state_of(pool / "disk", [how(pool), claim(make_raw(pool / "other2", SIZE))])
    assert state == UNKNOWN
    assert "the VM web" in why
    assert expected in why


def test_a_doubt_does_not_hide_a_use(pool: Path) -> None:
    doubt = claim("something", DOUBT)
    assert state_of(pool / "disk", [doubt, claim(pool / "disk")])[0] == USED
    assert "(and 2 more reasons)" in state_of(pool / "disk", [claim(name, DOUBT) for name in "abc"])[1]


def test_an_image_that_we_may_not_read(open_to_all: Path) -> None:
    disk = make_raw(open_to_all / "disk", SIZE)
    image = make(open_to_all / "over", base="disk", base_format="raw")
    image.chmod(0)
    (open_to_all / "closed").mkdir(mode=0o700)
    hidden = make_raw(open_to_all / "closed" / "disk", SIZE)
    with as_nobody():
        assert state_of(disk, [claim(image, format_="qcow2")])[0] == UNKNOWN
        assert state_of(disk, [claim(hidden, FILE)])[0] == UNKNOWN
        state, why = state_of(hidden, [])
    assert (state, "cannot be looked at" in why) == (UNKNOWN, True)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


ODD_ONES: dict[str, Callable[[Path], object]] = {
    "a symbolic link": lambda path: path.symlink_to(path.parent / "disk"),
    "a directory": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": lambda path: bound(path),
}


@pytest.mark.parametrize("kind", ODD_ONES)
def test_what_is_no_regular_file(kind: str, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no file that could be removed, and nobody waits for it."""
    monkeypatch.chdir(pool)  # a socket's path is short
    ODD_ONES[kind](Path("odd"))
    started = time.monotonic()
    assert state_of(pool / "odd", [], directories=[str(pool)], processes=True)[0] == ODD
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["none", "none/below", "disk/below"])
def test_what_is_not_there(name: str, pool: Path) -> None:
    assert state_of(pool / name, [claim(pool / "disk")]) == (ABSENT, "it is not there")


ORPHANS: dict[str, tuple[str, bool]] = {
    "an image": ("orphan.qcow2", True),
    "an image without a suffix": ("orphan", True),
    "a staged overlay of ours": (".kvm-clone-0f-vda.part", False),
    "an overlay of ours that is about to be merged": ("kvm-clone-0f-vda.qcow2", False),
    "one that has a name like ours": ("kvm-clone.qcow2", True),
}


@pytest.mark.parametrize("which", ORPHANS)
def test_an_image_that_no_vm_has_and_that_rests_on_it(which: str, pool: Path) -> None:
    name, counts = ORPHANS[which]
    orphan = make(pool / name, base="disk", base_format="raw")
    state, why = state_of(pool / "disk", [], directories=[str(pool)])
    assert (state, why) == ((USED, f"the image {orphan} uses it") if counts else (FREE, ""))
    assert state_of(pool / "disk", [])[0] == FREE, "nobody has said where to look"


def test_images_around_it_that_say_nothing_of_use(pool: Path) -> None:
    """No VM has them, and they do not rest on it as far as anybody can tell."""
    make(pool / "a", base="none", base_format="qcow2")
    put(make(pool / "b"), 0, qcow2_header(b"/a\0b"))
    (pool / "c").write_bytes(b"QFI\xfb")
    os.mkfifo(pool / "d")
    loop(pool)
    make(pool / "e", base='json:{"driver":[]}', base_format="qcow2")
    assert state_of(pool / "disk", [], directories=[str(pool), str(pool / "none")]) == (FREE, "")


def test_an_image_is_not_used_by_itself(pool: Path) -> None:
    make(pool / "own", base="disk", base_format="raw")
    assert state_of(pool / "own", [], directories=[str(pool)]) == (FREE, "")


def test_too_many_images_to_look_at(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "_SCAN_SECONDS", -1.0)
    state, why = state_of(pool / "disk", [], directories=[str(pool)])
    assert (state, "too many files" in why) == (UNKNOWN, True)


def test_a_directory_that_cannot_be_listed_may_have_an_image_that_rests_on_it(open_to_all: Path) -> None:
    disk = make_raw(open_to_all / "disk", SIZE)
    closed = open_to_all / "closed"
    closed.mkdir()
    make(closed / "orphan.qcow2", base=str(disk), base_format="raw")
    closed.chmod(0o311)
    with as_nobody():
        state, why = state_of(disk, [], directories=[str(closed)])
        again = state_of(disk, [], directories=[str(closed), str(open_to_all / "none"), str(disk)])
    closed.chmod(0o755)
    said = f"{closed} cannot be searched for images that rest on others: Permission denied"
    assert (state, why.endswith(said)) == (UNKNOWN, True)
    assert again == (state, why), "what is not there, or is no directory, has no images"
    assert state_of(disk, [], directories=[str(closed)])[0] == USED


def test_a_directory_whose_listing_breaks_off(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> Iterator[str]:
        yield str(pool / "disk")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(uses, "_files_in", broken)
    state, why = state_of(pool / "disk", [], directories=[str(pool)])
    assert (state, "Input/output error" in why) == (UNKNOWN, True)


def test_a_file_of_a_vm_on_another_host(pool: Path) -> None:
    """Both see one filesystem, which has another number there."""
    said = fingerprint.of(str(pool / "disk"))
    device, _, rest = said.partition(":")
    there = f"{int(device) + 1}:{rest}"
    assert state_of(pool / "disk", [], elsewhere=[there]) == (USED, "the source VM uses it")
    other = make_raw(pool / "other", SIZE)
    assert state_of(other, [], elsewhere=[there]) == (FREE, "")
    for part in range(1, 5):
        changed = there.split(":")
        changed[part] = str(int(changed[part]) + 1)
        assert state_of(pool / "disk", [], elsewhere=[":".join(changed)]) == (FREE, "")


def test_many_at_once(pool: Path) -> None:
    paths = [str(pool / name) for name in ("disk", "none", "below", "over")]
    answers = uses.uses(paths, [over(pool, "disk")], [], [])
    assert [(answer["path"], answer["state"]) for answer in answers] == list(
        zip(paths, (USED, ABSENT, ODD, USED), strict=True)
    )
    assert [answer["identity"] for answer in answers] == [
        f"{os.stat(path).st_dev}:{os.stat(path).st_ino}" if os.path.exists(path) else "" for path in paths
    ]  # fmt: skip
    assert uses.uses([], [], [str(pool)], []) == []


def test_a_path_that_does_not_answer(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a filesystem whose server is gone."""
    monkeypatch.setattr(uses, "SECONDS", 0.3)
    real = os.stat

    def slow(path: Any, **how: Any) -> os.stat_result:
        if str(path) == "/gone/disk":
            time.sleep(3)
        return real(path, **how)

    monkeypatch.setattr(os, "stat", slow)
    started = time.monotonic()
    paths = [pool / "disk", pool / "none"]
    answers = uses.uses([str(path) for path in paths], [claim("/gone/disk", FILE)], [], [])
    assert time.monotonic() - started < 2
    assert {answer["state"] for answer in answers} == {UNKNOWN}
    assert all("within" in answer["why"] for answer in answers)
    assert [answer["path"] for answer in answers] == [str(path) for path in paths]


def test_what_goes_wrong_is_told(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of ours is no answer."""
    monkeypatch.setattr(os.path, "realpath", lambda path: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        uses.uses([str(pool / "disk")], [], [], [])
