"""A filesystem that lacks what is asked for, as FAT, exFAT, CIFS or NFS may: a directory of its own, passed on by FUSE.

    plainfs.py [OPTION]... MOUNTPOINT

It mounts itself, goes into the background, and ends when it is unmounted. The content is lost then. Needs root and
/dev/fuse. The options are in OPTIONS. The layouts are those of include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable

IN, OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
ATTR = struct.Struct("=6Q10I")
SETATTR = struct.Struct("=IIQQQQQQ8I")
MODE, UID, GID, SIZE, MTIME, MTIME_NOW = 1, 2, 4, 8, 32, 256
MOST = 1 << 17
ROOT = 1

OPTIONS = {
    "no-links": "link(2) is refused",
    "no-noreplace": "renameat2(2) knows no flags",
    "no-owners": "chown(2) is refused",
    "no-modes": "chmod(2) is refused; every file has the mode 0755",
    "dense": "holes take room",
    "full": "nothing can become larger by truncate(2)",
    "plain-names": "names hold nothing that FAT would not take",
    "folds": "names are kept in lower case",
    "no-direct": "O_DIRECT is refused",
}


class Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """An errno to answer with."""


def name_of(data: bytes) -> bytes:
    return data.split(b"\0", 1)[0]


class Filesystem:
    """Answers requests from the kernel; nodes are known by their paths in the backing directory."""

    def __init__(self, lacks: argparse.Namespace, directory: str) -> None:
        self.lacks = lacks
        self.paths: dict[int, bytes] = {ROOT: os.fsencode(directory)}
        self.files: dict[int, int] = {}
        self.numbers = iter(range(2, 1 << 60))
        self.calls: dict[int, Callable[[int, bytes], bytes]] = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 9: self.mkdir, 10: self.unlink, 11: self.rmdir,
            12: self.rename, 13: self.link, 14: self.open, 15: self.read, 16: self.write, 17: self.statfs,
            18: self.release, 20: self.fsync, 25: self.nothing, 26: self.init, 27: self.nothing_opened,
            28: self.readdir, 29: self.nothing, 30: self.nothing, 35: self.create, 43: self.fallocate,
            45: self.rename2, 46: self.lseek,
        }  # fmt: skip

    def serve(self, device: int) -> None:
        """Answer until it is unmounted."""
        while True:
            try:
                request = os.read(device, MOST + (1 << 16))
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            _, opcode, unique, node, *_ = IN.unpack_from(request)
            if opcode in (2, 36, 42):  # FORGET, INTERRUPT and BATCH_FORGET have no answer
                continue
            code, answer = self.answer(opcode, node, request[IN.size :])
            with contextlib.suppress(FileNotFoundError):  # interrupted meanwhile
                os.write(device, OUT.pack(OUT.size + len(answer), -code, unique) + answer)

    def answer(self, opcode: int, node: int, data: bytes) -> tuple[int, bytes]:
        call = self.calls.get(opcode)
        if call is None:
            return errno.ENOSYS, b""
        try:
            return 0, call(node, data)
        except Refused as refused:
            return int(refused.args[0]), b""
        except OSError as error:
            return error.errno or errno.EIO, b""

    def init(self, _node: int, data: bytes) -> bytes:
        return struct.pack("=4I2H2I2H8I", 7, 31, struct.unpack_from("=3I", data)[2], 1 << 5, 16, 12, MOST, 1, *[0] * 10)

    def nothing(self, _node: int, _data: bytes) -> bytes:
        return b""

    def nothing_opened(self, _node: int, _data: bytes) -> bytes:
        return struct.pack("=QII", 0, 0, 0)

    def path(self, node: int, name: bytes) -> bytes:
        return os.path.join(self.paths[node], name.lower() if self.lacks.folds else name)

    def attributes(self, path: bytes, node: int) -> bytes:
        about = os.lstat(path)
        mode = about.st_mode if not self.lacks.no_modes else stat.S_IFMT(about.st_mode) | 0o755
        times = [one for ns in (about.st_atime_ns, about.st_mtime_ns, about.st_ctime_ns) for one in divmod(ns, 10**9)]
        owner = (about.st_uid, about.st_gid)
        return ATTR.pack(node, about.st_size, about.st_blocks, *times[::2], *times[1::2], mode, about.st_nlink, *owner,
                         0, 4096, 0)  # fmt: skip

    def entry(self, path: bytes) -> bytes:
        os.lstat(path)
        node = next((number for number, known in self.paths.items() if known == path), None)
        if node is None:
            node = next(self.numbers)
            self.paths[node] = path
        return struct.pack("=4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(path, node)

    def lookup(self, node: int, data: bytes) -> bytes:
        return self.entry(self.path(node, name_of(data)))

    def getattr(self, node: int, _data: bytes) -> bytes:
        return struct.pack("=QII", 0, 0, 0) + self.attributes(self.paths[node], node)

    def setattr(self, node: int, data: bytes) -> bytes:
        valid, _, _, size, _, _, mtime, _, _, nanoseconds, _, mode, _, uid, gid, _ = SETATTR.unpack_from(data)
        path = self.paths[node]
        if valid & (UID | GID):
            if self.lacks.no_owners:
                raise Refused(errno.EPERM)
            os.chown(path, uid if valid & UID else -1, gid if valid & GID else -1)
        if valid & MODE:
            if self.lacks.no_modes:
                raise Refused(errno.EPERM)
            os.chmod(path, stat.S_IMODE(mode))
        if valid & SIZE:
            self.resize(path, size)
        if valid & (MTIME | MTIME_NOW):
            now = None if valid & MTIME_NOW else (mtime * 10**9 + nanoseconds,) * 2
            os.utime(path, ns=now) if now else os.utime(path)
        return self.getattr(node, b"")

    def resize(self, path: bytes, size: int) -> None:
        before = os.stat(path).st_size
        if self.lacks.full and size > before:
            raise Refused(errno.ENOSPC)
        os.truncate(path, size)
        if self.lacks.dense and size > before:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), before, size - before)

    def check_name(self, name: bytes) -> None:
        if self.lacks.plain_names and set(name) & set(b':*?"<>|\\'):
            raise Refused(errno.EINVAL)

    def mkdir(self, node: int, data: bytes) -> bytes:
        path = self.path(node, name_of(data[8:]))
        os.mkdir(path, struct.unpack_from("=I", data)[0])
        return self.entry(path)

    def unlink(self, node: int, data: bytes) -> bytes:
        path = self.path(node, name_of(data))
        os.unlink(path)
        self.forget(path)
        return b""

    def rmdir(self, node: int, data: bytes) -> bytes:
        os.rmdir(self.path(node, name_of(data)))
        return b""

    def forget(self, path: bytes) -> None:
        self.paths = {number: known for number, known in self.paths.items() if known != path}

    def rename(self, node: int, data: bytes) -> bytes:
        return self._rename(node, struct.unpack_from("=Q", data)[0], 0, data[8:])

    def rename2(self, node: int, data: bytes) -> bytes:
        new, flags = struct.unpack_from("=QI", data)
        if self.lacks.no_noreplace:
            raise Refused(errno.EINVAL)
        return self._rename(node, new, flags, data[16:])

    def _rename(self, node: int, new_node: int, flags: int, names: bytes) -> bytes:
        old, new = names.split(b"\0")[:2]
        self.check_name(new)
        one, other = self.path(node, old), self.path(new_node, new)
        if flags & 1 and os.path.lexists(other):
            raise Refused(errno.EEXIST)
        os.rename(one, other)
        self.forget(other)
        self.paths = {number: other if known == one else known for number, known in self.paths.items()}
        return b""

    def link(self, node: int, data: bytes) -> bytes:
        if self.lacks.no_links:
            raise Refused(errno.EPERM)
        path = self.path(node, name_of(data[8:]))
        os.link(self.paths[struct.unpack_from("=Q", data)[0]], path)
        return self.entry(path)

    def _opened(self, path: bytes, flags: int, mode: int = 0o600) -> bytes:
        if self.lacks.no_direct and flags & os.O_DIRECT:
            raise Refused(errno.EINVAL)
        handle = os.open(path, flags & ~(os.O_DIRECT | os.O_NOFOLLOW | os.O_APPEND) | os.O_CLOEXEC, mode)
        self.files[handle] = handle
        return struct.pack("=QII", handle, 0, 0)

    def open(self, node: int, data: bytes) -> bytes:
        return self._opened(self.paths[node], struct.unpack_from("=I", data)[0])

    def create(self, node: int, data: bytes) -> bytes:
        flags, mode = struct.unpack_from("=II", data)
        name = name_of(data[16:])
        self.check_name(name)
        path = self.path(node, name)
        opened = self._opened(path, flags, mode)
        return self.entry(path) + opened

    def read(self, _node: int, data: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("=QQI", data)
        return os.pread(handle, size, offset)

    def write(self, node: int, data: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("=QQI", data)
        before = os.fstat(handle).st_size
        if self.lacks.dense and offset > before:
            self.resize(self.paths[node], offset)
        return struct.pack("=II", os.pwrite(handle, data[40 : 40 + size], offset), 0)

    def fsync(self, _node: int, data: bytes) -> bytes:
        os.fsync(struct.unpack_from("=Q", data)[0])
        return b""

    def release(self, _node: int, data: bytes) -> bytes:
        os.close(self.files.pop(struct.unpack_from("=Q", data)[0]))
        return b""

    def fallocate(self, _node: int, data: bytes) -> bytes:
        handle, offset, length, mode = struct.unpack_from("=QQQI", data)
        if self.lacks.dense or mode:
            raise Refused(errno.EOPNOTSUPP)
        os.posix_fallocate(handle, offset, length)
        return b""

    def lseek(self, _node: int, data: bytes) -> bytes:
        handle, offset, whence = struct.unpack_from("=QQI", data)
        return struct.pack("=Q", os.lseek(handle, offset, whence))

    def statfs(self, _node: int, _data: bytes) -> bytes:
        space = os.statvfs(self.paths[ROOT])
        counts = (space.f_blocks, space.f_bfree, space.f_bavail, space.f_files, space.f_ffree)
        return struct.pack("=5Q10I", *counts, space.f_bsize, 255, space.f_frsize, *[0] * 7)

    def readdir(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", data)
        found = b""
        for position, name in enumerate([b".", b"..", *sorted(os.listdir(self.paths[node]))][offset:], offset + 1):
            one = struct.pack("=QQII", position, position, len(name), 0) + name
            one += bytes(-len(one) % 8)
            if len(found) + len(one) > size:
                break
            found += one
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for option, text in OPTIONS.items():
        parser.add_argument(f"--{option}", action="store_true", help=text)
    parser.add_argument("mountpoint")
    lacks = parser.parse_args()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"plainfs", os.fsencode(lacks.mountpoint), b"fuse.plainfs", 0, options) != 0:
        sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    directory = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        Filesystem(lacks, directory).serve(device)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
