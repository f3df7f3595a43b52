"""A connection to an NBD server: the fixed newstyle handshake, and bytes that come and go in time.

Here too nothing is believed, see nbd.py. All integers are big-endian.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from typing import Iterator, List, NamedTuple, Optional, Tuple, Union

from kvm_clone.agent.protocol.wire import ProtocolError

_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
_OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9

_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR_BIT = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0

_OPTION = struct.Struct(">QII")  # magic, option, length
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
_EXPORT = struct.Struct(">HQH")  # type of information, size, flags

_TIMEOUT = 300.0
"""Seconds a server on this same host may take for the handshake, for one reply, or to take one request, before it
counts as dead. It opens the image before it says anything."""

_MOST_SIZE = (1 << 63) - 1
"""Bytes: Linux has no larger offsets."""

MOST_WORDS = 8192
"""Bytes in an option's reply or in an error: their texts have 4096 at most."""

_MOST_OPTION_REPLIES = 64


class Export(NamedTuple):
    """What was agreed on: the size in bytes, whether replies are structured, and the metadata context's number."""

    size: int
    structured: bool
    context: Optional[int]


class Session:
    """The bytes of a connected socket, which it takes over."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._due = 0.0
        connection.settimeout(None)
        set_timeout(connection)

    def begin(self) -> None:
        """From here on the server has its time anew: what is read next has to be whole within it."""
        self._due = time.monotonic() + _TIMEOUT

    def fileno(self) -> int:
        """The socket's descriptor, negative when it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, data: Union[bytes, memoryview], flags: int = 0) -> None:
        """Send everything. Raises OSError."""
        self.begin()
        self._send(data, flags)

    def _send(self, data: Union[bytes, memoryview], flags: int = 0) -> None:
        # Not in one blocking call: the kernel grants its time limit anew for each little that the other side takes.
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view, flags | socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                left = self._due - time.monotonic()
                if left <= 0 or not select.select([], [self._socket], [], left)[1]:
                    raise _too_late() from None

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises OSError."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """Fill `view`. Raises OSError."""
        while view:
            if time.monotonic() > self._due:  # however little comes at a time, all of it has to be there by then
                raise _too_late()
            with in_time():
                count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
            view = view[count:]

    def shake_hands(self, export: bytes, query: bytes) -> Export:
        """Agree on the export, and on the metadata context `query` where the server has it.

        Raises ProtocolError, OSError.
        """
        self.begin()
        magic, option_magic, flags = struct.unpack(">QQH", self.read(18))
        if magic != _MAGIC or option_magic != _OPTION_MAGIC or not flags & _FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("not an NBD server of the fixed newstyle")
        self._send(struct.pack(">I", _FLAG_FIXED_NEWSTYLE | flags & _FLAG_NO_ZEROES))
        name = struct.pack(">I", len(export)) + export
        context = None
        structured = self._option(_OPT_STRUCTURED_REPLY, b"") is not None
        if structured:
            replies = self._option(_OPT_SET_META_CONTEXT, name + struct.pack(">II", 1, len(query)) + query)
            context = _context([body for kind, body in replies or [] if kind == _REP_META_CONTEXT], query)
        replies = self._option(_OPT_GO, name + struct.pack(">H", 0))
        return Export(_size([body for kind, body in replies or [] if kind == _REP_INFO]), structured, context)

    def _option(self, option: int, data: bytes) -> Optional[List[Tuple[int, bytes]]]:
        """The replies to an option, or None when the server refuses it."""
        self._send(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        replies: List[Tuple[int, bytes]] = []
        while len(replies) < _MOST_OPTION_REPLIES:
            magic, about, kind, length = _OPTION_REPLY.unpack(self.read(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or about != option:
                raise ProtocolError(f"not a reply to NBD option {option}: magic {magic:#x}, option {about}")
            if length > MOST_WORDS:
                raise ProtocolError(f"a reply of {length} bytes to NBD option {option}")
            body = self.read(length)
            if kind & _REP_ERROR_BIT:
                return None
            if kind == _REP_ACK:
                return replies
            replies.append((kind, body))
        raise ProtocolError(f"replies without end to NBD option {option}")


def _context(bodies: List[bytes], query: bytes) -> Optional[int]:
    """The number of the metadata context that was asked for, None when the server has none."""
    if len(bodies) > 1 or any(len(body) < 4 or body[4:] != query for body in bodies):
        raise ProtocolError(f"an NBD server names metadata contexts other than {query.decode()}")
    return int.from_bytes(bodies[0][:4], "big") if bodies else None


def _size(bodies: List[bytes]) -> int:
    """The export's size in bytes, from what the server informs of."""
    about = [body for body in bodies if body[:2] == _INFO_EXPORT.to_bytes(2, "big")]
    if not about:
        raise ProtocolError("the NBD server does not offer its export")
    if len(about) > 1 or len(about[0]) != _EXPORT.size:
        raise ProtocolError("the NBD server contradicts itself about its export")
    size: int = _EXPORT.unpack(about[0])[1]
    if size > _MOST_SIZE:
        raise ProtocolError(f"the NBD server offers {size} bytes, more than there can be")
    return size


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """What a socket says when its time is over, in clear words."""
    try:
        yield
    except BlockingIOError as error:
        raise _too_late() from error


def _too_late() -> OSError:
    return OSError(errno.ETIMEDOUT, f"the NBD server did nothing for {_TIMEOUT:.0f} s")


def set_timeout(connection: socket.socket) -> None:
    """Let no system call on the socket take longer than a server may."""
    # Not settimeout(): that makes the descriptor non-blocking, and splice needs it blocking.
    value = struct.pack("ll", int(_TIMEOUT), int(_TIMEOUT % 1 * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
