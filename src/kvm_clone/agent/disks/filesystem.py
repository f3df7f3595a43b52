"""What a directory's filesystem can do of what staging needs, tried there, and how files get their names on it.

Tried with a file that has no name where the filesystem has such, so that nothing is changed; else with files of our
mark, which are removed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import secrets
import stat
import time
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

_MARK, _PROBE = ".kvm-clone-", ".probe"

STALE_SECONDS = 3600.0
"""A probe is removed in the moment that it is made: one that is older was left by a process that was killed."""

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
RENAMEAT2 = {
    "x86_64": 316,
    "aarch64": 276,
    "riscv64": 276,
    "loongarch64": 276,
    "ppc64le": 357,
    "s390x": 347,
}
"""The number of renameat2(2) by machine, for a C library that lacks it: glibc before 2.28, musl before 1.2.4."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""What link(2) says where there are no hard links, or no more of them."""

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS)
"""What open(2) says of O_TMPFILE where there are no files without a name."""

_REFUSED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What chown(2) and chmod(2) say where files have no owner or mode of their own, or this user may not give any."""

_FOREIGN = ("fuse", "fuseblk", "cifs", "smb3", "9p", "virtiofs")
"""Kinds of filesystem that may have files without a name and yet no hard links: those are tried with names."""

_PASSING_INODES = ("vfat", "msdos", "exfat", "fuseblk")
"""Kinds of filesystem whose files get other inode numbers when the kernel has forgotten them."""

_TRIED = 1 << 20
"""Bytes of the hole that is made to see whether it takes room."""

_UNPORTABLE = ':*?"<>|\\'
"""What FAT and its kin take in no name."""

NO_LIMIT = (1 << 63) - 1

_DIRECT = getattr(os, "O_DIRECT", 0)


def abilities(directory: str) -> Dict[str, Any]:
    """What files in the directory can be, or have.

    `naming`: how one gets its final name, "link" or "rename", or nothing where neither can be had without replacing
    what is there. `owners`, `modes`: whether they can be set. `sparse`: whether holes take no room. `largest`: bytes
    that a file can have. `direct`: whether they can be opened past the page cache. `any_name`: whether names may hold
    anything, `folds`: whether names that differ in case alone are one. `trouble`: why no file can be made there.
    """
    found: Dict[str, Any] = {
        "naming": "link",
        "owners": True,
        "modes": True,
        "sparse": True,
        "largest": NO_LIMIT,
        "direct": True,
        "any_name": True,
        "folds": False,
        "trouble": "",
    }
    try:
        if not kind(os.stat(directory).st_dev).startswith(_FOREIGN):
            with _nameless(directory) as fd:
                if fd >= 0:
                    return {**found, **_file_abilities(fd, lambda flags: _open_again(fd, flags))}
        with _named(directory) as (fd, path):
            found.update(_file_abilities(fd, lambda flags: os.open(path, flags)))
            found.update(_name_abilities(path))
    except OSError as error:
        found["trouble"] = error.strerror or str(error)
    return found


@contextlib.contextmanager
def _nameless(directory: str) -> Iterator[int]:
    """A file that has no name, or -1 where there are none."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
        fd = -1
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _open_again(fd: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", flags)


@contextlib.contextmanager
def _named(directory: str) -> Iterator[Tuple[int, str]]:
    path = _probe_path(directory)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd, path
    finally:
        os.close(fd)
        _remove(path)


def _probe_path(directory: str, more: str = "") -> str:
    return os.path.join(directory, f"{_MARK}{secrets.token_hex(8)}{more}{_PROBE}")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _file_abilities(fd: int, open_again: Callable[[int], int]) -> Dict[str, Any]:
    """What can be tried with an open file of no content."""
    return {
        "owners": os.geteuid() != 0 or _keeps_owner(fd),
        "modes": _keeps_mode(fd),
        "largest": _largest(fd),
        "sparse": _is_sparse(fd),
        "direct": _opens(lambda: open_again(os.O_RDWR | os.O_CLOEXEC | _DIRECT)),
    }


def _keeps_owner(fd: int) -> bool:
    about = os.fstat(fd)
    other = about.st_uid + 1, about.st_gid + 1
    if not _if_allowed(lambda: os.fchown(fd, *other)):
        return False
    now = os.fstat(fd)
    return (now.st_uid, now.st_gid) == other


def _keeps_mode(fd: int) -> bool:
    return _if_allowed(lambda: os.fchmod(fd, 0o640)) and stat.S_IMODE(os.fstat(fd).st_mode) == 0o640


def _largest(fd: int) -> int:
    """The largest offset that the kernel takes for the file; asking for it changes nothing.

    pathconf(_PC_FILESIZEBITS) will not do: the C library guesses it by a list of filesystems, and says 32 of others.
    """
    low, high = 0, NO_LIMIT
    while low < high:
        middle = low + (high - low + 1) // 2
        try:
            os.lseek(fd, middle, os.SEEK_SET)
            low = middle
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW):
                raise
            high = middle - 1
    return low


def _is_sparse(fd: int) -> bool:
    """Whether a hole takes no room. Where there is not even room to try, the space check has the word."""
    try:
        os.ftruncate(fd, _TRIED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return os.fstat(fd).st_blocks * 512 < _TRIED // 2


def _opens(act: Callable[[], int]) -> bool:
    try:
        os.close(act())
    except OSError:  # EINVAL says it outright; whatever else it is, QEMU will meet it too
        return False
    return True


def _name_abilities(path: str) -> Dict[str, Any]:
    """What can be tried with a file that has a name of our mark."""
    directory = os.path.dirname(path)
    return {
        "naming": _naming(path, _probe_path(directory)),
        "any_name": _takes(_probe_path(directory, _UNPORTABLE)),
        "folds": os.path.lexists(os.path.join(directory, os.path.basename(path).upper())),
    }


def _takes(path: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:  # FAT says EINVAL, exFAT over FUSE ENOENT: where one name could be made, it is the other's letters
        return False
    os.close(fd)
    _remove(path)
    return True


def _naming(path: str, other: str) -> str:
    """How the file at `path` gets the name `other`; it has the one it had in the end."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        os.unlink(other)
        return "link"
    try:
        _rename(path, other)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        return ""
    _rename(other, path)
    return "rename"


_NO_RENAME = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What renameat2(2) says of a flag that the filesystem, or itself that the kernel, does not know."""


def _rename(old: str, new: str) -> None:
    """Rename the file if nothing has the new name. Raises FileExistsError, OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(*paths)
    elif platform.machine() in RENAMEAT2:
        done = libc.syscall(RENAMEAT2[platform.machine()], *paths)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), old, None, new)
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old, None, new)


def give_name(old: str, new: str) -> None:
    """Give the file `old` the name `new`, and take the old one from it. What has the name already is never replaced.

    A file that has both names, since it was interrupted between the two, loses the old one. Raises FileExistsError;
    OSError where the filesystem can do it neither by a link nor by a rename that replaces nothing.
    """
    try:
        os.link(old, new)
    except FileExistsError:
        if not os.path.samestat(os.lstat(old), os.lstat(new)):
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename(old, new)
        return
    os.unlink(old)


def own(path: str, mode: int, uid: int, gid: int) -> None:
    """Give the file its mode and, as root, its owner. What is refused is let be: the plan warns of it.

    Raises OSError for anything else.
    """
    _if_allowed(lambda: os.chmod(path, mode))
    if os.geteuid() == 0:
        _if_allowed(lambda: os.chown(path, uid, gid))


def _if_allowed(act: Callable[[], None]) -> bool:
    try:
        act()
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def kind(device: int) -> str:
    """The kind of the filesystem that is mounted from the device (st_dev), nothing where mountinfo does not say."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return ""


def lasting_inode(about: os.stat_result) -> int:
    """The file's inode number; 0 where a file gets another one when the kernel has forgotten it."""
    return 0 if kind(about.st_dev) in _PASSING_INODES else about.st_ino


def names_in(directory: str, starts: Sequence[str], most: int, end: str = "") -> Tuple[List[str], bool]:
    """The names in the directory that start with one of `starts`, in whatever case, and end with `end`.

    `most` of them at most, in order, and whether there are more. Raises OSError.
    """
    wanted = tuple(start.casefold() for start in starts)
    found: List[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.casefold().startswith(wanted) and entry.name.endswith(end):
                if len(found) == most:
                    return sorted(found), True
                found.append(entry.name)
    return sorted(found), False


_MOST_PROBES = 1000


def stale_probes(directory: str) -> List[str]:
    """The paths of our probes in the directory that a killed process has left. Raises OSError."""
    names, _ = names_in(directory, [_MARK], _MOST_PROBES, _PROBE)
    return [path for path in (os.path.join(directory, name) for name in names) if _is_stale(path)]


def _is_stale(path: str) -> bool:
    """Whether it is a probe, which is a file of nothing or of a hole, and old."""
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        return False
    size = about.st_size in (0, _TRIED)
    return stat.S_ISREG(about.st_mode) and size and time.time() - about.st_mtime > STALE_SECONDS


def remove_probe(path: str) -> bool:
    """Remove a probe that is stale; whether it was one. Raises OSError."""
    name = os.path.basename(path)
    if not (name.startswith(_MARK) and name.endswith(_PROBE) and _is_stale(path)):
        return False
    _remove(path)
    return True
