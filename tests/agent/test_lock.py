"""Locks against QEMU and against each other, with real processes at both ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvm_clone.agent.disks import fingerprint, image, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging.lock import OperationLock

from .tools import MIB, ending, make_qcow2, make_raw, need, processes, python

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["raw", "qcow2"])
def format_(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path, format_: str) -> Path:
    make = make_raw if format_ == "raw" else make_qcow2
    return make(tmp_path / "a disk", MIB, [(0, b"content")])


@pytest.fixture
def lock(path: Path) -> Iterator[ImageLock]:
    taken = ImageLock(str(path))
    yield taken
    taken.release()


def test_a_writer_keeps_us_out(path: Path, format_: str) -> None:
    with closing(qemu.open_nbd([Node(str(path), format_)], writable=True)):
        with pytest.raises(AgentError) as caught:
            ImageLock(str(path))
        assert caught.value.kind == errors.IN_USE
    ImageLock(str(path)).release()


def test_a_writer_that_hangs_keeps_us_out(path: Path, format_: str) -> None:
    with closing(qemu.open_nbd([Node(str(path), format_)], writable=True)):
        (writer,) = processes(str(path))
        os.kill(writer, signal.SIGSTOP)
        try:
            with pytest.raises(AgentError, match="another process"):
                ImageLock(str(path))
        finally:
            os.kill(writer, signal.SIGCONT)


def test_a_refused_lock_leaves_no_descriptor(path: Path, format_: str) -> None:
    with closing(qemu.open_nbd([Node(str(path), format_)], writable=True)):
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            with pytest.raises(AgentError):
                ImageLock(str(path))
        assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.usefixtures("lock")
def test_we_keep_writers_out(path: Path, format_: str) -> None:
    need("qemu-io")
    before = (path.read_bytes(), fingerprint.of(str(path)))
    writing = subprocess.run(["qemu-io", "-f", format_, "-c", "write 0 512", str(path)], capture_output=True)
    assert b"lock" in writing.stderr
    with pytest.raises(AgentError, match="another process"):
        qemu.open_nbd([Node(str(path), format_)], writable=True)
    assert (path.read_bytes(), fingerprint.of(str(path))) == before


@pytest.mark.usefixtures("lock")
def test_readers_and_other_locks_go_on(path: Path, format_: str) -> None:
    before = (path.read_bytes(), fingerprint.of(str(path)))
    other = ImageLock(str(path))
    assert qemu.info(str(path), format_)["virtual-size"] == MIB
    subprocess.run(["qemu-img", "compare", "-f", format_, "-F", format_, str(path), str(path)], check=True)
    with closing(image.open_for_reading(str(path), format_)) as disk:
        list(disk.extents())
        content = bytearray(7)
        disk.readinto(0, memoryview(content))
        assert content == b"content"
    other.release()
    writing = subprocess.run(["qemu-io", "-f", format_, "-c", "write 0 512", str(path)], capture_output=True)
    assert b"lock" in writing.stderr
    assert (path.read_bytes(), fingerprint.of(str(path))) == before


def test_a_released_lock_lets_writers_in(path: Path, format_: str, lock: ImageLock) -> None:
    lock.release()
    lock.release()
    subprocess.run(["qemu-io", "-f", format_, "-c", "write 0 512", str(path)], check=True, stdout=subprocess.DEVNULL)


HOLDER = """
import sys
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.staging.lock import OperationLock
kind, path = sys.argv[1:]
held = ImageLock(path) if kind == "ImageLock" else OperationLock(path, {"operation": "0f", "pid": "me"})
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_dead_holder_lets_writers_in(path: Path, format_: str) -> None:
    with ending(python(HOLDER, "ImageLock", path)) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(AgentError):
            qemu.open_nbd([Node(str(path), format_)], writable=True)
        holder.kill()
        holder.wait()
    qemu.open_nbd([Node(str(path), format_)], writable=True).close()


def test_an_operation_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with ending(python(HOLDER, "OperationLock", path)) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        for _ in range(2):
            with pytest.raises(AgentError, match="operation 0f, pid me") as caught:
                OperationLock(str(path), {})
            assert caught.value.kind == errors.LOCKED
        holder.kill()
        holder.wait()
    assert path.exists(), "a holder that was killed leaves its file"
    lock = OperationLock(str(path), {"operation": "next"})
    assert json.loads(path.read_text()) == {"operation": "next"}
    lock.release()
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"{" * 10_000])
def test_a_lock_file_with_any_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = OperationLock(str(path), {"operation": "first"})
    path.write_bytes(content)
    with pytest.raises(AgentError, match="another operation is under way") as caught:
        OperationLock(str(path), {})
    assert caught.value.kind == errors.LOCKED
    first.release()
    path.write_bytes(content)
    OperationLock(str(path), {}).release()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        OperationLock(str(tmp_path / "lock"), {})
    assert not (tmp_path / "elsewhere").exists()


RACER = """
import os, sys, time
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging.lock import OperationLock
path, witness, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = 0
while done < turns:
    try:
        lock = OperationLock(path, {"pid": os.getpid()})
    except AgentError:
        continue
    os.close(os.open(witness, os.O_CREAT | os.O_EXCL))  # fails when another one holds the lock too
    os.unlink(witness)
    lock.release()
    done += 1
print(done)
"""


def test_there_is_one_holder_at_a_time(tmp_path: Path) -> None:
    turns = 40
    racers = [python(RACER, tmp_path / "lock", tmp_path / "witness", turns) for _ in range(5)]
    answers = [racer.communicate(timeout=50)[0] for racer in racers]
    assert answers == [b"%d\n" % turns] * len(racers)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(10)
def test_nobody_waits_for_a_fifo_at_an_images_path(tmp_path: Path) -> None:
    fifo = tmp_path / "disk"
    os.mkfifo(fifo)
    ImageLock(str(fifo)).release()
    assert image.open_for_reading(str(fifo), image.RAW).size == 0
