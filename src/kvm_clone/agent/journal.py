"""The journal of one operation: an append-only file beside the staged disks at the destination.

A record is one line: the CRC-32 of the rest as eight hexadecimal digits, a space, and a JSON object with at least
`record`, one of the names below. A record counts once it is durable. The last line may be torn by a crash; it is then
as if it had never been written. docs/design.md says what each record means for whoever finds the journal.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from typing import Any, Dict, List

from .errors import UNSUPPORTED, AgentError

BEGIN = "begin"  # an operation holds the lock: operation, name, version, source, started
CREATE = "create"  # a staged file is about to be made: disk, part, final, size in bytes, format, backing
DURABLE = "durable"  # all content before the byte `end` is durable in the staged file: disk, end
COPIED = "copied"  # a staged file holds all content, durably: disk, bytes
PROVEN = "proven"  # both ends' digests agreed: disk
PUBLISH = "publish"  # a staged file is about to get its final name: disk, part, final, identity (see agent/stage.py)
RETRACT = "retract"  # a published file is about to get its staged name back: disk
DEFINE = (
    "define"  # the definition is about to be given to libvirt: the commit point: uuid, remove, forget, merge, images
)
WITHDRAWN = "withdrawn"  # libvirt does not have the definition, and will not get this one
COMMITTED = "committed"  # libvirt has the definition
MERGING = "merging"  # the images below the overlays are as they were when those were made, and are about to be written
MERGED = "merged"  # the overlays are in the images below, which libvirt may be told to use: untouched, images

Record = Dict[str, Any]


def make_durable(directory: str) -> None:
    """Make the directory's entries durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def encode(record: Record) -> bytes:
    """The record as a line."""
    body = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def replay(content: bytes) -> List[Record]:
    """The records in a journal's content, without a torn tail. Raises AgentError when an inner record is damaged."""
    lines = content.split(b"\n")
    records: List[Record] = []
    for number, line in enumerate(lines[:-1]):
        record = _decode(line)
        if record is None:
            if number == len(lines) - 2:
                break
            raise AgentError(UNSUPPORTED, f"the journal's record {number + 1} is damaged; it was left as it is")
        records.append(record)
    return records


def _decode(line: bytes) -> Any:
    crc, _, body = line.partition(b" ")
    try:
        if int(crc, 16) == zlib.crc32(body):
            return json.loads(body)
    except ValueError:
        return None
    return None


class Journal:
    """An open journal. Every append is durable when it returns."""

    def __init__(self, path: str, *, resume: bool = False) -> None:
        """Start a new journal, or go on with the one that is there, without its torn tail.

        Raises FileExistsError, FileNotFoundError, OSError; AgentError when an inner record is damaged.
        """
        self.path = path
        self.records: List[Record] = []
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags if resume else flags | os.O_CREAT | os.O_EXCL, 0o600)
        if resume:
            self._go_on()
        else:
            make_durable(os.path.dirname(path))

    def _go_on(self) -> None:
        try:
            with open(self._fd, "rb", closefd=False) as file:
                self.records = replay(file.read())
            os.ftruncate(self._fd, sum(len(encode(record)) for record in self.records))
        except BaseException:
            self.close()
            raise

    def append(self, record: str, /, **fields: Any) -> None:
        """Add a record and return when it is durable. Raises OSError."""
        entry: Record = {"record": record, **fields}
        line = encode(entry)
        end = os.fstat(self._fd).st_size
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, end)  # a part of a record would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        os.fsync(self._fd)
        self.records.append(entry)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close the file and remove it: the operation is over."""
        self.close()
        os.unlink(self.path)
        make_durable(os.path.dirname(self.path))
