"""Image files for the suites: real ones by qemu-img, and headers of every format that name another file."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import SHUT_RDWR, create_server
from threading import Thread

from .tools import MIB, need

SIZE = MIB


def qemu_img(*words: object) -> None:
    need("qemu-img")
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def make(path: Path, *options: object, base: str = "", base_format: str = "") -> Path:
    """A qcow2 image, on that base if there is one; the base is not looked at."""
    below = ["-u", "-b", base] if base else []
    below += ["-F", base_format] if base_format else []
    qemu_img("create", "-q", "-f", "qcow2", *options, *below, "--", path, SIZE)
    return path


def without_base_format(path: Path) -> Path:
    """Take the format of its base out of the image's header, as tools of old made them: the extension is another."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack(">I", 0xE2792ACA))
    content[at : at + 4] = b"none"
    path.write_bytes(content)
    return path


def encrypted(at: Path) -> Path:
    """A qcow2 image named `top` in that directory, encrypted by the method that takes no second to be set up."""
    (at / "secret").write_text("open sesame")
    secret = ("--object", f"secret,id=s,file={at / 'secret'}")
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", at / "top", SIZE)
    return at / "top"


def put(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def qcow2_header(base: bytes, *, version: int = 3, data_file: bytes = b"", base_format: bytes = b"") -> bytes:
    """The first cluster of a qcow2 image of 1 MiB: names are given as bytes, which need not be right."""
    extensions = b""
    for kind, text in ((0xE2792ACA, base_format), (0x44415441, data_file)):
        if text:
            extensions += struct.pack(">II", kind, len(text)) + text + bytes(-len(text) % 8)
    extensions += bytes(8)
    length = 72 if version == 2 else 104
    base_at = length + len(extensions) if base else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, base_at, len(base), 16, SIZE, 0, 1, 0x30000, 0x10000, 1, 0, 0
    )
    if version == 3:
        head += struct.pack(">QQQII", 4 if data_file else 0, 0, 0, 4, length)
    return (head + extensions + base).ljust(64 * 1024, b"\0")


def vmdk(name: bytes) -> bytes:
    return b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n' + (
        b'RW 2048 FLAT "%s" 0\nddb.adapterType = "ide"\n' % name
    )


def qed(name: bytes) -> bytes:
    return struct.pack("<4sIIIQQQQQII", b"QED\0", 65536, 4, 1, 1, 0, 0, 65536, SIZE, 64, len(name)) + name


def forged(name: bytes) -> dict[str, bytes]:
    """How a raw disk may begin whose guest wants that file opened, by format."""
    luks = b"LUKS\xba\xbe" + struct.pack(">H", 1) + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0")
    return {
        "qcow2": qcow2_header(name),
        "qcow2 v2": qcow2_header(name, version=2),
        "qcow2 on a qcow2": qcow2_header(name, base_format=b"qcow2"),
        "qcow2 with a data file": qcow2_header(b"", data_file=name),
        "qcow2 of nodes": qcow2_header(b'json:{"driver":"raw","file":{"driver":"file","filename":"%s"}}' % name),
        "vmdk": vmdk(name),
        "sparse vmdk": struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 2048, 128, 1, 20).ljust(512, b"\0") + vmdk(name),
        "qed": qed(name),
        "vdi": bytes(64) + b"\x7f\x10\xda\xbe" + name,
        "vhdx": b"vhdxfile" + name,
        "vpc": b"conectix" + name,
        "luks": luks + name,
        "cow": b"OOOM" + struct.pack(">I", 2) + name,
        "parallels": b"WithoutFreeSpace" + name,
        "bochs": b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + name,
        "cloop": b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n" + name,
    }


class Listener:
    """Counts who connects to a port of this machine."""

    def __init__(self) -> None:
        self._server = create_server(("127.0.0.1", 0))
        self.uri = f"nbd://127.0.0.1:{self._server.getsockname()[1]}/disk"
        self.connections = 0
        self._thread = Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._server.shutdown(SHUT_RDWR)
        self._thread.join()
        self._server.close()


@contextmanager
def listening() -> Iterator[Listener]:
    """A port to which nobody may connect; the block's end says whether somebody has."""
    listener = Listener()
    try:
        yield listener
    finally:
        listener.close()
