"""Data disks with reproducible content: random and compressible stretches with holes between them.

In a disk with a file system, the stretches are its files.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kclab.command import LabError, run

STRETCH = 1 << 20
GRAIN = 64 << 10  # qcow2's cluster: what starts on it leaves a whole hole before it
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FORMATS = ("qcow2", "raw")
SPEC = "FORMAT:SIZE[:DATA], as in qcow2:4G:1.5G"


@dataclass(frozen=True)
class Disk:
    """What `--disk FORMAT:SIZE[:DATA]` asks for."""

    format: str
    size: int
    data: int

    @staticmethod
    def parse(text: str) -> Disk:
        """Read FORMAT:SIZE[:DATA]."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or parts[0] not in FORMATS:
            raise LabError(f"--disk {text!r} is not {SPEC}; the formats are {', '.join(FORMATS)}")
        size = parse_size(parts[1])
        data = parse_size(parts[2]) if len(parts) == 3 else 0
        if size == 0 or size % 512 or data > size:
            raise LabError(f"--disk {text!r}: SIZE must be a multiple of 512, and DATA no more than SIZE")
        return Disk(parts[0], size, data)


def parse_size(text: str) -> int:
    """Bytes from 64M, 1.5G, 512."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.upper())
    if match is None:
        raise LabError(f"{text!r} is not a size such as 64M, 4G or 1.5G")
    return int(float(match[1]) * UNITS[match[2]])


def make(disk: Disk, path: Path, vm: str, target: str, file_system: bool = False) -> None:
    """Write the disk; the same VM name, target and size always give the same content, in any format.

    Of a file system, this is true of what is in it.
    """
    label = f"{vm} {target}"
    raw = path if disk.format == "raw" else path.with_name(path.name + ".raw")
    try:
        descriptor = os.open(raw, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(descriptor, disk.size)
            if file_system:
                _make_file_system(raw, disk, label)
            else:
                _fill(descriptor, disk, label)
            _mark(descriptor, label)
        finally:
            os.close(descriptor)
        if raw != path:
            run("qemu-img", "convert", "-S", "64k", "-f", "raw", "-O", "qcow2", str(raw), str(path))
            os.chmod(path, 0o600)
    finally:
        if raw != path:
            raw.unlink(missing_ok=True)


def _fill(descriptor: int, disk: Disk, label: str) -> None:
    for number, (offset, length) in enumerate(stretches(disk.size, disk.data)):
        os.pwrite(descriptor, _content(label, number, length), offset)


def _make_file_system(raw: Path, disk: Disk, label: str) -> None:
    with tempfile.TemporaryDirectory(dir=raw.parent) as directory:
        for number, (_, length) in enumerate(stretches(disk.size, disk.data)):
            Path(directory, f"stretch-{number}").write_bytes(_content(label, number, length))
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", directory, str(raw))


def _mark(descriptor: int, label: str) -> None:
    """Write the line that the guest prints; a file system leaves the first sector free."""
    # A name of many bytes must leave the rest of the first sector's text whole.
    os.pwrite(descriptor, f"marker of {label}\n".encode()[:511].ljust(512, b"\n"), 0)


def stretches(size: int, data: int) -> list[tuple[int, int]]:
    """Offset and length of each stretch: spread evenly, the last one ending with the disk."""
    count = -(-data // STRETCH)
    found = []
    for number in range(count):
        length = min(STRETCH, data - number * STRETCH)
        if number == count - 1:
            offset = size - length
        else:
            offset = (size - STRETCH) * number // max(count - 1, 1) // GRAIN * GRAIN
        found.append((offset, length))
    return found


def _content(label: str, number: int, length: int) -> bytes:
    """Every other stretch cannot be compressed."""
    if number % 2 == 0:
        return random.Random(f"{label} {number}").randbytes(length)
    line = f"{label} stretch {number}: text that compresses well\n".encode()
    return (line * (length // len(line) + 1))[:length]
