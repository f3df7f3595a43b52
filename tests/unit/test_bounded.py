"""bounded.py: files, pipes and devices that are too large, or do not end."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from kvm_clone.settings import bounded

LIMIT = 100_000


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
def test_what_fits(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * size)
    assert bounded.read(file, LIMIT) == b"x" * size


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 40])
def test_what_does_not_fit(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, size)
    with pytest.raises(OSError, match="it is larger than 100000 bytes"):
        bounded.read(file, LIMIT)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom"])
def test_a_device_without_end(device: str) -> None:
    with pytest.raises(OSError, match="it is larger than"):
        bounded.read(Path(device), LIMIT)


def test_a_device_with_nothing() -> None:
    assert bounded.read(Path(os.devnull), LIMIT) == b""


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        bounded.read(tmp_path, LIMIT)
    with pytest.raises(FileNotFoundError):
        bounded.read(tmp_path / "missing", LIMIT)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_fifo_that_nobody_writes(fifo: Path) -> None:
    started = time.monotonic()
    with pytest.raises(OSError, match="it is a FIFO that nobody writes"):
        bounded.read(fifo, LIMIT)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("content", [b"", b"a: b\n", b"x" * LIMIT])
@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_fifo_that_somebody_writes(fifo: Path, content: bytes, delay: float) -> None:
    """Before we come, or a little later, and not all at once."""
    script = f"sleep {delay}; exec > {fifo}; head -c {len(content) // 2}; sleep {delay}; cat"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as writer:
        assert writer.stdin
        feeding = threading.Thread(target=lambda: writer.communicate(content))
        feeding.start()
        assert bounded.read(fifo, LIMIT) == content
        feeding.join()


def test_a_fifo_that_somebody_holds_and_does_not_write(fifo: Path) -> None:
    holder = os.open(fifo, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="nothing comes from it"):
            bounded.read(fifo, LIMIT, seconds=0.3)
        os.write(holder, b"half")
        with pytest.raises(OSError, match="nothing comes from it"):
            bounded.read(fifo, LIMIT, seconds=0.3)
    finally:
        os.close(holder)


@pytest.mark.parametrize("content", [b"", b"a: b\n"])
def test_the_pipe_of_a_shell(content: bytes) -> None:
    """As <(...) gives it: its writer may have come and gone."""
    source, into = os.pipe()
    os.write(into, content)
    os.close(into)
    try:
        assert bounded.read(Path(f"/dev/fd/{source}"), LIMIT) == content
        assert os.get_blocking(source), "and its other users find it as it was"
    finally:
        os.close(source)


def test_nothing_stays_open(tmp_path: Path, fifo: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, fifo, Path("/dev/zero"), Path(os.devnull)):
        try:
            bounded.read(path, LIMIT)
        except OSError:
            assert path != Path(os.devnull)
    assert os.listdir("/proc/self/fd") == before
