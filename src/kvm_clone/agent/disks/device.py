"""Block devices: how large they are, who writes to them, and what tells that somebody has.

A device has no mtime that writes change, and QEMU's locks lie on the node in the private /dev that libvirt gives to
each VM. What there is instead: the kernel counts what is written to each device since it came into being
(Documentation/block/stat.rst, in /sys/dev/block), a process shows which devices it has open, and who uses a device as
a whole (a mount, another device on top) has it exclusively, which O_EXCL of open(2) asks for.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import List, Optional

from kvm_clone.agent.process import other_processes
from kvm_clone.agent.protocol.errors import IN_USE, UNSUPPORTED, AgentError

_SECTOR = 512
"""Bytes; what /sys/dev/block counts in, whatever the device's own sectors are."""

_WRITTEN, _DISCARDED = 6, 13
"""Fields of /sys/dev/block/…/stat: sectors that were written, and that were discarded. Requests are no measure: one
that only flushes is counted as a write."""


def is_device(about: os.stat_result) -> bool:
    """Whether stat(2) has answered for a block device."""
    return stat.S_ISBLK(about.st_mode)


def size(about: os.stat_result) -> int:
    """The device's size in bytes. Raises OSError."""
    return int(_said(about, "size")) * _SECTOR


def fingerprint(about: os.stat_result) -> str:
    """The device as fingerprint.py has files: number, which device it is, size, and twice what was written to it.

    Which one it is: the boot, and what tells it from another one of the same number. Two fingerprints of a device whose
    writes nobody counts are never equal. Raises OSError.
    """
    which = "\n".join((_boot(), str(about.st_rdev), *(_if_said(about, name) or "" for name in _IDENTITY)))
    identity = int.from_bytes(hashlib.sha256(which.encode()).digest()[:7], "big")
    writes = _writes(about) or f"?{os.urandom(8).hex()}"
    return f"{about.st_rdev}:{identity}:{size(about)}:{writes}:{writes}"


_IDENTITY = ("dev", "diskseq", "../diskseq", "dm/uuid", "start")
"""Below /sys/dev/block/…: the number, how many devices came before this one or the one it is a part of (Linux 5.15),
device mapper's name for it, and a partition's first sector."""


def flush(path: str) -> None:
    """Let the kernel write to the device what it holds for it, so that it is counted, and forget what it has read.

    That may be older than what is there: another host may have written to it, or somebody to the disk below a
    partition. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def check_counted(path: str, about: os.stat_result) -> None:
    """Raises AgentError (unsupported) where nobody counts what is written to the device."""
    if _writes(about) is None:
        raise AgentError(
            UNSUPPORTED, f"writes to {path} are not counted on this host (queue/iostats of the device in /sys/block)"
        )


def open_alone(path: str, flags: int) -> int:
    """Open the device such that nobody can take all of it, by a mount or another device on top. Raises AgentError.

    Nobody has it so far, and no process but this one and its children has it open for writing.
    """
    try:
        fd = os.open(path, flags | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise AgentError(IN_USE, f"{path} is mounted, or part of another device, or another process has it") from error
    try:
        _check_writers(path, os.fstat(fd).st_rdev)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_writers(path: str, number: int) -> None:
    others = other_processes()
    if 1 not in others:  # procfs may be mounted with hidepid, for all but root
        raise AgentError(IN_USE, f"who has {path} open is not to be seen by this user")
    for pid in others:
        if _writes_to(pid, number, path):
            raise AgentError(IN_USE, f"process {pid} has {path} open for writing")


def _writes_to(pid: int, number: int, path: str) -> bool:
    """Whether the process has a device of this number open for writing. Raises AgentError where that is not seen."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    except PermissionError as error:
        raise AgentError(IN_USE, f"whether process {pid} has {path} open is not to be seen by this user") from error
    return any(_is_writable(f"/proc/{pid}/fd/{descriptor}", number) for descriptor in descriptors)


def _is_writable(descriptor: str, number: int) -> bool:
    try:
        about, how = os.stat(descriptor), os.lstat(descriptor)
    except OSError:  # closed meanwhile
        return False
    return is_device(about) and about.st_rdev == number and bool(how.st_mode & stat.S_IWUSR)


def _writes(about: os.stat_result) -> Optional[str]:
    """What was written to the device and discarded on it since it came into being; None where nobody counts."""
    counted = _if_said(about, "queue/iostats") or _if_said(about, "../queue/iostats")
    numbers: List[str] = (_if_said(about, "stat") or "").split()
    if counted != "1" or len(numbers) <= _WRITTEN:
        return None
    found = [int(numbers[field]) for field in (_WRITTEN, _DISCARDED) if field < len(numbers)]
    return "-".join(map(str, found))


def _if_said(about: os.stat_result, name: str) -> Optional[str]:
    try:
        return _said(about, name)
    except OSError:
        return None


def _said(about: os.stat_result, name: str) -> str:
    number = f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
    with open(f"/sys/dev/block/{number}/{name}", encoding="ascii") as file:
        return file.read().strip()


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
