"""Frames: what fits, what is refused before a byte is written, and what arrives that is none."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.agent.protocol.wire import (
    CHUNK,
    FRAME_LIMIT,
    ChannelData,
    ProtocolError,
    body_length,
    frame_length,
    pack_channel,
    pack_frame,
    read_any,
    read_frame,
    unpack_body,
    unpack_frame,
)

from .tools import arriving

pytestmark = pytest.mark.timeout(30)

NESTED = b"[" * 100_000

NOT_MESSAGES = {
    "nothing": b"",
    "nested deep": NESTED,
    "nested deep, to its end": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "NaN": b'{"a":NaN}',
    "infinity": b'{"a":Infinity}',
    "minus infinity": b'{"a":[-Infinity]}',
    "a float beyond any": b'{"a":1e999}',
    "a float without end": b'{"a":1.' + b"0" * 1000 + b"}",
    "a key twice": b'{"a":1,"a":2}',
    "a key twice, deeper": b'{"b":[{"a":1,"a":1}]}',
    "a huge integer": b'{"a":' + b"9" * 5_000_000 + b"}",
    "a huge negative integer": b'{"a":-' + b"9" * 41 + b"}",
    "half a string": b'{"a":"',
    "not UTF-8": b'{"a":"\xff"}',
    "a list": b"[1]",
    "a number": b"1",
    "two objects": b"{}{}",
    "a control character": b'{"a":"\x01"}',
}


@pytest.mark.parametrize("name", NOT_MESSAGES)
def test_what_is_not_a_message(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ProtocolError, match="a frame that is not") as caught:
        unpack_body(NOT_MESSAGES[name])
    assert len(str(caught.value)) < 300
    assert time.monotonic() - begun < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_every_message_of_ours_arrives_as_it_was(message: dict[str, Any]) -> None:
    frame = pack_frame(message)
    assert unpack_body(frame[4:]) == message
    assert unpack_frame(frame[:4], frame[4:]) == message
    assert frame_length(frame[:4]) == body_length(frame[:4]) == len(frame) - 4


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    try:
        assert isinstance(unpack_body(body), dict)
    except ProtocolError:
        return


def nested(depth: int) -> dict[str, Any]:
    message: dict[str, Any] = {}
    for _ in range(depth):
        message = {"a": message}
    return message


UNSENDABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "a byte too many": lambda: {"a": "x" * (FRAME_LIMIT - len('{"a":""}') + 1)},
    "NaN": lambda: {"a": float("nan")},
    "infinity": lambda: {"a": [float("inf")]},
    "nested deep": lambda: nested(100_000),
}


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_does_not_fit_is_refused_by_who_sends_it(name: str) -> None:
    with pytest.raises(ProtocolError, match="a message"):
        pack_frame(UNSENDABLE[name]())


def test_the_largest_message() -> None:
    frame = pack_frame({"a": "x" * (FRAME_LIMIT - len('{"a":""}'))})
    assert frame_length(frame[:4]) == FRAME_LIMIT == len(frame) - 4


@pytest.mark.parametrize("length", [FRAME_LIMIT + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_length_that_cannot_be(length: int) -> None:
    with pytest.raises(ProtocolError, match="a frame of"):
        frame_length(struct.pack(">I", length))
    with arriving(struct.pack(">I", length), then_silence=True) as source, pytest.raises(ProtocolError):
        read_frame(source)


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=64))
def test_a_channels_bytes_arrive_as_they_were(channel: int, data: bytes) -> None:
    frame = pack_channel(channel, data)
    assert struct.unpack(">II", frame[:8]) == ((1 << 31) + 4 + len(data), channel)
    assert body_length(frame[:4]) == len(frame) - 4
    assert unpack_frame(frame[:4], frame[4:]) == ChannelData(channel, data)
    with pytest.raises(ProtocolError):
        frame_length(frame[:4])


def test_a_chunk_is_the_most_of_a_channel_in_one_frame() -> None:
    frame = pack_channel(7, bytes(CHUNK))
    assert unpack_frame(frame[:4], frame[4:]) == ChannelData(7, bytes(CHUNK))
    with pytest.raises(ProtocolError, match="more than"):
        pack_channel(7, bytes(CHUNK + 1))
    for channel in (-1, 1 << 32):
        with pytest.raises(ProtocolError, match="no channel"):
            pack_channel(channel, b"")


@pytest.mark.parametrize("length", [0, 1, 3, CHUNK + 5, (1 << 31) - 1])
def test_a_channels_length_that_cannot_be(length: int) -> None:
    with pytest.raises(ProtocolError, match="a channel's frame"):
        body_length(struct.pack(">I", 1 << 31 | length))


def test_messages_and_channels_in_one_stream() -> None:
    items: list[dict[str, Any] | ChannelData] = [
        {"a": 1},
        ChannelData(0, b"x"),
        ChannelData((1 << 32) - 1, b""),
        {},
        ChannelData(3, bytes(CHUNK)),
    ]
    content = b"".join(pack_channel(*item) if isinstance(item, ChannelData) else pack_frame(item) for item in items)
    with arriving(content) as source:
        assert [read_any(source) for _ in items] == items
        assert read_any(source) is None


def test_a_channels_bytes_where_only_messages_are_due() -> None:
    with arriving(pack_channel(1, b"x")) as source, pytest.raises(ProtocolError):
        read_frame(source)


@pytest.mark.parametrize("frame", [pack_frame({"a": "b"}), pack_channel(2, b"content")], ids=["message", "channel"])
def test_a_frame_that_is_cut_off(frame: bytes) -> None:
    for cut in range(len(frame)):
        with arriving(frame[:cut]) as source:
            if cut == 0:
                assert read_any(source) is None
            else:
                with pytest.raises(EOFError):
                    read_any(source)


def test_the_reader_takes_its_own_frame_alone() -> None:
    source, out = os.pipe()
    os.write(out, pack_frame({"a": 1}) + b"rest")
    os.close(out)
    assert read_any(source) == {"a": 1}
    assert os.read(source, 10) == b"rest"
    os.close(source)
