"""What goes wrong with NBD servers, and that none of them stays behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from kvm_clone.agent.disks import image, nbd, nbd_session, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.disks.disk import DATA
from kvm_clone.agent.disks.nbd import NbdDisk
from kvm_clone.agent.host import host_info
from kvm_clone.agent.process import run
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError, from_exception
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK, ProtocolError

from .tools import (
    KIB,
    MIB,
    arriving,
    ending,
    eventually,
    exported,
    make_qcow2,
    make_raw,
    nbdkit,
    noise,
    processes,
    python,
    read,
)

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[NbdDisk]:
    opened = qemu.open_nbd([Node(str(make_qcow2(tmp_path / "disk", 64 * MIB)), "qcow2")], writable=True)
    yield opened
    try:
        opened.close()
    except AgentError:
        assert "dies" not in str(tmp_path)


def fill(disk: NbdDisk) -> None:
    content = memoryview(noise(CHUNK))
    for offset in range(0, disk.size, CHUNK):
        disk.write(offset, content)
    disk.flush()


def receive(how: str) -> Callable[[NbdDisk], None]:
    def act(disk: NbdDisk) -> None:
        with arriving(noise(CHUNK) * 64, how=how) as source:
            incoming = Incoming(source)
            try:
                for offset in range(0, disk.size, CHUNK):
                    disk.receive(offset, CHUNK, incoming)
                disk.flush()
            finally:
                incoming.close()

    return act


def zero(disk: NbdDisk) -> None:
    disk.zero(0, MIB)
    disk.flush()


ACTS: dict[str, Callable[[NbdDisk], object]] = {
    "write": fill,
    "receive from a pipe": receive("pipe"),
    "receive from a socket": receive("socket"),
    "read": lambda disk: disk.readinto(0, memoryview(bytearray(4 * MIB))),
    "zero": zero,
    "extents": lambda disk: list(disk.extents()),
    "flush": lambda disk: disk.flush(),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_server_that_was_killed(act: str, disk: NbdDisk, tmp_path: Path) -> None:
    disk.write(0, memoryview(noise(CHUNK)))
    (server,) = processes(str(tmp_path / "disk"))
    os.kill(server, signal.SIGKILL)
    with pytest.raises(OSError) as caught:
        ACTS[act](disk)
    assert from_exception(caught.value).kind == errors.INTERRUPTED
    with pytest.raises(AgentError, match="qemu-nbd: ended with status -9"):
        disk.close()
    disk.close()


def test_a_server_that_is_killed_while_it_writes(disk: NbdDisk, tmp_path: Path) -> None:
    (server,) = processes(str(tmp_path / "disk"))
    for offset in range(0, 8 * CHUNK, CHUNK):
        disk.write(offset, memoryview(noise(CHUNK)))
    os.kill(server, signal.SIGKILL)
    with pytest.raises(OSError):
        fill(disk)
    with pytest.raises(AgentError):
        disk.close()


@pytest.mark.parametrize("act", ["write", "read"])
def test_a_server_that_hangs(act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_session, "_TIMEOUT", 1.0)
    path = make_qcow2(tmp_path / "disk", 64 * MIB)
    disk = qemu.open_nbd([Node(str(path), "qcow2")], writable=True)
    (server,) = processes(str(path))
    os.kill(server, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(OSError) as caught:
        ACTS[act](disk)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begun < 10
    os.kill(server, signal.SIGKILL)
    with pytest.raises(AgentError):
        disk.close()


def test_writing_to_a_read_only_export(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", MIB, [(0, b"kept")])
    with closing(qemu.open_nbd([Node(str(path), "qcow2")], writable=False)) as disk:
        disk.write(0, memoryview(b"lost"))
        with pytest.raises(OSError, match="write at 0"):
            disk.flush()
    with closing(image.MappedDisk(str(path), "qcow2")) as reader:
        assert read(reader, 0, 4) == b"kept"


NOT_NBD = {
    "another protocol": (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", ProtocolError),
    "zeros": (bytes(18), ProtocolError),
    "the oldstyle handshake": (struct.pack(">QQQ", nbd_session._MAGIC, 0x420281861253, MIB), ProtocolError),
    "no fixed newstyle": (struct.pack(">QQH", nbd_session._MAGIC, nbd_session._OPTION_MAGIC, 0), ProtocolError),
    "nonsense after the greeting": (
        struct.pack(">QQH", nbd_session._MAGIC, nbd_session._OPTION_MAGIC, 3) + b"?" * 20,
        ProtocolError,
    ),
    "nothing": (b"", ConnectionResetError),
    "a part of a greeting": (struct.pack(">Q", nbd_session._MAGIC), ConnectionResetError),
}


@pytest.mark.parametrize("name", NOT_NBD)
def test_a_server_that_does_not_speak_nbd(name: str) -> None:
    says, error = NOT_NBD[name]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(says)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(error):
            NbdDisk(ours)


def test_a_server_without_the_extensions_has_only_data(tmp_path: Path) -> None:
    with nbdkit("--no-sr", "file", str(make_raw(tmp_path / "disk", 100_001, [(7, b"x")]))) as disk:
        assert [(extent.offset, extent.length, extent.kind) for extent in disk.extents()] == [(0, 100_001, DATA)]
        assert read(disk) == bytes(7) + b"x" + bytes(100_001 - 8)


def test_a_hole_that_does_not_read_as_zeros_is_data(tmp_path: Path) -> None:
    script = [
        "get_size=echo 1M",
        "pread=head -c $3 /dev/zero | tr '\\0' x",
        "can_extents=exit 0",
        "extents=echo 0 1M hole",
    ]
    with nbdkit("eval", *script) as disk:
        assert [(extent.length, extent.kind) for extent in disk.extents()] == [(MIB, DATA)]
        assert read(disk, 0, 4) == b"xxxx"


def test_a_disk_that_is_larger_than_one_request_can_name() -> None:
    with nbdkit("memory", "10T") as disk:
        disk.write(disk.size - 1, memoryview(b"x"))
        disk.zero(0, 5 << 30)
        disk.flush()
        extents = list(disk.extents(disk.size - (3 << 30)))
        assert extents[0].offset == disk.size - (3 << 30)
        assert extents[-1].end == disk.size
        assert all(first.end == second.offset for first, second in pairwise(extents))
        assert extents[-1].kind == DATA
        assert sum(extent.length for extent in extents if extent.kind == DATA) < MIB


@pytest.mark.parametrize("act", ["write", "receive from a pipe", "receive from a socket"])
def test_a_full_filesystem(act: str, way: str, small: Path) -> None:
    with closing(image.StagedImage(str(make_qcow2(small / "disk", 64 * MIB)))) as staged:
        with pytest.raises(OSError) as caught:
            ACTS[act](staged._nbd)
        assert caught.value.errno == errno.ENOSPC
        assert from_exception(caught.value).kind == errors.NO_SPACE


FILTERS = [(act, structured) for act in ("write", "zero", "read") for structured in (True, False)]


@pytest.mark.parametrize(("act", "structured"), [*FILTERS, ("extents", True)])
def test_the_error_that_the_server_names(act: str, structured: bool) -> None:
    filter_ = {"write": "pwrite", "read": "pread"}.get(act, act)
    options = [] if structured else ["--no-sr"]
    arguments = ["--filter=error", "memory", "8M", f"error-{filter_}=ENOSPC", f"error-{filter_}-rate=1"]
    with nbdkit(*options, *arguments) as disk:
        with pytest.raises(OSError) as caught:
            ACTS[act](disk)
        assert caught.value.errno == errno.ENOSPC
        assert os.strerror(errno.ENOSPC) in str(caught.value)


def test_a_failed_write_is_not_forgotten() -> None:
    with nbdkit("--filter=error", "memory", "8M", "error-pwrite=EIO", "error-pwrite-rate=1") as disk:
        disk.write(0, memoryview(b"x"))
        for _ in range(2):
            with pytest.raises(OSError, match="write at 0"):
                disk.flush()


@pytest.mark.parametrize("compress", [False, True])
def test_close_leaves_no_process(compress: bool, tmp_path: Path) -> None:
    path = str(make_qcow2(tmp_path / "a name, with: '\"comma", MIB))
    disk = image.StagedImage(path)
    disk.compress(compress)
    assert len(processes(str(tmp_path))) == 1
    disk.write(0, memoryview(noise(64 * KIB)))
    disk.flush()
    disk.close()
    assert not processes(str(tmp_path))


OWNER = """
import sys, time
from kvm_clone.agent.disks import image
disk = image.StagedImage(sys.argv[1])
disk.write(0, memoryview(b"x" * 65536))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_owner(number: signal.Signals, hangs: bool, tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", MIB)
    with ending(python(OWNER, path)) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"ready\n"
        (server,) = set(processes(str(path))) - {owner.pid}
        if hangs:
            os.kill(server, signal.SIGSTOP)
        owner.send_signal(number)
        owner.wait()
        assert eventually(lambda: not processes(str(path)))


def test_qemu_nbd_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_qcow2(tmp_path / "disk", MIB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AgentError, match="qemu-nbd is not installed") as caught:
        qemu.open_nbd([Node(str(path), "qcow2")], writable=True)
    assert caught.value.kind == errors.MISSING


@pytest.mark.parametrize("writable", [True, False])
def test_an_image_of_another_format(writable: bool, tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", MIB)
    with pytest.raises(AgentError, match="Image is not in qcow2 format"):
        qemu.open_nbd([Node(str(path), "qcow2")], writable=writable)
    with pytest.raises(AgentError, match="disk is no qcow2 image"):
        image.open_for_reading(str(path), "qcow2")
    assert not processes(str(path))


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="No such file"):
        qemu.open_nbd([Node(str(tmp_path / "disk"), "qcow2")], writable=True)


def test_an_image_that_another_process_writes(disk: NbdDisk, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="another process"):
        qemu.open_nbd([Node(str(tmp_path / "disk"), "qcow2")], writable=True)


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    path = str(make_qcow2(tmp_path / "disk", MIB))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with closing(image.StagedImage(path)) as staged:
            staged.compress(True)
        with pytest.raises(AgentError):
            qemu.open_nbd([Node(sys.executable, "qcow2")], writable=False)
    assert len(os.listdir("/proc/self/fd")) == before


def tracked(directory: Path, *bitmaps: str) -> Path:
    """An image with dirty bitmaps, which know what was written since."""
    path = make_qcow2(directory / "disk", 8 * MIB, [(0, noise(MIB))])
    for name in bitmaps:
        run(["qemu-img", "bitmap", "--add", "-f", "qcow2", "--", str(path), name])
    return path


DIRTY = ["write -P 1 64k 64k", "write -P 2 1M 1", "write -z 2M 128k", "discard 4M 64k", "write -P 3 8388607 1"]


def test_what_a_dirty_bitmap_names(tmp_path: Path) -> None:
    path = tracked(tmp_path, "backup-vda")
    run(["qemu-io", "-f", "qcow2", *(word for command in DIRTY for word in ("-c", command)), str(path)])
    expected = [[64 * KIB, 128 * KIB], [MIB, MIB + 64 * KIB], [2 * MIB, 2 * MIB + 128 * KIB],
                [4 * MIB, 4 * MIB + 64 * KIB], [8 * MIB - 64 * KIB, 8 * MIB]]  # fmt: skip
    with exported(path, "qcow2", "vda", "--read-only", "-B", "backup-vda") as listening:
        found = host_info.dirty(nbd.uri(listening, "vda"), "backup-vda")
        assert found == expected
        with closing(nbd.connect(nbd.uri(listening, "vda"))) as disk:
            assert disk.size == 8 * MIB
            assert read(disk, 64 * KIB, 4) == b"\1\1\1\1"


def test_a_dirty_bitmap_that_names_nothing(tmp_path: Path) -> None:
    path = tracked(tmp_path, "backup-vda")
    with exported(path, "qcow2", "vda", "--read-only", "-B", "backup-vda") as listening:
        assert host_info.dirty(nbd.uri(listening, "vda"), "backup-vda") == []


@pytest.mark.parametrize("bitmap", ["other", "backup", "backup-vda2", ""])
def test_a_dirty_bitmap_that_is_not_there(bitmap: str, tmp_path: Path) -> None:
    path = tracked(tmp_path, "backup-vda", "not-exported")
    with exported(path, "qcow2", "vda", "--read-only", "-B", "backup-vda") as listening:
        for asked in (bitmap, "not-exported"):
            with pytest.raises(AgentError, match="bitmap") as caught:
                host_info.dirty(nbd.uri(listening, "vda"), asked)
            assert caught.value.kind == errors.MISSING


def test_a_disk_that_is_all_dirty_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests, whose answers end where the requests do."""
    monkeypatch.setattr(nbd, "_ZERO_LIMIT", 3 * MIB)
    path = tracked(tmp_path, "b")
    run(["qemu-io", "-f", "qcow2", "-c", "write 0 8M", str(path)])
    with exported(path, "qcow2", "vda", "--read-only", "-B", "b") as listening:
        found = host_info.dirty(nbd.uri(listening, "vda"), "b")
    assert [pair[0] for pair in found] == [0, *(pair[1] for pair in found[:-1])]
    assert found[-1][1] == 8 * MIB


def test_an_export_that_is_not_there(tmp_path: Path) -> None:
    path = make_raw(tmp_path / "disk", MIB)
    with exported(path, "raw", "vda") as listening, pytest.raises(ProtocolError, match="does not offer"):
        nbd.connect(nbd.uri(listening, "vdb"))
    with pytest.raises(OSError):
        nbd.connect(nbd.uri(listening, "vda"))


@pytest.mark.parametrize("name", ["vda", "a b", "a/b", "ä?&#%+=;", "%2F"])
def test_a_uri_names_any_export_behind_any_path(name: str, tmp_path: Path) -> None:
    with exported(make_raw(tmp_path / "disk", 512, [(0, b"it")]), "raw", name) as listening:
        os.symlink(listening, tmp_path / "s + ?&#%;=.sock")
        for path in (listening, str(tmp_path / "s + ?&#%;=.sock")):
            with closing(nbd.connect(nbd.uri(path, name))) as disk:
                assert read(disk, 0, 2) == b"it"
