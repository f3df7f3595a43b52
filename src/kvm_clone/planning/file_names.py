"""The names of a clone's files and of a backup job's scratch files. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from kvm_clone.agent.names import PREFIX
from kvm_clone.image import Image
from kvm_clone.planning.facts import Directory

_ASKED = 64
"""Bytes of a stem that are kept whatever its ending: names of 128 bytes have room for these, an extension, a disk's
target and an operation's name."""

_UNPORTABLE = re.compile(r'[:*?"<>|\\\x00-\x1f]|[ .]$')
"""What filesystems such as FAT refuse in a name, or drop from it."""

UNKEPT = re.compile(r"[\t\r\n]")
"""What libvirt reads back from its own XML as a space: the disk would be lost at its next start."""


_DEVICES = "/dev/"
"""Below it are devices, whose names say nothing of a VM and whose directories take no files."""


def home_of(path: str) -> str:
    """Return the normalised directory of the disk `path`: its clone lands there if the destination has it.

    Empty for a device.
    """
    return "" if path.startswith(_DEVICES) else posixpath.normpath(posixpath.dirname(path))


def file_like(image: Image, target: str, vm: str) -> str:
    """Return the path whose name a copy's is made from: the image's, but of a device one with the VM's name."""
    return f"{vm}-{target}.{image.format}" if image.path.startswith(_DEVICES) else image.path


def stems(paths: Iterable[str], old: str, new: str) -> tuple[str, ...]:
    """Return the beginnings of all names that the disks `paths` of the VM `old` may get in a clone named `new`."""
    parts = [stem_of(path, old, new) for path in paths]
    found = {cut(stem, _ASKED - length_of(extension)) for stem, extension in parts}
    return tuple(sorted(found | {_UNPORTABLE.sub("_", one) for one in found}))


def stem_of(path: str, old: str, new: str) -> tuple[str, str]:
    """Return the file's stem, with the VM's new name for the old one, and its extension."""
    stem, extension = posixpath.splitext(posixpath.basename(path))
    renamed = new + stem.removeprefix(old) if new != old and stem.startswith(old) else stem
    return UNKEPT.sub("_", renamed), extension


def file_name(directory: Directory, stem: str, ending: str) -> str:
    """Return the name of stem and ending: the stem cut to fit, and characters replaced that the directory refuses."""
    name = cut(stem, directory.longest - length_of(ending)) + ending
    return name if directory.abilities.any_name else _UNPORTABLE.sub("_", name)


def cut(text: str, room: int) -> str:
    """Return the longest beginning of the text that fits into `room` bytes of UTF-8."""
    raw = text.encode(errors="surrogatepass")
    return text if len(raw) <= room else raw[: max(room, 0)].decode(errors="ignore")


def length_of(text: str) -> int:
    """Return how many bytes the text takes in a file's name."""
    return len(text.encode(errors="surrogatepass"))


def scratch_prefix(uuid: str) -> str:
    """Return the beginning of the names of a domain's scratch files: a domain has one backup job at most."""
    return f"{PREFIX}{uuid}-"
