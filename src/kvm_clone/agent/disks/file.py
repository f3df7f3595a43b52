"""A disk that is a plain file or a block device (format raw), moved by the kernel without passing through Python."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import Iterator, Optional

from kvm_clone.agent.disks.disk import DATA, HOLE, Disk, Extent, bounded, open_flags
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK, write_all

SECTOR = 512
"""Bytes. QEMU's least unit: a guest sees no disk whose size is not a multiple of it."""

_DEVICE_BLOCK = 4096
"""Bytes. Space on a device can be freed by whole blocks of its own, which are at most as large."""

_FALLOC_KEEP_AND_PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE of fallocate(2)."""


def disk_size(file_size: int) -> int:
    """The size in bytes of the disk that a guest sees in a raw file of `file_size` bytes, which QEMU rounds up."""
    return -(-file_size // SECTOR) * SECTOR


class FileDisk(Disk):
    """A raw image file. Between the file's end, as it was when opened, and the disk's there are zeros, as in QEMU.

    Nobody knows without reading where a device has zeros: all of it is data.
    """

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.path = path
        self._fd = os.open(path, open_flags(writable))
        self._is_device = stat.S_ISBLK(os.fstat(self._fd).st_mode)
        self.knows_zeros = not self._is_device
        self._file_end = self._end()
        self.size = disk_size(self._file_end)

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk. Asks the filesystem as it goes, so that memory stays flat."""
        position, stop = bounded(self, start, end)
        if self._is_device and position < stop:
            yield Extent(position, stop - position, DATA, host=position)
            return
        while position < stop:
            data = min(self._seek(position, os.SEEK_DATA), stop)
            if data > position:
                yield Extent(position, data - position, HOLE)
            position = data
            if position < stop:
                hole = min(self._seek(position, os.SEEK_HOLE), stop)
                yield Extent(position, hole - position, DATA, host=position)
                position = hole

    def _end(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END) if self._is_device else os.fstat(self._fd).st_size

    def _seek(self, position: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, position, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this point
                self._check_end()
                return self.size
            raise

    def _check_end(self) -> None:
        """What was cut off while we read is no hole."""
        end = self._end()
        if end < self._file_end:
            raise self._cut_off(end)

    def _cut_off(self, end: int) -> OSError:
        return OSError(errno.EIO, f"the file ends at {end}, before the disk does", self.path)

    def _zeros_after(self, offset: int, length: int) -> bytes:
        """The content of the range, at which the file ends. Raises OSError unless it lies behind the disk's data."""
        if offset < self._file_end or offset + length > self.size:
            raise self._cut_off(offset)
        return bytes(length)

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                view[:] = self._zeros_after(offset, len(view))
                return
            view = view[count:]
            offset += count

    def write(self, offset: int, data: memoryview) -> None:
        """See Disk."""
        while data:
            count = os.pwrite(self._fd, data, offset)
            data = data[count:]
            offset += count

    def zero(self, offset: int, length: int) -> None:
        """See Disk. Writes zeros where no space can be freed."""
        unit = _DEVICE_BLOCK if self._is_device else 1
        low, high = -(-offset // unit) * unit, (offset + length) // unit * unit
        if low < high and _punch_hole(self._fd, low, high - low):
            self._write_zeros(offset, low)
            self._write_zeros(high, offset + length)
        else:
            self._write_zeros(offset, offset + length)

    def _write_zeros(self, start: int, end: int) -> None:
        zeros = memoryview(bytes(min(end - start, CHUNK)))
        for position in range(start, end, CHUNK):
            self.write(position, zeros[: min(CHUNK, end - position)])

    def flush(self) -> None:
        """See Disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """See Disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def send(self, extent: Extent, out: int) -> None:
        """See Disk. The pages go from the cache into the pipe; `extent.host` says where they lie in the file."""
        host = extent.offset if extent.host is None else extent.host
        done = 0
        while done < extent.length:
            count = os.sendfile(out, self._fd, host + done, extent.length - done)
            if not count:
                write_all(out, self._zeros_after(host + done, extent.length - done))
                return
            done += count

    def receive(self, offset: int, length: int, source: Incoming) -> None:
        """See Disk."""
        if source.can_move:
            source.move(self._fd, length, offset)
        else:
            super().receive(offset, length, source)


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    """Free the range's space; False where the filesystem, or the device, cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, _FALLOC_KEEP_AND_PUNCH, ctypes.c_longlong(offset), ctypes.c_longlong(length)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))
