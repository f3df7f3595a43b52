"""How a file was, in a line of text: device, inode, size in bytes, mtime and ctime in nanoseconds, with colons between.

An image that rests on others has a sixth part, a digest of what stays of those when nothing is written: inode, size and
mtime of each. Their ctimes do not count: libvirt changes a base's owner whenever any VM on it starts or stops.

A block device has no times that count: see device.py for what stands in their places.

Whoever compares two says what has to be equal. The device's number is another one after some reboots and on another
host. The inode is 0 where its number does not last: see filesystem.lasting_inode. The ctime changes with the content,
and also when a file is renamed, linked, or given to another user.
"""

from __future__ import annotations

import hashlib
import os
from typing import Callable, Sequence, Tuple

from kvm_clone.agent.disks import device
from kvm_clone.agent.disks.filesystem import lasting_inode


def of(path: str) -> str:
    """The fingerprint of a file or device. Raises OSError."""
    return of_stat(_looked_at(path))


def of_stat(about: os.stat_result) -> str:
    """The fingerprint in what stat(2) answers; of a device's, as far as what was written has reached it.

    Raises OSError.
    """
    if device.is_device(about):
        return device.fingerprint(about)
    return f"{about.st_dev}:{lasting_inode(about)}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"


def _looked_at(path: str) -> os.stat_result:
    about = os.stat(path)
    if device.is_device(about):
        device.flush(path)
    return about


def of_layers(path: str, below: Sequence[str]) -> str:
    """The fingerprint of an image and of each image that it rests on, by their paths. Raises OSError."""
    if not below:
        return of(path)
    contents = "\n".join(":".join(content(of(one))) for one in below)
    return f"{of(path)}:{hashlib.sha256(contents.encode()).hexdigest()[:16]}"


def identity(path: str) -> str:
    """By which a file of ours is known again under another name: inode, size and mtime. Raises OSError."""
    return ":".join(of_stat(os.lstat(path)).split(":")[1:4])


def content(fingerprint: str) -> Tuple[str, ...]:
    """What stays when nothing is written: inode, size and mtime, and what stays of the images below."""
    parts = fingerprint.split(":")
    return (*parts[1:4], *parts[5:])


def whole(fingerprint: str) -> Tuple[str, ...]:
    """What stays when nothing is done to the file at all: inode, size, mtime and ctime."""
    return tuple(fingerprint.split(":")[1:])


def file_id(fingerprint: str) -> Tuple[str, ...]:
    """Which file of its host it is: device and inode."""
    return tuple(fingerprint.split(":")[:2])


def is_still(path: str, then: str) -> bool:
    """Whether the file is there and was not written since it had this fingerprint, by its mtime."""
    return _holds(path, then, content)


def is_untouched(path: str, then: str) -> bool:
    """Whether the file is there and nothing at all was done to it since it had this fingerprint."""
    return _holds(path, then, whole)


def _holds(path: str, then: str, part: Callable[[str], Tuple[str, ...]]) -> bool:
    try:
        return part(of(path)) == part(then)
    except FileNotFoundError:
        return False
