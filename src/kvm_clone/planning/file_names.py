"""The names of files that come with a clone: its disks, and a backup job's scratch. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from kvm_clone.agent.names import PREFIX
from kvm_clone.planning.facts import Directory

_ASKED = 64
"""Bytes of a name that its ending leaves of the stem, also where names end at 128 bytes: it has an extension, and
perhaps a target's and an operation's name."""

_UNPORTABLE = re.compile(r'[:*?"<>|\\\x00-\x1f]|[ .]$')
"""What FAT and its kin take in no name, or drop from it."""

UNKEPT = re.compile(r"[\t\r\n]")
"""What libvirt writes into an attribute so that it reads a space: the disk would be lost at its next start."""


def home_of(path: str) -> str:
    """The directory, without detours by `..`, in which the clone of the disk `path` lands if the destination has it."""
    return posixpath.normpath(posixpath.dirname(path))


def stems(paths: Iterable[str], old: str, new: str) -> tuple[str, ...]:
    """How the names begin that disks of these paths may get, once the VM `old` is `new`."""
    parts = [stem_of(path, old, new) for path in paths]
    found = {cut(stem, _ASKED - length_of(extension)) for stem, extension in parts}
    return tuple(sorted(found | {_UNPORTABLE.sub("_", one) for one in found}))


def stem_of(path: str, old: str, new: str) -> tuple[str, str]:
    """The file's name, with the VM's new name for the old, and its extension."""
    stem, extension = posixpath.splitext(posixpath.basename(path))
    renamed = new + stem.removeprefix(old) if new != old and stem.startswith(old) else stem
    return UNKEPT.sub("_", renamed), extension


def file_name(directory: Directory, stem: str, ending: str) -> str:
    """Both together, the stem cut where a file's name could not hold it, with letters that the filesystem takes."""
    name = cut(stem, directory.longest - length_of(ending)) + ending
    return name if directory.abilities.any_name else _UNPORTABLE.sub("_", name)


def cut(text: str, room: int) -> str:
    """As much of its beginning as `room` bytes hold."""
    raw = text.encode(errors="surrogatepass")
    return text if len(raw) <= room else raw[: max(room, 0)].decode(errors="ignore")


def length_of(text: str) -> int:
    """Bytes that the text takes in a file's name."""
    return len(text.encode(errors="surrogatepass"))


def scratch_prefix(uuid: str) -> str:
    """How the names of a domain's scratch begin; it has one backup job at most, and needs no other name."""
    return f"{PREFIX}{uuid}-"
