"""A stream between the controller and a daemon on this host, by channel frames over the controller's connection.

libvirt is reached by it: no forwarding has to be allowed, and the stream ends with this process. A fenced one carries
requests only while this process holds an operation's lock: a controller that wakes up after it was taken for dead finds
a dead connection, and whoever takes the lock next finds no request of it under way.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from typing import Callable, Optional, Sequence

from kvm_clone.agent.protocol.errors import MISSING, AgentError
from kvm_clone.agent.staging.hold import Hold

_DRAIN_SECONDS = 60.0
"""How long a lock is kept for libvirt's answers to what was asked under it."""

_LOOK_SECONDS = 0.02
_PART = 1 << 16
"""Bytes that are taken from the daemon at a time."""

_STUCK = struct.pack("ll", 60, 0)  # struct timeval: seconds, microseconds
"""How long the daemon may leave a request unread."""


class Relay:
    """One connection to the first of some sockets that listens."""

    def __init__(self, paths: Sequence[str], put: Callable[[bytes], None], hold: Optional[Hold] = None) -> None:
        """`put` takes what the daemon says, and nothing at its end. `hold`: what has to be held for a request to pass.

        Raises AgentError (missing) when no socket listens.
        """
        self._put = put
        self._hold = hold
        self._calls = Packets()
        self._answers = Packets()
        self._socket = _connected(paths)
        self._waiting: queue.Queue[bytes] = queue.Queue()
        self._passing = threading.Lock()
        self._closed = False
        self._ended = threading.Event()
        try:
            if hold is not None:
                hold.add_fence(self)
        except AgentError:
            self._socket.close()
            raise
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._send, daemon=True).start()

    def send(self, data: bytes) -> None:
        """Pass on what the controller says; nothing is its end. Returns at once: the daemon may be slow to take it."""
        self._waiting.put(data)

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while self._pass_on(self._waiting.get()):
                continue
        self._drain()
        self._shut()

    def _pass_on(self, data: bytes) -> bool:
        """Give the daemon the data, if that is still ours to do; whether more may follow. Raises OSError."""
        with self._passing:
            if not data or self._closed or (self._hold is not None and not self._hold.is_held):
                return False
            self._calls.feed(data)
            self._socket.sendall(data)
        return True

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_PART):
                self._answers.feed(data)
                self._put(data)
        self._ended.set()
        self._put(b"")
        self.send(b"")

    def close(self) -> None:
        """Let nothing more through, and wait until libvirt has answered what it was asked."""
        with self._passing:
            self._closed = True
        self._drain()
        self.send(b"")

    def _drain(self) -> None:
        """Wait until libvirt has answered: it finishes what it was asked when its client goes away."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._calls.calls > self._answers.replies and not self._ended.is_set() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._ended.wait()
        self._socket.close()


def _connected(paths: Sequence[str]) -> socket.socket:
    failures = []
    for path in paths:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _STUCK)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            failures.append(f"{path}: {error.strerror}")
        else:
            return connection
    raise AgentError(MISSING, f"libvirt does not listen: {', '.join(failures)}")


class Packets:
    """Counts the calls and replies in a stream of libvirt's RPC (https://libvirt.org/kbase/internals/rpc.html).

    A packet is its whole length and six more words, big-endian, of which the fourth is its type, and content.
    """

    _HEADER = struct.Struct(">7I")  # length, program, version, procedure, type, serial, status
    _CALLS, _REPLIES = (0, 4), (1, 5)  # VIR_NET_CALL and VIR_NET_REPLY, each without and with file descriptors

    def __init__(self) -> None:
        self.calls = 0
        self.replies = 0
        self._head = b""
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._HEADER.size - len(self._head), len(data) - at)
                self._head += data[at : at + step]
                if len(self._head) == self._HEADER.size:
                    self._begin()
            at += step

    def _begin(self) -> None:
        length, _, _, _, kind, _, _ = self._HEADER.unpack(self._head)
        self._head = b""
        self._skip = max(0, length - self._HEADER.size)
        self.calls += kind in self._CALLS
        self.replies += kind in self._REPLIES
