"""The two protocols between controller and agents, and between agents.

Control: frames of a 4-byte big-endian header and a body. The agent's first output is a line that starts with MARKER;
whatever a login shell printed before it is noise and is skipped. The header's top bit, bit 31, says which kind of frame
it is, the other 31 bits are the body's length in bytes:

    bit 31  body
    0       a message: a JSON object of at most FRAME_LIMIT bytes
    1       a channel's bytes: 4 bytes big-endian, the channel's number, then at most CHUNK bytes of what is relayed;
            none at all mean that nothing more comes in that direction

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
import math
import os
import struct
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

MARKER = b"KVM-CLONE-AGENT "
"""Starts the line that ends the noise; the version and the payload's hash follow it."""

NOISE_LIMIT = 256 * 1024
"""Bytes of login noise that are skipped before giving up on the marker."""

FRAME_LIMIT = 64 * 1024 * 1024
"""Bytes; a longer frame is a sign of a broken stream, not of a big message."""

CHUNK = 1024 * 1024
"""Bytes. The most content in one data record, and of a channel in one frame. One pipe buffer's worth."""

FRAME_HEADER = struct.Struct(">I")
CHANNEL_BIT = 1 << 31
_CHANNEL_NUMBER = struct.Struct(">I")
_MOST_DIGITS = 40
"""A longer number in a message is none of ours; reading very long ones takes time that grows with their square."""

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
    if (type_ in (DATA, ZERO)) != bool(length) and type_ != END:
        raise ProtocolError(f"a record of type {type_} and {length} bytes")
    if flags & ~COMPRESSED or (flags and type_ != DATA):
        raise ProtocolError(f"a record of type {type_} with the flags {flags:#x}")
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


def write_all(fd: int, data: Union[bytes, memoryview]) -> None:
    """Write every byte of `data` to `fd`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pack_frame(message: Dict[str, Any]) -> bytes:
    """A message as a frame. Raises ProtocolError when it does not fit into one: nothing has gone anywhere then."""
    try:
        body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message that cannot be sent as JSON: {error}") from error
    if len(body) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(body)} bytes, more than {FRAME_LIMIT}")
    return FRAME_HEADER.pack(len(body)) + body


class ChannelData(NamedTuple):
    """Bytes of the relayed stream that has the number `channel`; none mean that nothing more comes this way."""

    channel: int
    data: bytes


def pack_channel(channel: int, data: bytes) -> bytes:
    """A channel's bytes, at most CHUNK, as a frame. Raises ProtocolError for more, or for no channel's number."""
    if len(data) > CHUNK:
        raise ProtocolError(f"{len(data)} bytes for channel {channel} in one frame, more than {CHUNK}")
    if not 0 <= channel < 1 << 32:
        raise ProtocolError(f"there is no channel {channel}")
    length = _CHANNEL_NUMBER.size + len(data)
    return FRAME_HEADER.pack(CHANNEL_BIT | length) + _CHANNEL_NUMBER.pack(channel) + data


def frame_length(header: bytes) -> int:
    """The length of a message's body; raises ProtocolError when it cannot be one, or when it is a channel's."""
    length: int = FRAME_HEADER.unpack(header)[0]
    if length > FRAME_LIMIT:
        raise ProtocolError(f"a frame of {length} bytes, more than {FRAME_LIMIT}")
    return length


def body_length(header: bytes) -> int:
    """The length of the body of a frame of either kind; raises ProtocolError when it cannot be one."""
    word: int = FRAME_HEADER.unpack(header)[0]
    if not word & CHANNEL_BIT:
        return frame_length(header)
    length = word - CHANNEL_BIT
    if not _CHANNEL_NUMBER.size <= length <= _CHANNEL_NUMBER.size + CHUNK:
        raise ProtocolError(f"a channel's frame of {length} bytes, more than {CHUNK} or too few")
    return length


def unpack_frame(header: bytes, body: bytes) -> Union[Dict[str, Any], ChannelData]:
    """What a frame of either kind holds; `body` is as long as `body_length` says. Raises ProtocolError."""
    if FRAME_HEADER.unpack(header)[0] & CHANNEL_BIT:
        return ChannelData(_CHANNEL_NUMBER.unpack_from(body)[0], body[_CHANNEL_NUMBER.size :])
    return unpack_body(body)


def unpack_body(body: bytes) -> Dict[str, Any]:
    """The message in a frame's body; raises ProtocolError when it is not a JSON object that says one thing."""
    try:
        message = json.loads(
            body,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
            object_pairs_hook=_unambiguous,
        )
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is not a JSON object")
    return message


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    """Python's reader takes NaN, infinities and 1e999, which are no JSON and no amount of anything."""
    number = float(text[:_MOST_DIGITS])
    if len(text) > _MOST_DIGITS or not math.isfinite(number):
        raise ValueError(f"{text[:_MOST_DIGITS]} is no number")
    return number


def _unambiguous(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def read_frame(fd: int, wait: Callable[[], None] = lambda: None) -> Optional[Dict[str, Any]]:
    """The next message, or None at the stream's end. Raises EOFError when it ends within a frame, ProtocolError.

    `wait` is called before each read: it returns when there is something to be read, or raises.
    """
    header = read_exact(fd, FRAME_HEADER.size, wait)
    return unpack_body(_body(fd, frame_length(header), wait)) if header else None


def read_any(fd: int, wait: Callable[[], None] = lambda: None) -> Union[Dict[str, Any], ChannelData, None]:
    """The next message or a channel's bytes, otherwise as read_frame."""
    header = read_exact(fd, FRAME_HEADER.size, wait)
    return unpack_frame(header, _body(fd, body_length(header), wait)) if header else None


def _body(fd: int, length: int, wait: Callable[[], None]) -> bytes:
    body = read_exact(fd, length, wait)
    if len(body) != length:
        raise EOFError("the stream ended between a frame's length and its body")
    return body
