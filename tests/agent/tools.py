"""What several suites of the agent need."""

from __future__ import annotations

import functools
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

import kvm_clone
from kvm_clone.agent.disks import chain, image, qemu
from kvm_clone.agent.disks.disk import DATA, Disk, split
from kvm_clone.agent.disks.nbd import NbdDisk
from kvm_clone.agent.protocol.wire import CHUNK

SOURCES = Path(next(iter(kvm_clone.__path__))).parent
KIB, MIB = 1 << 10, 1 << 20

Write = tuple[int, bytes]


class SshServer(NamedTuple):
    """How an ssh server is reached: the command line up to what is to be run there, and its line of known_hosts."""

    ssh: list[str]
    known_hosts: str


def lacking(reason: str) -> NoReturn:
    """Skip the test where the machine lacks something; fail where it must not."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            lacking(f"{program} is not installed")


@contextmanager
def device(file: Path) -> Iterator[Path]:
    """A block device with the file's content: a loop device."""
    need("losetup")
    done = subprocess.run(
        ["losetup", "--find", "--show", "--nooverlap", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lacking(f"no loop device can be had: {done.stderr.strip()}")
    path = done.stdout.strip()
    try:
        yield Path(path)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True, capture_output=True)


@functools.lru_cache(maxsize=32)
def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that are no zeros."""
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


def filled(size: int, writes: Iterable[Write]) -> bytes:
    """What a disk of zeros holds after the writes."""
    content = bytearray(size)
    for offset, data in writes:
        content[offset : offset + len(data)] = data
    return bytes(content)


def read(disk: Disk, offset: int = 0, length: int | None = None) -> bytes:
    content = bytearray(disk.size - offset if length is None else length)
    disk.readinto(offset, memoryview(content))
    return bytes(content)


def sent(disk: Disk) -> bytes:
    """The disk's content as a sender gives it away: data through a pipe, everything else as zeros."""
    content = bytearray(disk.size)
    for extent in disk.extents():
        if extent.kind == DATA:
            for piece in split(extent, CHUNK):
                content[piece.offset : piece.end] = through_pipe(functools.partial(disk.send, piece))
    return bytes(content)


def through_pipe(act: Callable[[int], object]) -> bytes:
    """What `act` writes to the descriptor that it is given."""
    source, out = os.pipe()
    parts: list[bytes] = []

    def drain() -> None:
        while part := os.read(source, MIB):
            parts.append(part)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        act(out)
    finally:
        os.close(out)
        reader.join()
        os.close(source)
    return b"".join(parts)


@contextmanager
def arriving(data: bytes, *, how: str = "pipe", then_silence: bool = False) -> Iterator[int]:
    """A descriptor at which `data` arrives and then the end of the stream, or nothing more."""
    if how == "pipe":
        source, out = os.pipe()
    else:
        source, out = (end.detach() for end in socket.socketpair())

    def feed() -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(out, view) :]
        except (BrokenPipeError, ConnectionResetError):
            pass
        if not then_silence:
            os.close(out)

    writer = threading.Thread(target=feed)
    writer.start()
    try:
        yield source
    finally:
        os.close(source)
        writer.join()
        if then_silence:
            os.close(out)


def qcow2_content(path: Path) -> bytes:
    """What QEMU's own reader finds, beside whoever writes."""
    need("qemu-img")
    argv = ["qemu-img", "convert", "--force-share", "-f", "qcow2", "-O", "raw", "--", str(path), f"{path}.read"]
    subprocess.run(argv, check=True)
    return Path(f"{path}.read").read_bytes()


def make_qcow2(
    path: Path,
    size: int,
    writes: Iterable[Write] = (),
    options: Mapping[str, str] | None = None,
    *,
    compress: bool = False,
) -> Path:
    """A qcow2 image with this content, `compress`ed on request."""
    need("qemu-img", "qemu-nbd")
    wanted = dict(options or {})
    plain = path.with_suffix(".plain") if compress else path
    qemu.create(str(plain), "qcow2", size, wanted)
    disk = image.StagedImage(str(plain))
    for offset, data in writes:
        disk.write(offset, memoryview(data))
    disk.flush()
    disk.close()
    if compress:
        argv = ["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2"]
        argv += [word for key, value in wanted.items() for word in ("-o", f"{key}={value}")]
        subprocess.run([*argv, "--", str(plain), str(path)], check=True)
        plain.unlink()
    return path


def make_raw(path: Path, size: int, writes: Iterable[Write] = ()) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
    return path


def make_overlay(path: Path, base: Path, format_: str, size: int, writes: Iterable[Write] = ()) -> Path:
    """A qcow2 image that rests on another one, with these writes over it."""
    need("qemu-img", "qemu-nbd")
    qemu.create(str(path), "qcow2", size, {}, chain.Node(str(base), format_))
    disk = image.StagedImage(str(path))
    for offset, data in writes:
        disk.write(offset, memoryview(data))
    disk.flush()
    disk.close()
    return path


@contextmanager
def exported(path: Path, format_: str, export: str, *options: str) -> Iterator[str]:
    """The path of a socket behind which a qemu-nbd serves the image under that export's name."""
    need("qemu-nbd")
    with tempfile.TemporaryDirectory() as directory:
        listening = f"{directory}/a & b.sock"
        argv = ["qemu-nbd", "--persistent", "--shared=4", "-k", listening, "-x", export, "-f", format_, *options]
        with ending(subprocess.Popen([*argv, "--", str(path)])) as server:
            assert eventually(lambda: _accepts(listening) or server.poll() is not None)
            assert server.poll() is None, "qemu-nbd has ended"
            yield listening


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


@contextmanager
def nbdkit(*arguments: str) -> Iterator[NbdDisk]:
    """The disk of an nbdkit that serves this one client."""
    need("nbdkit")
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(["nbdkit", "--single", *arguments], stdin=theirs.fileno(), stdout=theirs.fileno())
    disk = NbdDisk(ours)
    try:
        yield disk
    finally:
        disk.close()
        server.wait(10)


def processes(text: str) -> list[int]:
    """The processes that have `text`, a unique path, in their command line; not this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root's tests go on as a user with no rights, for this block; others are such a user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def python(code: str, *arguments: object, **how: Any) -> subprocess.Popen[bytes]:
    """Another Python that has the package."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """See to it that the process does not outlive the block."""
    with process:
        try:
            yield process
        finally:
            process.kill()
