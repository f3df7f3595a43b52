"""QEMU's own locks on disk images.

QEMU (block/file-posix.c) guards an image file with open-file-description locks on single bytes: a read lock on byte
100 + n says "I use permission n", one on byte 200 + n says "I do not share permission n". Holding the right ones keeps
every QEMU from opening the image for writing, without changing a byte of it. A VM's QEMU sees a block device by a node
of its own, on which nobody else's locks lie: see device.py for what is done there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Tuple

from kvm_clone.agent.disks import device
from kvm_clone.agent.disks.disk import open_flags
from kvm_clone.agent.protocol.errors import IN_USE, AgentError

_USES, _DOES_NOT_SHARE = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # numbers of bits in QEMU's BlockPermission

FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


class ImageLock:
    """Keeps every other process from writing an image through QEMU while this object lives."""

    def __init__(self, path: str) -> None:
        """Raises AgentError (in-use) when a process has the image open for writing; OSError."""
        self._path = path
        flags = open_flags(writable=False)
        self._fd = device.open_alone(path, flags) if device.is_device(os.stat(path)) else os.open(path, flags)
        try:
            for byte in (_USES + _CONSISTENT_READ, _DOES_NOT_SHARE + _WRITE, _DOES_NOT_SHARE + _RESIZE):
                self._control(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
            for byte in (_USES + _WRITE, _USES + _RESIZE, _DOES_NOT_SHARE + _CONSISTENT_READ):
                if self._control(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK:
                    raise AgentError(IN_USE, f"another process uses {path}; a copy of it would not be consistent")
        except BaseException:
            self.release()
            raise

    @property
    def file_id(self) -> Tuple[int, int]:
        """Device and inode of the image."""
        about = os.fstat(self._fd)
        return about.st_dev, about.st_ino

    def _control(self, command: int, kind: int, byte: int) -> int:
        """The lock's type that the kernel answers."""
        try:
            answer = fcntl.fcntl(self._fd, command, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise AgentError(IN_USE, f"another process holds the lock of {self._path}") from error
            raise
        kind_answered: int = FLOCK.unpack(answer)[0]
        return kind_answered

    def release(self) -> None:
        """Let others write again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_locked_by_qemu(path: str) -> bool:
    """Whether any process but this one holds one of QEMU's locks on the file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _USES, _DOES_NOT_SHARE, 0))
        return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)
