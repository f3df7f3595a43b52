"""The two protocols between controller and agents, and between agents.

Control: frames of a 4-byte big-endian length and that many bytes of JSON. Where the length's top bit is set, its other
bits count a channel's 4-byte big-endian number and the bytes that it carries, none at its end. The agent's first output
is a line that starts with MARKER; whatever a login shell printed before it is noise and is skipped.

Data: a one-way stream of records, each with this header, big-endian:

    offset  size  field
    0       4     magic, 0x4B564D43 ("KVMC")
    4       1     type: 1 data, 2 zero, 3 disk end, 4 end, 5 idle
    5       1     flags: bit 0, the range is compressed at the source
    6       2     disk, its index in the request
    8       8     offset in the disk, bytes
    16      8     length in bytes; for the end record, the sum of all data lengths

A data record is followed by `length` bytes of content; the others are headers alone.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any, Callable, Dict, NamedTuple, Optional, Union

MARKER = b"KVM-CLONE-AGENT "
"""Starts the line that ends the noise; the version and the payload's hash follow it."""

NOISE_LIMIT = 256 * 1024
"""Bytes of login noise that are skipped before giving up on the marker."""

FRAME_LIMIT = 64 * 1024 * 1024
"""Bytes; a longer frame is a sign of a broken stream, not of a big message."""

CHUNK = 1024 * 1024
"""Bytes. The most content in one data record. One pipe buffer's worth."""

FRAME_HEADER = struct.Struct(">I")
RECORD_HEADER = struct.Struct(">IBBHQQ")
RECORD_MAGIC = 0x4B564D43

DATA, ZERO, DISK_END, END, IDLE = 1, 2, 3, 4, 5
COMPRESSED = 1


class ProtocolError(Exception):
    """The other side sent something that is not the protocol."""


class Record(NamedTuple):
    """The header of one record of the data stream. `offset` and `length` are in bytes."""

    type: int
    disk: int
    offset: int
    length: int
    flags: int = 0

    def pack(self) -> bytes:
        """The header as it goes over the wire."""
        return RECORD_HEADER.pack(RECORD_MAGIC, self.type, self.flags, self.disk, self.offset, self.length)


def unpack_record(header: bytes) -> Record:
    """The record of a header; raises ProtocolError when it is none."""
    magic, type_, flags, disk, offset, length = RECORD_HEADER.unpack(header)
    if magic != RECORD_MAGIC or not DATA <= type_ <= IDLE:
        raise ProtocolError(f"not a record of the data stream: {header.hex()}")
    if type_ == DATA and length > CHUNK:
        raise ProtocolError(f"a data record of {length} bytes, more than {CHUNK}")
    return Record(type_, disk, offset, length, flags)


def read_exact(fd: int, count: int, wait: Callable[[], None] = lambda: None) -> bytes:
    """`count` bytes from `fd`. Empty when the stream ends before the first; raises EOFError when it ends within.

    `wait` is called before each read.
    """
    parts = []
    missing = count
    while missing:
        wait()
        part = os.read(fd, min(missing, CHUNK))
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    if missing and missing != count:
        raise EOFError(f"the stream ended {missing} bytes before the end of a {count}-byte item")
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte of `data` to `fd`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pack_frame(message: Dict[str, Any]) -> bytes:
    """A control frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return FRAME_HEADER.pack(len(body)) + body


class ChannelData(NamedTuple):
    """Bytes of a relayed stream; none at its end."""

    channel: int
    data: bytes


def pack_channel(channel: int, data: bytes) -> bytes:
    """A frame with at most CHUNK bytes of a channel. Raises ProtocolError for more."""
    if len(data) > CHUNK:
        raise ProtocolError(f"{len(data)} bytes for a channel, more than {CHUNK}")
    return FRAME_HEADER.pack(_CHANNEL_BIT | FRAME_HEADER.size + len(data)) + FRAME_HEADER.pack(channel) + data


def is_channel(header: bytes) -> bool:
    """Whether the frame that begins so carries bytes of a channel."""
    return bool(FRAME_HEADER.unpack(header)[0] & _CHANNEL_BIT)


def unpack_channel(body: bytes) -> ChannelData:
    """The bytes of a channel in a frame's body; raises ProtocolError when it has no number."""
    if len(body) < FRAME_HEADER.size:
        raise ProtocolError("a channel's frame without its number")
    return ChannelData(FRAME_HEADER.unpack(body[: FRAME_HEADER.size])[0], body[FRAME_HEADER.size :])


_CHANNEL_BIT = 1 << 31


def frame_length(header: bytes) -> int:
    """The length of the frame's body; raises ProtocolError when it cannot be one."""
    length: int = FRAME_HEADER.unpack(header)[0] & ~_CHANNEL_BIT
    if length > FRAME_LIMIT:
        raise ProtocolError(f"a frame of {length} bytes, more than {FRAME_LIMIT}")
    return length


def unpack_body(body: bytes) -> Dict[str, Any]:
    """The message in a frame's body; raises ProtocolError when it is not a JSON object."""
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ProtocolError(f"a frame that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return message


def read_frame(fd: int) -> Optional[Dict[str, Any]]:
    """The next message, or None at the end of the stream. Raises EOFError, ProtocolError as `read_any` does."""
    found = read_any(fd)
    if isinstance(found, ChannelData):
        raise ProtocolError("bytes of a channel where a message was expected")
    return found


def read_any(fd: int) -> Union[Dict[str, Any], ChannelData, None]:
    """The next frame, or None at the end of the stream. Raises EOFError when it ends within one, ProtocolError."""
    header = read_exact(fd, FRAME_HEADER.size)
    if not header:
        return None
    length = frame_length(header)
    body = read_exact(fd, length)
    if len(body) != length:
        raise EOFError("the stream ended between a frame's length and its body")
    return unpack_channel(body) if is_channel(header) else unpack_body(body)
