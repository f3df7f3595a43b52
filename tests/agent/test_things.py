"""agent/host/things.py: what paths are, on real files and devices, and what a host says of itself."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from kvm_clone.agent.host import things


def test_every_kind_of_thing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "directory")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        names = ["file", "directory", "fifo", "link", "dangling", "loop", "socket", "file/below", "none"]
        found = things.look([str(tmp_path / name) for name in names] + ["/dev/null", "nul\0"])
    assert {Path(path).name: kind for path, kind in found.items()} == {
        "file": "file",
        "directory": "directory",
        "fifo": "fifo",
        "link": "directory",
        "dangling": "missing",
        "loop": "unknown",
        "socket": "socket",
        "below": "missing",
        "none": "missing",
        "null": "char",
        "nul\0": "unknown",
    }


def test_a_name_that_is_too_long_is_not_known(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 300))
    assert things.look([path]) == {path: "unknown"}


def test_filesystems_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the first ones is still looked at; with more of them the rest is not known, in bounded time."""
    never = threading.Event()
    real = things.kind

    def kind(path: str) -> str:
        if path.startswith("/stale"):
            never.wait(30)
        return real(path)

    monkeypatch.setattr(things, "kind", kind)
    monkeypatch.setattr(things, "STALL_SECONDS", 0.2)
    began = time.monotonic()
    assert things.look(["/", "/stale/1", "/dev/null", "/stale/2", "/dev"]) == {
        "/": "directory",
        "/stale/1": "unknown",
        "/dev/null": "char",
        "/stale/2": "unknown",
        "/dev": "directory",
    }
    many = things.look(["/", *(f"/stale/{number}" for number in range(50)), "/dev"])
    assert many.pop("/") == "directory"
    assert set(many.values()) == {"unknown"}
    assert len(many) == 51
    assert time.monotonic() - began < 10
    never.set()


def test_nothing_to_look_at() -> None:
    assert things.look([]) == {}


def test_what_a_host_has() -> None:
    found = things.resources(["127.0.0.1", "::1", "192.0.2.7", "a.name", "\udcff"])
    assert found["addresses"]["127.0.0.1"] is True
    assert found["addresses"]["192.0.2.7"] is False
    assert found["addresses"]["a.name"] is None
    assert found["addresses"]["\udcff"] is None
    assert found["cpus"].startswith("0")
    assert found["nodes"] is None or found["nodes"][0].isdigit()
    assert all(len(counts) == 2 for counts in found["hugepages"].values())
    assert isinstance(found["hugetlbfs"], bool)


def test_a_kernel_without_numa_and_usb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(things, "_read", lambda path: None)
    monkeypatch.setattr(things, "_HUGE_PAGES", str(tmp_path))
    found = things.resources([])
    assert found["nodes"] is None
    assert found["hugepages"] == {}
    assert found["default_hugepage"] == 0
    assert not found["hugetlbfs"]


def test_huge_pages_and_usb_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = tmp_path / "hugepages-2048kB"
    pages.mkdir()
    (pages / "nr_hugepages").write_text("12\n")
    (pages / "free_hugepages").write_text("7\n")
    device = tmp_path / "usb" / "1-1"
    device.mkdir(parents=True)
    for name, value in (("idVendor", "1d6b"), ("idProduct", "0002"), ("busnum", "1"), ("devnum", "4")):
        (device / name).write_text(f"{value}\n")
    (tmp_path / "usb" / "1-0:1.0").mkdir()
    monkeypatch.setattr(things, "_HUGE_PAGES", str(tmp_path))
    monkeypatch.setattr(things, "_USB", str(tmp_path / "usb"))
    found = things.resources([])
    assert found["hugepages"] == {"2048": [12, 7]}
    assert found["usb"] == ["1d6b:0002", "1/4"]
