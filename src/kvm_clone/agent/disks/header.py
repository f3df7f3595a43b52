"""What an image file says of itself, read by us: nothing is opened but the file, and no format is guessed.

qemu-img opens what an image names (a base, a data file, an NBD server) to say what it names. This module only reads
the header, so that it can be asked of images of other VMs, and before QEMU is let near an image. The layout is that of
QEMU's docs/interop/qcow2.txt; all integers are big-endian:

    offset  size  field
    0       4     magic, QFI and 0xFB
    4       4     version, 2 or 3
    8       8     where the name of the base begins, 0 without a base
    16      4     the name's length, 1023 at most
    20      4     the cluster's size in bytes, as a power of two
    24      8     the guest's disk's size in bytes
    32      4     encryption method, 0 for none
    60      4     number of internal snapshots
    72      8     (version 3) incompatible features; bit 2: the data lie in another file, bit 4: there are
                  subclusters
    100     4     (version 3) length of the header; extensions follow, in version 2 at 72

An extension is its type and length, 4 bytes each, and data padded to a multiple of 8; type 0 ends them.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import Dict, NamedTuple

from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError

MAGIC = b"QFI\xfb"

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # the first 72 bytes
_FEATURES_AT, _LENGTH_AT, _VERSION_2_END = 72, 100, 72
_DATA_FILE, _SUBCLUSTERS = 1 << 2, 1 << 4
_BASE_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441
_LONGEST_NAME = 1023
_MOST_CLUSTER_BITS = 21
_HEAD = 64 * 1024
"""Bytes that are read: names and extensions lie in the first cluster, before which no larger one ends."""

_OTHERS = {
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"LUKS\xba\xbe": "luks",
    b"OOOM": "cow",
}
"""Formats of QEMU by how their files begin. vdi says so at byte 64."""

_VDI_AT, _VDI = 64, b"\x7f\x10\xda\xbe"


class Header(NamedTuple):
    """A qcow2 image's header.

    `base`: the name of the image that it rests on, as written, empty for none; `base_format`: that one's format, empty
    where the image does not say. `data_file`: whether the content lies in another file; `data_name`: that one's name,
    empty where the image does not say. `cluster`, `size`: of a cluster and of the disk in bytes;
    `subclusters`: a part of a cluster may be allocated alone.
    """

    base: str = ""
    base_format: str = ""
    data_file: bool = False
    data_name: str = ""
    encrypted: bool = False
    snapshots: int = 0
    cluster: int = 0
    size: int = 0
    subclusters: bool = False


def read(path: str) -> Header:
    """The header of the qcow2 image. Raises OSError; AgentError (unsupported) when the file is no such image."""
    head = beginning(path)
    if not head.startswith(MAGIC):
        raise AgentError(UNSUPPORTED, f"{path} is no qcow2 image")
    try:
        return _parse(head)
    except (struct.error, IndexError, ValueError) as error:
        raise AgentError(UNSUPPORTED, f"{path} has a damaged qcow2 header") from error


def beginning(path: str) -> bytes:
    """The first bytes of a file or block device; none of anything else. Never waits for a FIFO. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        return os.pread(fd, _HEAD, 0) if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else b""
    finally:
        os.close(fd)


def guess(head: bytes) -> str:
    """The format that a file which begins so may have: a guess, good for distrust alone; empty for a raw one."""
    if head.startswith(MAGIC):
        return "qcow2"
    if head[_VDI_AT : _VDI_AT + len(_VDI)] == _VDI:
        return "vdi"
    return next((name for magic, name in _OTHERS.items() if head.startswith(magic)), "")


def _parse(head: bytes) -> Header:
    fields = _FIXED.unpack_from(head)
    version, base_at, base_length, cluster_bits, size, encryption, snapshots = (
        fields[index] for index in (1, 2, 3, 4, 5, 6, 11)
    )
    if (
        version not in (2, 3)
        or cluster_bits > _MOST_CLUSTER_BITS
        or base_length > _LONGEST_NAME
        or base_at + base_length > len(head)
    ):
        raise ValueError("out of bounds")
    features, end = 0, _VERSION_2_END
    if version == 3:
        (features,) = struct.unpack_from(">Q", head, _FEATURES_AT)
        (end,) = struct.unpack_from(">I", head, _LENGTH_AT)
    named = _extensions(head, end, base_at or len(head))
    return Header(
        base=_text(head[base_at : base_at + base_length] if base_at else b""),
        base_format=_text(named.get(_BASE_FORMAT, b"")),
        data_file=bool(features & _DATA_FILE),
        data_name=_text(named.get(_DATA_FILE_NAME, b"")),
        encrypted=bool(encryption),
        snapshots=snapshots,
        cluster=1 << cluster_bits,
        size=size,
        subclusters=bool(features & _SUBCLUSTERS),
    )


def _text(content: bytes) -> str:
    """The name; raises ValueError for one with a zero byte, of which QEMU takes what comes before it."""
    if b"\0" in content:
        raise ValueError("a name with a zero byte")
    return os.fsdecode(content)


def _extensions(head: bytes, at: int, stop: int) -> Dict[int, bytes]:
    """The header's extensions by their types."""
    found: Dict[int, bytes] = {}
    while at + 8 <= stop:
        kind, length = struct.unpack_from(">II", head, at)
        if not kind:
            break
        if at + 8 + length > stop:
            raise ValueError("an extension beyond the header's end")
        found[kind] = head[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
    return found
