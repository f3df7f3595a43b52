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
from typing import Dict, Iterator, List, Optional, Tuple, Union

from kvm_clone.agent.disks.disk import DATA, HOLE, READS_AHEAD, ZERO, Disk, Extent, Ranges, bounded, intersect
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


class _Request:
    """A request, and what its reply brings: content goes into `view`, `extents` are kept in the form of the wire."""

    def __init__(self, command: int, offset: int, length: int, view: Optional[memoryview] = None) -> None:
        self.command, self.offset, self.length, self.view = command, offset, length, view
        self.extents: Optional[bytes] = None
        self.done = False
        self._chunks = 0
        self._pieces: List[Tuple[int, int]] = []
        self._arrived = 0

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{_NAMES[self.command]} at {self.offset}" if self.command in _NAMES else "flush"

    def piece(self, offset: int, length: int) -> memoryview:
        """Where the content of that range belongs. Raises ProtocolError when it was not asked for, or came already."""
        self._arrived += length
        if self.view is None or self.command != _CMD_READ or self._arrived > self.length:
            raise ProtocolError(f"an NBD server sends content that nobody asked for ({self})")
        if not length or offset < self.offset or offset + length > self.end:
            raise ProtocolError(f"an NBD server sends {length} bytes at {offset}, which is outside of the {self}")
        self._pieces.append((offset, offset + length))
        return self.view[offset - self.offset : offset - self.offset + length]

    def count_chunk(self, *, ends: bool) -> None:
        """Raises ProtocolError when the reply has too many chunks."""
        self._chunks += 1
        if self._chunks >= _MOST_CHUNKS and not ends:
            raise ProtocolError("an NBD reply without end")

    def check(self) -> None:
        """Raises ProtocolError when a part of what was asked for is missing."""
        position = self.offset
        for start, end in sorted(self._pieces) if self.command == _CMD_READ else ():
            if start != position:
                break
            position = end
        if self.command == _CMD_READ and position != self.end:
            raise ProtocolError(f"an NBD server does not send all of what was asked for ({self})")
        if self.command == _CMD_BLOCK_STATUS and not self.extents:
            raise ProtocolError("an NBD block status without extents")


class NbdDisk(Disk):
    """One export of the server at the other end of a connected socket, which it takes over."""

    def __init__(self, connection: socket.socket, export: str = "", context: str = ALLOCATION) -> None:
        """`context`: what block status is asked about."""
        self._session = Session(connection)
        self._export = export
        self._cookie = 0
        self._waiting: Dict[int, _Request] = {}
        self._begun: Dict[Tuple[int, int], _Request] = {}
        self._buffers: List[bytearray] = []
        self._lent: Optional[bytearray] = None
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
            begun = self._begun.pop((offset + start, len(part)), None)
            if begun is not None:
                part[:] = self._content(begun)
            else:
                self._drain()
                self._finish(self._request(_CMD_READ, offset + start, len(part), view=part))

    def begin(self, extent: Extent) -> None:
        """See Disk. Of more than READS_AHEAD at a time nothing is begun."""
        key = (extent.offset, extent.length)
        if len(self._begun) < READS_AHEAD and key not in self._begun:
            while self._overlaps(extent.offset, extent.end):
                self._reply()
            buffer = self._buffers.pop() if self._buffers else bytearray(CHUNK)
            view = memoryview(buffer)[: extent.length]
            self._begun[key] = self._request(_CMD_READ, extent.offset, extent.length, view=view)

    def content(self, extent: Extent) -> memoryview:
        """See Disk."""
        begun = self._begun.pop((extent.offset, extent.length), None)
        return super().content(extent) if begun is None else self._content(begun)

    def _content(self, begun: _Request) -> memoryview:
        """What a read brings that was begun, in a buffer that is used again after the next call."""
        self._finish(begun)
        assert begun.view is not None
        if self._lent is not None:
            self._buffers.append(self._lent)
        self._lent = begun.view.obj  # type: ignore[assignment] # the bytearray that it was made of
        return begun.view

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
        self._begun.clear()  # what they bring may be older than what is written now
        # The server may do requests in any order: one that overlaps another has to wait for it.
        while len(self._waiting) >= IN_FLIGHT or self._overlaps(offset, offset + length):
            self._reply()
        self._raise_failure()
        # The content follows at once: MSG_MORE keeps the header from going out alone.
        self._request(_CMD_WRITE, offset, length, flags=socket.MSG_MORE)

    def _overlaps(self, low: int, high: int) -> bool:
        return any(asked.offset < high and low < asked.end for asked in self._waiting.values())

    def zero(self, offset: int, length: int) -> None:
        """See Disk."""
        self._begun.clear()
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
        # A server that is gone already needs no goodbye; what had to be durable, flush has made sure of.
        with contextlib.suppress(OSError, ProtocolError):
            self._request(_CMD_DISC, 0, 0)
        self._session.close()

    def _request(
        self, command: int, offset: int, length: int, *, view: Optional[memoryview] = None, flags: int = 0
    ) -> _Request:
        if self._broken is not None:
            raise self._broken
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length), flags)
        request = _Request(command, offset, length, view)
        if command != _CMD_DISC:
            self._waiting[self._cookie] = request
        return request

    def _finish(self, request: _Request) -> None:
        """Return when the request's reply is there. Raises OSError, ProtocolError."""
        while not request.done:
            self._reply()
        self._raise_failure()

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

    def _reply(self) -> None:
        """Read until one reply is whole. Raises ProtocolError, and OSError when there is no server any more."""
        if self._broken is not None:
            raise self._broken
        self._session.begin()
        try:
            while not self._chunk():
                pass
        except (OSError, ProtocolError) as error:
            self._broken = error
            raise

    def _chunk(self) -> bool:
        """Read a simple reply or a chunk of a structured one, of any request; whether a reply ends with it."""
        magic = int.from_bytes(self._session.read(4), "big")
        if magic == _SIMPLE_REPLY_MAGIC:
            _, code, cookie = _SIMPLE_REPLY.unpack(magic.to_bytes(4, "big") + self._session.read(12))
            asked, ends = self._asked(cookie), True
            self._simple(asked, code)
        elif magic == _STRUCTURED_REPLY_MAGIC and self._structured:
            flags, kind, cookie, length = _CHUNK_REST.unpack(self._session.read(_CHUNK_REST.size))
            asked, ends = self._asked(cookie), bool(flags & _REPLY_FLAG_DONE)
            asked.count_chunk(ends=ends)
            self._structure(asked, kind, length, ends=ends)
        else:
            raise ProtocolError(f"not an NBD reply: magic {magic:#x}")
        if ends:
            del self._waiting[cookie]
            if self._failure is None:
                asked.check()
            asked.done = True
        return ends

    def _asked(self, cookie: int) -> _Request:
        if cookie not in self._waiting:
            raise ProtocolError(f"an NBD reply to no request of ours, cookie {cookie}")
        return self._waiting[cookie]

    def _simple(self, asked: _Request, code: int) -> None:
        if code:
            self._fail(code, asked)
        elif asked.command == _CMD_READ:
            if self._structured:
                raise ProtocolError("an NBD server sends content without structure")
            self._session.read_into(asked.piece(asked.offset, asked.length))

    def _structure(self, asked: _Request, kind: int, length: int, *, ends: bool) -> None:
        """One chunk's body."""
        if kind == _REPLY_OFFSET_DATA and length > 8:
            offset = int.from_bytes(self._session.read(8), "big")
            self._session.read_into(asked.piece(offset, length - 8))
        elif kind == _REPLY_OFFSET_HOLE and length == _HOLE.size:
            offset, count = _HOLE.unpack(self._session.read(length))
            view = asked.piece(offset, count)
            view[:] = bytes(count)
        elif kind == _REPLY_BLOCK_STATUS and asked.command == _CMD_BLOCK_STATUS and asked.extents is None:
            asked.extents = self._extents(length)
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
        # The first failure is the cause of the others.
        code = code if code in _ERRORS else errno.EINVAL
        self._failure = self._failure or OSError(code, f"{os.strerror(code)} ({asked})")

    def _block_status(self, offset: int, length: int) -> Iterator[Tuple[int, int]]:
        """(length, state) pairs from `offset` on; together they may cover less than asked, but not nothing."""
        self._drain()
        request = self._request(_CMD_BLOCK_STATUS, offset, length)
        self._finish(request)
        for count, state in _EXTENT.iter_unpack(request.extents or b""):
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
