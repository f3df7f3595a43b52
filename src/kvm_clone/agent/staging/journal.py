"""The journal of one operation: an append-only file beside the staged disks at the destination.

A record is one line: the CRC-32 of the rest as eight hexadecimal digits, a space, and a JSON object with at least
`record`; records.py says which there are. A record counts once it is durable. The last line may be torn by a crash; it
is then as if it had never been written, and a journal without a whole record as if it were not there.
docs/design.md says what each record means for whoever finds the journal.

While an operation is under way its agent holds a write lock of fcntl(2) on the whole file, which a filesystem that
several hosts share carries from one to the other, and renews the file's mtime, for those that carry no locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import zlib
from typing import Any, List, NamedTuple, Optional

from kvm_clone.agent import names
from kvm_clone.agent.disks.image_lock import FLOCK
from kvm_clone.agent.host.this_host import Host, this_host
from kvm_clone.agent.protocol.errors import LOCKED, UNSUPPORTED, AgentError
from kvm_clone.agent.staging import records
from kvm_clone.agent.staging.files import make_durable
from kvm_clone.agent.staging.records import Record

LARGEST = 64 << 20
"""Bytes; a longer file is no journal of ours."""

LEASE_SECONDS = 60.0
RENEWAL_SECONDS = 10.0
"""The agent of an operation that is under way touches the journal at least every so often; one that was not touched for
a lease's time is of no living operation."""


def encode(record: Record) -> bytes:
    """The record as a line."""
    body = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


class Replay(NamedTuple):
    """What a journal holds: its records, and how many bytes they take; what follows is a torn tail."""

    records: List[Record]
    end: int


def replay(content: bytes) -> Replay:
    """The records in a journal's content. Raises AgentError (unsupported) when one is damaged or none of ours."""
    lines = content.split(b"\n")
    found: List[Record] = []
    end = 0
    for number, line in enumerate(lines[:-1]):
        record = _decode(line)
        if record is None:
            if number == len(lines) - 2:
                break
            raise AgentError(UNSUPPORTED, f"the journal's record {number + 1} is damaged; it was left as it is")
        found.append(record)
        end += len(line) + 1
    records.check(found)
    return Replay(found, end)


def _decode(line: bytes) -> Any:
    crc, _, body = line.partition(b" ")
    try:
        if int(crc, 16) == zlib.crc32(body):
            return json.loads(body)
    except (ValueError, RecursionError):
        return None
    return None


class Look(NamedTuple):
    """A journal as whoever passes by finds it: its records, whether its operation lives, and when it was changed."""

    records: List[Record]
    active: bool
    changed: float


def look(path: str) -> Look:
    """Look at a journal without changing it. Raises FileNotFoundError, OSError, AgentError (unsupported)."""
    fd = _opened(path, os.O_RDONLY)
    try:
        changed = os.fstat(fd).st_mtime
        found = replay(_content(fd)).records
        fresh = bool(found) and elsewhere(found[0]) != "" and abs(time.time() - changed) < LEASE_SECONDS
        return Look(found, is_locked(fd) or fresh, changed)
    finally:
        os.close(fd)


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What a filesystem without locks answers: it is shared with nobody, or has the lease alone."""


def is_locked(fd: int) -> bool:
    """Whether another open file has the lock on the journal."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _opened(path: str, flags: int) -> int:
    """The journal, open. Raises AgentError (unsupported) when it is no file that only we, or root, can have written."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a FIFO or socket, a directory
            raise AgentError(UNSUPPORTED, f"{path} is no regular file, and no journal of ours") from error
        raise
    try:
        _check_file(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file(path: str, about: os.stat_result) -> None:
    reasons = (
        (not stat.S_ISREG(about.st_mode), "is no regular file"),
        (about.st_mode & 0o022, "can be written by others"),
        (about.st_nlink > 1, "has another name"),
        (about.st_size > LARGEST, f"is larger than {LARGEST} bytes"),
        (about.st_uid not in (0, os.geteuid()) and about.st_uid != _owner_beside(path), "belongs to another user"),
    )
    for applies, why in reasons:
        if applies:
            raise AgentError(UNSUPPORTED, f"{path} {why}: it counts for no journal of ours")


def _owner_beside(path: str) -> Optional[int]:
    """Whom a new file in this directory belongs to: an NFS server may give root's files to somebody else."""
    probe = os.path.join(os.path.dirname(path), f"{names.PREFIX}{os.urandom(6).hex()}.probe")
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # where we cannot write we have no journal
        return None
    try:
        return os.fstat(fd).st_uid
    finally:
        os.unlink(probe)
        os.close(fd)


def _content(fd: int) -> bytes:
    parts: List[bytes] = []
    at = 0
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
        if at > LARGEST:
            break
    return b"".join(parts)


def elsewhere(begin: Record) -> str:
    """The name of the other host that this journal's operation belongs to; empty for this host's own.

    Where machine-ids agree and names do not, one of both was copied or changed: that is not known to be this host.
    """
    said = begin.get("host")
    if said is None:  # version 0.1 names none
        return ""
    here, there = this_host(), Host(said.get("machine", ""), said.get("name", ""))
    known = here.machine and there.machine
    same = here == there if known else here.name == there.name
    return "" if same else there.name or "another host"


class Journal:
    """An open journal, whose lock we hold. Every append is durable when it returns."""

    def __init__(self, path: str, *, resume: bool = False) -> None:
        """Start a new journal, or continue the one that is there, without its torn tail. Opening one changes nothing.

        Raises FileExistsError, FileNotFoundError, OSError; AgentError: locked while another process has it,
        unsupported when it is no journal of ours or damaged.
        """
        self.path = path
        self.records: List[Record] = []
        flags = os.O_RDWR | os.O_APPEND
        self._fd = _opened(path, flags) if resume else _made(path, flags)
        self._renewed = time.monotonic()
        self._end = 0
        try:
            self._lock()
            if resume:
                self._check_place()
                self.records, self._end = replay(_content(self._fd))
            else:
                make_durable(os.path.dirname(path))
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise AgentError(LOCKED, f"another operation is under way: it has {self.path}") from error
            if error.errno not in _NO_LOCKS:
                raise

    def _check_place(self) -> None:
        """Its last holder may have removed the file between our open and our lock."""
        if not self.is_ours:
            raise AgentError(LOCKED, f"another operation has just ended, or begun, at {self.path}")

    @property
    def is_ours(self) -> bool:
        """Whether the journal is still the file at its path: a takeover begins another one."""
        try:
            there = os.lstat(self.path)
        except OSError:
            return False
        mine = os.fstat(self._fd) if self._fd >= 0 else None
        return mine is not None and (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def renew(self) -> None:
        """Touch the file now and then, by which others see that its operation lives."""
        now = time.monotonic()
        if self._fd >= 0 and now - self._renewed >= RENEWAL_SECONDS:
            self._renewed = now
            os.utime(self._fd)

    def append(self, record: str, /, **fields: Any) -> None:
        """Add a record, in place of a torn tail, and return when it is durable. Raises OSError."""
        entry: Record = {"record": record, **fields}
        line = encode(entry)
        if os.fstat(self._fd).st_size > self._end:
            os.ftruncate(self._fd, self._end)
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, self._end)  # a part of a record would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        os.fsync(self._fd)
        self._end += len(line)
        self.records.append(entry)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove the file and close it: the operation is over."""
        os.unlink(self.path)
        self.close()  # first: there may be no descriptor left to open the directory with
        make_durable(os.path.dirname(self.path))


def _made(path: str, flags: int) -> int:
    """A new journal, open. Raises FileExistsError; AgentError (unsupported) where others can write all files."""
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_mode & 0o022:
        os.unlink(path)
        os.close(fd)
        raise AgentError(
            UNSUPPORTED, f"others can write all files in {os.path.dirname(path)}: no journal is safe there"
        )
    return fd
