"""A disk behind an NBD server.

The protocol is that of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: structured replies, and the
metadata contexts `base:allocation` for extents and `qemu:dirty-bitmap:NAME` for a dirty bitmap (QEMU's
docs/interop/nbd.txt). All integers are big-endian.

A server is not believed: what it says is held against what it was asked, costs no more memory than that, and has to be
over in time. What does not fit is a ProtocolError, and the connection is of no use from there on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import urllib.parse
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from kvm_clone.agent.disks.disk import DATA, HOLE, ZERO, Disk, Extent, Ranges, bounded, intersect
from kvm_clone.agent.disks.nbd_session import MOST_WORDS, Session, in_time, set_timeout
from kvm_clone.agent.protocol.errors import MISSING, AgentError
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK, ProtocolError

_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698
_STRUCTURED_REPLY_MAGIC = 0x668E33EF

_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH, _CMD_WRITE_ZEROES, _CMD_BLOCK_STATUS = 0, 1, 2, 3, 6, 7
_REPLY_NONE, _REPLY_OFFSET_DATA, _REPLY_OFFSET_HOLE, _REPLY_BLOCK_STATUS = 0, 1, 2, 5
_REPLY_ERROR_BIT, _REPLY_ERROR_OFFSET = 1 << 15, 1 << 15 | 2
_REPLY_FLAG_DONE = 1
_STATE_HOLE, _STATE_ZERO = 1, 2
_STATE_DIRTY = 1

ALLOCATION, DIRTY_BITMAP = "base:allocation", "qemu:dirty-bitmap:"
"""Metadata contexts; the second is followed by the bitmap's name."""

_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_CHUNK_REST = struct.Struct(">HHQI")  # flags, type, cookie, length: what follows a structured reply's magic
_HOLE = struct.Struct(">QI")  # offset, length
_ERROR = struct.Struct(">IH")  # code, length of the message
_EXTENT = struct.Struct(">II")  # length, state

IN_FLIGHT = 16
"""Write requests that may wait for their replies: enough to keep the server's threads busy."""

_ZERO_LIMIT = 1 << 30
"""Bytes in one request that carries no data; the protocol's length field ends at 4 GiB."""

_SWEEP = 64 * CHUNK
"""Bytes. Ranges that are closer together are asked for in one go: a reply names many extents."""

_MOST_CHUNKS = 8192
"""Chunks of one reply: a request of CHUNK bytes whose blocks of 512 are data and hole in turn has a quarter."""

_MOST_EXTENTS = 1 << 20
"""Extents in one block status. QEMU says 131,072 at most."""

_ERRORS = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP,
           errno.ESHUTDOWN}  # fmt: skip
"""What a server may name, by Linux's numbers; anything else is to be taken for EINVAL."""

_NAMES = {_CMD_READ: "read", _CMD_WRITE: "write", _CMD_WRITE_ZEROES: "zero", _CMD_BLOCK_STATUS: "block status"}


class _Request(NamedTuple):
    """A request that waits for its reply."""

    command: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{_NAMES[self.command]} at {self.offset}" if self.command in _NAMES else "flush"


class _Content:
    """What one reply brings: it is written into `view`, or kept as `extents` in the form of the wire."""

    def __init__(self, view: Optional[memoryview] = None) -> None:
        self.view = view
        self.extents: Optional[bytes] = None
        self._pieces: List[Tuple[int, int]] = []
        self._arrived = 0

    def piece(self, asked: _Request, offset: int, length: int) -> memoryview:
        """Where the content of that range belongs. Raises ProtocolError when it was not asked for, or came already."""
        self._arrived += length
        if self.view is None or asked.command != _CMD_READ or self._arrived > asked.length:
            raise ProtocolError(f"an NBD server sends content that nobody asked for ({asked})")
        if not length or offset < asked.offset or offset + length > asked.end:
            raise ProtocolError(f"an NBD server sends {length} bytes at {offset}, which is outside of the {asked}")
        self._pieces.append((offset, offset + length))
        return self.view[offset - asked.offset : offset - asked.offset + length]

    def check(self, asked: _Request) -> None:
        """Raises ProtocolError when a part of what was asked for is missing."""
        position = asked.offset
        for start, end in sorted(self._pieces) if asked.command == _CMD_READ else ():
            if start != position:
                break
            position = end
        if asked.command == _CMD_READ and position != asked.end:
            raise ProtocolError(f"an NBD server does not send all of what was asked for ({asked})")
        if asked.command == _CMD_BLOCK_STATUS and not self.extents:
            raise ProtocolError("an NBD block status without extents")


class NbdDisk(Disk):
    """One export of the server at the other end of a connected socket, which it takes over."""

    def __init__(self, connection: socket.socket, export: str = "", context: str = ALLOCATION) -> None:
        """`context`: what block status is asked about."""
        self._session = Session(connection)
        self._export = export
        self._cookie = 0
        self._waiting: Dict[int, _Request] = {}
        self._failure: Optional[OSError] = None
        self._broken: Union[OSError, ProtocolError, None] = None
        self.size, self._structured, self._context = self._session.shake_hands(export.encode(), context.encode())

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk. Everything is data when the server cannot say."""
        position, stop = bounded(self, start, end)
        if self._context is None and position < stop:
            yield Extent(position, stop - position, DATA)
            return
        while position < stop:
            for length, state in self._block_status(position, min(stop - position, _ZERO_LIMIT)):
                kind = (HOLE if state & _STATE_HOLE else ZERO) if state & _STATE_ZERO else DATA
                yield Extent(position, length, kind)
                position += length

    def within(self, ranges: Ranges) -> Iterator[Extent]:
        """See Disk."""
        for near in _swept(ranges):
            yield from intersect(self.extents(near[0][0], near[-1][1]), near)

    def dirty(self) -> Iterator[Tuple[int, int]]:
        """The [start, end) pairs that the dirty bitmap names, in order; it must be what block status is asked about.

        Raises AgentError (missing) when the server does not have it.
        """
        if self._context is None:
            raise AgentError(MISSING, f"there is no such dirty bitmap of {self._export}")
        position = 0
        while position < self.size:
            for length, state in self._block_status(position, min(self.size - position, _ZERO_LIMIT)):
                if state & _STATE_DIRTY:
                    yield position, position + length
                position += length

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._drain()
            self._request(_CMD_READ, offset + start, len(part))
            self._reply(part)
            self._raise_failure()

    def write(self, offset: int, data: memoryview) -> None:
        """See Disk."""
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            self._begin_write(offset + start, len(part))
            self._send(part)

    def receive(self, offset: int, length: int, source: Incoming) -> None:
        """See Disk."""
        if source.can_move:
            self._begin_write(offset, length)
            with in_time():
                source.move(self._session.fileno(), length)
        else:
            super().receive(offset, length, source)

    def _begin_write(self, offset: int, length: int) -> None:
        # The server may do requests in any order: one that overlaps another has to wait for it.
        while len(self._waiting) >= IN_FLIGHT or self._overlaps(offset, offset + length):
            self._reply()
        self._raise_failure()
        # The content follows at once: MSG_MORE keeps the header from going out alone.
        self._request(_CMD_WRITE, offset, length, socket.MSG_MORE)

    def _overlaps(self, low: int, high: int) -> bool:
        return any(asked.offset < high and low < asked.end for asked in self._waiting.values())

    def zero(self, offset: int, length: int) -> None:
        """See Disk."""
        end = offset + length
        while offset < end:
            part = min(_ZERO_LIMIT, end - offset)
            self._drain()
            self._request(_CMD_WRITE_ZEROES, offset, part)
            offset += part

    def flush(self) -> None:
        """See Disk."""
        self._drain()
        self._request(_CMD_FLUSH, 0, 0)
        self._drain()
        self._raise_failure()

    def close(self) -> None:
        """See Disk. Says goodbye, so that the server closes the image in order."""
        if self._session.fileno() < 0:
            return
        # A server that is gone already has nothing to be told; what had to be durable, flush has made sure of.
        with contextlib.suppress(OSError, ProtocolError):
            self._request(_CMD_DISC, 0, 0)
        self._session.close()

    def _request(self, command: int, offset: int, length: int, flags: int = 0) -> None:
        if self._broken is not None:
            raise self._broken
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length), flags)
        if command != _CMD_DISC:
            self._waiting[self._cookie] = _Request(command, offset, length)

    def _send(self, data: Union[bytes, memoryview], flags: int = 0) -> None:
        try:
            self._session.send(data, flags)
        except OSError as error:  # with half a request sent, nothing can follow
            self._broken = error
            raise

    def _drain(self) -> None:
        while self._waiting:
            self._reply()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _reply(self, into: Optional[memoryview] = None) -> _Content:
        """Read one whole reply; what it brings. Raises ProtocolError, and OSError when there is no server any more."""
        if self._broken is not None:
            raise self._broken
        self._session.begin()
        content = _Content(into)
        try:
            for _ in range(_MOST_CHUNKS):
                if self._chunk(content):
                    return content
            raise ProtocolError("an NBD reply without end")
        except (OSError, ProtocolError) as error:
            self._broken = error
            raise

    def _chunk(self, content: _Content) -> bool:
        """Read a simple reply or a chunk of a structured one; whether the reply ends with it."""
        magic = int.from_bytes(self._session.read(4), "big")
        if magic == _SIMPLE_REPLY_MAGIC:
            _, code, cookie = _SIMPLE_REPLY.unpack(magic.to_bytes(4, "big") + self._session.read(12))
            self._simple(self._asked(cookie), code, content)
            ends = True
        elif magic == _STRUCTURED_REPLY_MAGIC and self._structured:
            flags, kind, cookie, length = _CHUNK_REST.unpack(self._session.read(_CHUNK_REST.size))
            ends = bool(flags & _REPLY_FLAG_DONE)
            self._structure(self._asked(cookie), kind, length, content, ends=ends)
        else:
            raise ProtocolError(f"not an NBD reply: magic {magic:#x}")
        if ends:
            asked = self._waiting.pop(cookie)
            if self._failure is None:
                content.check(asked)
        return ends

    def _asked(self, cookie: int) -> _Request:
        if cookie not in self._waiting:
            raise ProtocolError(f"an NBD reply to no request of ours, cookie {cookie}")
        return self._waiting[cookie]

    def _simple(self, asked: _Request, code: int, content: _Content) -> None:
        if code:
            self._fail(code, asked)
        elif asked.command == _CMD_READ:
            if self._structured:
                raise ProtocolError("an NBD server sends content without structure")
            self._session.read_into(content.piece(asked, asked.offset, asked.length))

    def _structure(self, asked: _Request, kind: int, length: int, content: _Content, *, ends: bool) -> None:
        """One chunk's body."""
        if kind == _REPLY_OFFSET_DATA and length > 8:
            offset = int.from_bytes(self._session.read(8), "big")
            self._session.read_into(content.piece(asked, offset, length - 8))
        elif kind == _REPLY_OFFSET_HOLE and length == _HOLE.size:
            offset, count = _HOLE.unpack(self._session.read(length))
            view = content.piece(asked, offset, count)
            view[:] = bytes(count)
        elif kind == _REPLY_BLOCK_STATUS and asked.command == _CMD_BLOCK_STATUS and content.extents is None:
            content.extents = self._extents(length)
        elif kind & _REPLY_ERROR_BIT:
            self._error(asked, kind, length)
        elif kind != _REPLY_NONE or length or not ends:
            raise ProtocolError(f"an NBD reply of type {kind} and {length} bytes to a {asked}")

    def _extents(self, length: int) -> bytes:
        """A block status' extents as they are on the wire."""
        count, rest = divmod(length - 4, _EXTENT.size)
        if rest or not 0 < count <= _MOST_EXTENTS:
            raise ProtocolError(f"an NBD block status of {length} bytes")
        context = int.from_bytes(self._session.read(4), "big")
        if context != self._context:
            raise ProtocolError(f"an NBD block status of context {context}, which nobody asked for")
        return self._session.read(length - 4)

    def _error(self, asked: _Request, kind: int, length: int) -> None:
        if not _ERROR.size <= length <= MOST_WORDS:
            raise ProtocolError(f"an NBD error of {length} bytes")
        body = self._session.read(length)
        code, words = _ERROR.unpack_from(body)
        rest = length - _ERROR.size - words
        if rest < 0 or (kind == _REPLY_ERROR_OFFSET and rest != 8) or not code:
            raise ProtocolError(f"an NBD error {code} that has {words} of {length} bytes for its text")
        self._fail(code, asked)

    def _fail(self, code: int, asked: _Request) -> None:
        # The first failure is the telling one.
        code = code if code in _ERRORS else errno.EINVAL
        self._failure = self._failure or OSError(code, f"{os.strerror(code)} ({asked})")

    def _block_status(self, offset: int, length: int) -> Iterator[Tuple[int, int]]:
        """(length, state) pairs from `offset` on; together they may cover less than asked, but not nothing."""
        self._drain()
        self._request(_CMD_BLOCK_STATUS, offset, length)
        extents = self._reply().extents
        self._raise_failure()
        for count, state in _EXTENT.iter_unpack(extents or b""):
            if not count or not length:  # the last one alone may go beyond what was asked
                raise ProtocolError(f"an NBD block status at {offset} that has an extent of {count} bytes too many")
            yield min(count, length), state
            length -= min(count, length)


def connect(uri: str, context: str = ALLOCATION) -> NbdDisk:
    """The disk at an NBD URI of the form nbd+unix:///EXPORT?socket=PATH. Raises OSError, ProtocolError."""
    parts = urllib.parse.urlsplit(uri)
    (path,) = urllib.parse.parse_qs(parts.query)["socket"]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        set_timeout(connection)  # a server that does not accept keeps a client waiting too
        _reach(connection, path)
        return NbdDisk(connection, urllib.parse.unquote(parts.path[1:]), context)
    except BaseException:
        connection.close()
        raise


def _reach(connection: socket.socket, path: str) -> None:
    try:
        with in_time():
            connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:  # a guest that powers off takes the job with it
        raise ConnectionResetError(errno.ECONNRESET, f"there is no NBD server behind {path}") from error


def uri(path: str, export: str) -> str:
    """What `connect` takes, for an export behind the UNIX socket at `path`."""
    return f"nbd+unix:///{urllib.parse.quote(export, safe='')}?socket={urllib.parse.quote(path)}"


def _swept(ranges: Ranges) -> Iterator[List[Tuple[int, int]]]:
    """The ranges in lists of those that are close together."""
    near: List[Tuple[int, int]] = []
    for start, end in ranges:
        if near and start - near[-1][1] > _SWEEP:
            yield near
            near = []
        near.append((start, end))
    if near:
        yield near
