"""What the agent says of images, as tables."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.disks import image, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.host import host_info
from kvm_clone.agent.host.this_host import this_host

from .images import encrypted, forged, make, put
from .tools import KIB, MIB, make_overlay, make_qcow2, make_raw, noise

SIZE = 4 * MIB
BASE = [(0, noise(128 * KIB)), (2 * MIB, noise(64 * KIB))]
OWN = [(64 * KIB, noise(64 * KIB, 1)), (3 * MIB, noise(192 * KIB))]

DATA_IN: dict[str, tuple[Sequence[Sequence[int]] | None, bool, int]] = {
    "all of it": (None, False, 384),
    "the overlay's own": (None, True, 256),
    "a range of both": ([[0, MIB]], False, 128),
    "a range of both, the overlay's own": ([[0, MIB]], True, 64),
    "a part of an extent": ([[3 * MIB + 64 * KIB, 3 * MIB + 96 * KIB]], True, 32),
    "ranges with a gap": ([[0, 64 * KIB], [2 * MIB, 3 * MIB + 64 * KIB]], False, 192),
    "what the image below has": ([[2 * MIB, 3 * MIB]], True, 0),
    "a hole": ([[MIB, 2 * MIB]], False, 0),
    "nothing": ([], False, 0),
}


@pytest.mark.parametrize("what", DATA_IN)
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_data_in_an_overlay(tmp_path: Path, base_format: str, what: str) -> None:
    ranges, own, kib = DATA_IN[what]
    base = tmp_path / "base"
    if base_format == "raw":
        make_raw(base, SIZE, BASE)
    else:
        make_qcow2(base, SIZE, BASE)
    over = make_overlay(tmp_path / "over", base, base_format, SIZE, OWN)
    asked = None if ranges is None else [list(pair) for pair in ranges]
    assert host_info.data_in(str(over), "qcow2", asked, own) == kib * KIB


def test_data_in_an_image_that_rests_on_none(tmp_path: Path) -> None:
    for path, format_ in (
        (make_raw(tmp_path / "a", SIZE, BASE), "raw"),
        (make_qcow2(tmp_path / "b", SIZE, BASE), "qcow2"),
    ):
        for own in (False, True):
            assert host_info.data_in(str(path), format_, None, own) == 192 * KIB


SAID: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "raw": (lambda at: make_raw(at / "disk", MIB + 1, [(0, b"x")]), "raw", {"virtual_size": MIB + 512, "data": 4096}),
    "raw, like a qcow2 image": (
        lambda at: make_raw(at / "disk", MIB, [(0, forged(b"/etc/passwd")["qcow2"])]),
        "raw",
        {"virtual_size": MIB, "data": 64 * KIB},
    ),
    "qcow2": (lambda at: make_qcow2(at / "disk", MIB, [(0, b"x")]), "qcow2", {"virtual_size": MIB, "data": 64 * KIB}),
    "qcow2 on a base": (
        lambda at: make(at / "disk", base=str(make(at / "base")), base_format="qcow2"),
        "qcow2",
        {"virtual_size": MIB, "layers": [["{at}/base", "qcow2"]], "data": 0},
    ),
    "qcow2 on a base that is not there": (
        lambda at: make(at / "disk", base="/none", base_format="raw"),
        "qcow2",
        {"error": "it rests on /none, which cannot be read: No such file or directory"},
    ),
    "qcow2 with a data file": (
        lambda at: make(at / "disk", "-o", f"data_file={at / 'data'}"),
        "qcow2",
        {"data_file": "{at}/data", "data": 0},
    ),
    "qcow2 with a data file that it does not name": (
        lambda at: put(make(at / "disk"), 72, struct.pack(">Q", 4)),
        "qcow2",
        {"data_file": "another file", "data": 0},
    ),
    "encrypted qcow2": (encrypted, "qcow2", {"encrypted": True, "data": 0}),
    "encrypted qcow2 with a data file": (
        lambda at: put(put(make(at / "disk"), 72, struct.pack(">Q", 4)), 32, struct.pack(">I", 2)),
        "qcow2",
        {"encrypted": True, "data_file": "another file", "data": 0},
    ),
    "raw, said to be qcow2": (
        lambda at: make_raw(at / "disk", MIB),
        "qcow2",
        {"error": "{at}/disk is no qcow2 image"},
    ),
    "qcow2, damaged": (
        lambda at: put(make(at / "disk"), 4, b"\0\0\0\7"),
        "qcow2",
        {"error": "{at}/disk has a damaged qcow2 header"},
    ),
    "a format that is not handled": (
        lambda at: make_raw(at / "disk", MIB),
        "vmdk",
        {"error": "{at}/disk has the format vmdk, which is not handled"},
    ),
    "a directory": (lambda at: made_directory(at / "disk"), "raw", {"regular": False, "data": 0}),
    "a FIFO": (lambda at: made_fifo(at / "disk"), "qcow2", {"regular": False, "data": 0}),
    "nothing": (lambda at: at / "disk", "raw", {"error": "No such file or directory"}),
}  # fmt: skip


def made_directory(path: Path) -> Path:
    path.mkdir()
    return path


def made_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def placed(value: Any, at: Path) -> Any:
    """The value with the directory in its texts."""
    if isinstance(value, list):
        return [placed(one, at) for one in value]
    return value.format(at=at) if isinstance(value, str) else value


@pytest.mark.parametrize("what", SAID)
def test_what_is_said_of_a_disk(what: str, tmp_path: Path) -> None:
    make_it, format_, expected = SAID[what]
    path = make_it(tmp_path)
    said = host_info.disk(str(path), format_)
    wanted = {key: placed(value, tmp_path) for key, value in expected.items()}
    assert {key: said.get(key) for key in wanted} == wanted
    for key in {"backing", "data_file", "encrypted", "error"} - wanted.keys():
        assert key not in said
    if format_ == "qcow2" and said.get("regular") and not {"data_file", "encrypted"} & said.keys():
        assert said["image"]["format"] == "qcow2"


def test_fingerprints_of_what_is_there(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", 5)
    about = path.stat()
    said = f"{about.st_dev}:{about.st_ino}:5:{about.st_mtime_ns}:{about.st_ctime_ns}"
    assert host_info.fingerprints([str(path), str(tmp_path / "none"), str(path / "below")]) == [said, None, None]


def test_by_what_a_host_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    monkeypatch.setattr(host_info, "LIBVIRT_SOCKETS", (str(tmp_path / "none"), str(make_raw(tmp_path / "socket", 0))))
    about = (tmp_path / "socket").stat()
    said = host_info.identity()
    assert said["boot"] == boot
    assert said["libvirt"] == f"{about.st_dev}:{about.st_ino}:{about.st_ctime_ns}"
    assert said["machine"] == this_host().machine
    monkeypatch.setattr(host_info, "LIBVIRT_SOCKETS", ())
    assert host_info.identity()["libvirt"] == ""
    assert host_info._line(str(tmp_path / "none")) == ""


@pytest.mark.parametrize("size", [0, 1, 7, 511, 512, 513, 1_000_001, MIB])
def test_a_raw_disks_size_is_what_qemu_says(tmp_path: Path, size: int) -> None:
    path = make_raw(tmp_path / "disk", size, [(0, noise(size))])
    said = host_info.disk(str(path), "raw")
    assert said["virtual_size"] == qemu.info(str(path), "raw")["virtual-size"]
    assert said["data"] == pytest.approx(size, abs=511)


# How much an image holds, and what a copy of it takes.


def compressed(path: Path, cluster: str = "65536") -> Path:
    """An image of 1 MiB of content that compresses well."""
    return make_qcow2(path, SIZE, [(0, b"x" * MIB)], {"cluster_size": cluster}, compress=True)


def test_what_stays_compressed_takes_less_than_its_content(tmp_path: Path) -> None:
    said = host_info.disk(str(compressed(tmp_path / "a")), "qcow2")
    assert said["data"] == MIB
    assert 0 < said["stored"] <= 512 * KIB
    said = host_info.disk(str(compressed(tmp_path / "b", "2097152")), "qcow2")
    assert (said["data"], said["stored"]) == (2 * MIB, 0), "clusters of this size are stored uncompressed"
    for path, format_ in (
        (make_raw(tmp_path / "c", SIZE, BASE), "raw"),
        (make_qcow2(tmp_path / "d", SIZE, BASE), "qcow2"),
    ):
        said = host_info.disk(str(path), format_)
        assert (said["data"], said["stored"]) == (192 * KIB, 0)


def test_a_part_that_is_compressed(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a")
    disk = image.StagedImage(str(path))
    disk.write(2 * MIB, memoryview(noise(MIB)))
    disk.flush()
    disk.close()
    said = host_info.disk(str(path), "qcow2")
    assert said["data"] == 2 * MIB
    assert MIB < said["stored"] < 2 * MIB - 256 * KIB


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_what_an_image_holds_while_it_is_written(tmp_path: Path, format_: str) -> None:
    make = make_raw if format_ == "raw" else make_qcow2
    path = make(tmp_path / "disk", SIZE, BASE)
    writer = qemu.open_nbd([Node(str(path), format_)], writable=True)
    try:
        said = host_info.disk(str(path), format_, live=True)
    finally:
        writer.close()
    assert (said["data"], said["stored"]) == (192 * KIB, 0)


def test_what_is_compressed_is_counted_whole_while_it_is_written(tmp_path: Path) -> None:
    """A backup job offers it uncompressed."""
    said = host_info.disk(str(compressed(tmp_path / "a")), "qcow2", live=True)
    assert (said["data"], said["stored"]) == (MIB, 0)


def test_tables_that_cannot_be_read_while_they_are_written(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", SIZE, BASE)
    with path.open("r+b") as file:
        file.seek(40)  # l1_table_offset, docs/interop/qcow2.txt
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write((1 << 63 | 0x12345).to_bytes(8, "big"))
    said = host_info.disk(str(path), "qcow2", live=True)
    assert said["data"] >= 192 * KIB, "what the file holds"
    assert "error" in host_info.disk(str(path), "qcow2")


def test_what_is_staged_holds_nothing_that_could_be_told_while_it_is_written(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", SIZE, BASE)
    assert host_info.data_held(str(path), "qcow2") == 192 * KIB
    writer = qemu.open_nbd([Node(str(path), "qcow2")], writable=True)
    try:
        assert host_info.data_held(str(path), "qcow2") == 0
    finally:
        writer.close()
    assert host_info.data_held(str(tmp_path / "missing"), "raw") == 0
