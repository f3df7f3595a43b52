"""A disk behind an NBD server.

The protocol is that of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle handshake,
structured replies, and the metadata contexts `base:allocation` for extents and `qemu:dirty-bitmap:NAME` for a dirty
bitmap (QEMU's docs/interop/nbd.txt). All integers are big-endian.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import urllib.parse
from typing import Dict, Iterator, List, Optional, Tuple, Union

from .disk import DATA, HOLE, ZERO, Disk, Extent, Ranges, bounded, intersect
from .errors import MISSING, AgentError
from .stream import Incoming
from .wire import CHUNK, ProtocolError

_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
_OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698
_STRUCTURED_REPLY_MAGIC = 0x668E33EF

_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR_BIT = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH, _CMD_WRITE_ZEROES, _CMD_BLOCK_STATUS = 0, 1, 2, 3, 6, 7
_REPLY_NONE, _REPLY_OFFSET_DATA, _REPLY_OFFSET_HOLE, _REPLY_BLOCK_STATUS = 0, 1, 2, 5
_REPLY_ERROR_BIT = 1 << 15
_REPLY_FLAG_DONE = 1
_STATE_HOLE, _STATE_ZERO = 1, 2
_STATE_DIRTY = 1

ALLOCATION, DIRTY_BITMAP = "base:allocation", "qemu:dirty-bitmap:"
"""Metadata contexts; the second is followed by the bitmap's name."""

_OPTION = struct.Struct(">QII")  # magic, option, length
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_CHUNK_REST = struct.Struct(">HHQI")  # flags, type, cookie, length: what follows a structured reply's magic

IN_FLIGHT = 16
"""Write requests that may wait for their replies: enough to keep the server's threads busy."""

_ZERO_LIMIT = 1 << 30
"""Bytes in one request that carries no data; the protocol's length field ends at 4 GiB."""

_SWEEP = 64 * CHUNK
"""Bytes. Ranges that are closer together are asked for in one go: a reply names many extents."""

_TIMEOUT = 300.0
"""Seconds a server on this same host may take for one reply before it counts as dead."""


class NbdDisk(Disk):
    """One export of the server at the other end of a connected socket, which it takes over."""

    def __init__(self, connection: socket.socket, export: str = "", context: str = ALLOCATION) -> None:
        """`context`: what block status is asked about."""
        self._socket = connection
        self._export = export.encode()
        self._socket.settimeout(None)
        _set_timeout(connection, _TIMEOUT)
        self._cookie = 0
        self._waiting: Dict[int, Tuple[str, int, int]] = {}  # cookie: what it does, start, end
        self._failure: Optional[OSError] = None
        self._context: Optional[int] = None
        self.size = 0
        self._shake_hands(context.encode())

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk. Everything is data when the server cannot say."""
        position, stop = bounded(self, start, end)
        while position < stop:
            for length, state in self._block_status(position, min(stop - position, _ZERO_LIMIT)):
                kind = (HOLE if state & _STATE_HOLE else ZERO) if state & _STATE_ZERO else DATA
                length = min(length, stop - position)
                if length:
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
            raise AgentError(MISSING, f"there is no such dirty bitmap of {self._export.decode()}")
        position = 0
        while position < self.size:
            for length, state in self._block_status(position, min(self.size - position, _ZERO_LIMIT)):
                end = min(position + length, self.size)
                if state & _STATE_DIRTY and end > position:
                    yield position, end
                position = end

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._drain()
            self._request(_CMD_READ, offset + start, len(part), f"read at {offset + start}")
            self._reply(into=part, at=offset + start)
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
            with _timeout():
                source.move(self._socket.fileno(), length)
        else:
            super().receive(offset, length, source)

    def _begin_write(self, offset: int, length: int) -> None:
        # The server may do requests in any order: one that overlaps another has to wait for it.
        while len(self._waiting) >= IN_FLIGHT or self._overlaps(offset, offset + length):
            self._reply()
        self._raise_failure()
        # The content follows at once: MSG_MORE keeps the header from going out alone.
        self._request(_CMD_WRITE, offset, length, f"write at {offset}", socket.MSG_MORE)

    def _overlaps(self, low: int, high: int) -> bool:
        return any(start < high and low < end for _, start, end in self._waiting.values())

    def zero(self, offset: int, length: int) -> None:
        """See Disk."""
        end = offset + length
        while offset < end:
            part = min(_ZERO_LIMIT, end - offset)
            self._drain()
            self._request(_CMD_WRITE_ZEROES, offset, part, f"zero at {offset}")
            offset += part

    def flush(self) -> None:
        """See Disk."""
        self._drain()
        self._request(_CMD_FLUSH, 0, 0, "flush")
        self._drain()
        self._raise_failure()

    def close(self) -> None:
        """See Disk. Says goodbye, so that the server closes the image in order."""
        if self._socket.fileno() < 0:
            return
        # A server that is gone already has nothing to be told; what had to be durable, flush has made sure of.
        with contextlib.suppress(OSError):
            self._request(_CMD_DISC, 0, 0, "disconnect")
        self._socket.close()

    def _request(self, command: int, offset: int, length: int, what: str, flags: int = 0) -> None:
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length), flags)
        if command != _CMD_DISC:
            self._waiting[self._cookie] = (what, offset, offset + length)

    def _send(self, data: Union[bytes, memoryview], flags: int = 0) -> None:
        with _timeout():
            self._socket.sendall(data, flags)

    def _drain(self) -> None:
        while self._waiting:
            self._reply()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _fail(self, code: int, what: str) -> None:
        # The codes are Linux's errno values by definition. The first failure is the telling one.
        self._failure = self._failure or OSError(code, f"{os.strerror(code)} ({what})")

    def _reply(self, into: Optional[memoryview] = None, at: int = 0) -> List[Tuple[int, int]]:
        """Read one whole reply; the extents it brings, if it is one that does."""
        extents: List[Tuple[int, int]] = []
        while True:
            magic = int.from_bytes(self._read(4), "big")
            if magic == _SIMPLE_REPLY_MAGIC:
                _, code, cookie = _SIMPLE_REPLY.unpack(magic.to_bytes(4, "big") + self._read(12))
                what = self._finish(cookie)
                if code:
                    self._fail(code, what)
                elif into is not None:
                    self._read_into(into)
                return extents
            if magic != _STRUCTURED_REPLY_MAGIC:
                raise ProtocolError(f"not an NBD reply: magic {magic:#x}")
            flags, kind, cookie, length = _CHUNK_REST.unpack(self._read(_CHUNK_REST.size))
            self._chunk(kind, cookie, length, into, at, extents)
            if flags & _REPLY_FLAG_DONE:
                self._finish(cookie)
                return extents

    def _chunk(
        self,
        kind: int,
        cookie: int,
        length: int,
        into: Optional[memoryview],
        at: int,
        extents: List[Tuple[int, int]],
    ) -> None:
        """One chunk of a structured reply."""
        if kind == _REPLY_OFFSET_DATA and into is not None:
            start = int.from_bytes(self._read(8), "big") - at
            self._read_into(into[start : start + length - 8])
        elif kind == _REPLY_OFFSET_HOLE and into is not None:
            offset, count = struct.unpack(">QI", self._read(length))
            into[offset - at : offset - at + count] = bytes(count)
        elif kind == _REPLY_BLOCK_STATUS:
            body = self._read(length)
            extents.extend(struct.iter_unpack(">II", body[4:]))
        elif kind & _REPLY_ERROR_BIT:
            code = int.from_bytes(self._read(length)[:4], "big")
            self._fail(code, self._waiting.get(cookie, ("request", 0, 0))[0])
        elif kind != _REPLY_NONE or length:
            raise ProtocolError(f"an NBD reply of unknown type {kind}")

    def _finish(self, cookie: int) -> str:
        if cookie not in self._waiting:
            raise ProtocolError(f"an NBD reply to no request of ours, cookie {cookie}")
        return self._waiting.pop(cookie)[0]

    def _block_status(self, offset: int, length: int) -> List[Tuple[int, int]]:
        """(length, state) pairs from `offset` on; together they may cover less than asked."""
        if self._context is None:
            return [(length, 0)]
        self._drain()
        self._request(_CMD_BLOCK_STATUS, offset, length, f"block status at {offset}")
        extents = self._reply()
        self._raise_failure()
        if not extents:
            raise ProtocolError("an NBD block status without extents")
        return extents

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, view: memoryview) -> None:
        while view:
            with _timeout():
                count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
            view = view[count:]

    def _shake_hands(self, query: bytes) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self._read(18))
        if magic != _MAGIC or option_magic != _OPTION_MAGIC or not flags & _FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("not an NBD server of the fixed newstyle")
        self._socket.sendall(struct.pack(">I", _FLAG_FIXED_NEWSTYLE | flags & _FLAG_NO_ZEROES))
        if self._option(_OPT_STRUCTURED_REPLY, b"") is not None:
            name = struct.pack(">I", len(self._export)) + self._export
            request = name + struct.pack(">II", 1, len(query)) + query
            for kind, body in self._option(_OPT_SET_META_CONTEXT, request) or []:
                if kind == _REP_META_CONTEXT:
                    self._context = int.from_bytes(body[:4], "big")
        infos = self._option(_OPT_GO, struct.pack(">I", len(self._export)) + self._export + struct.pack(">H", 0))
        for kind, body in infos or []:
            if kind == _REP_INFO and int.from_bytes(body[:2], "big") == _INFO_EXPORT:
                self.size = int.from_bytes(body[2:10], "big")
                return
        raise ProtocolError("the NBD server does not offer its export")

    def _option(self, option: int, data: bytes) -> Optional[List[Tuple[int, bytes]]]:
        """The replies to an option, or None when the server refuses it."""
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        replies: List[Tuple[int, bytes]] = []
        while True:
            magic, _, kind, length = _OPTION_REPLY.unpack(self._read(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC:
                raise ProtocolError(f"not an NBD option reply: magic {magic:#x}")
            body = self._read(length)
            if kind & _REP_ERROR_BIT:
                return None
            if kind == _REP_ACK:
                return replies
            replies.append((kind, body))


def connect(uri: str, context: str = ALLOCATION) -> NbdDisk:
    """The disk at an NBD URI of the form nbd+unix:///EXPORT?socket=PATH. Raises OSError, ProtocolError."""
    parts = urllib.parse.urlsplit(uri)
    (path,) = urllib.parse.parse_qs(parts.query)["socket"]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _reach(connection, path)
        return NbdDisk(connection, urllib.parse.unquote(parts.path[1:]), context)
    except BaseException:
        connection.close()
        raise


def _reach(connection: socket.socket, path: str) -> None:
    try:
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


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """What a socket says when its time is over, in clear words."""
    try:
        yield
    except BlockingIOError as error:
        raise OSError(errno.ETIMEDOUT, f"the NBD server did nothing for {_TIMEOUT:.0f} s") from error


def _set_timeout(connection: socket.socket, seconds: float) -> None:
    # Not settimeout(): that makes the descriptor non-blocking, and splice needs it blocking.
    value = struct.pack("ll", int(seconds), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
