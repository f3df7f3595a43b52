"""A cable with a delay, for kernels without netem: holds every frame between a switch's port and its bridge.

Started in the switch's network namespace as `python3 -I delay.py PORT TAP SECONDS`. It makes the interface
TAP, prints a line, and reads one, which tells that TAP is at the bridge in place of PORT. Then it passes
frames between the two until PORT is removed or it is killed; TAP goes with it.

Frames travel with the kernel's own header for offloads (virtio_net_hdr). So one that is still to be cut to
the MTU, or still to get its checksum, leaves as it came, which is also how netem would hold it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
# Checksums, and TCP over IPv4 and IPv6 with and without ECN, may be left undone in what TAP gives.
OFFLOADS = 0x01 | 0x02 | 0x04 | 0x08
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
ETH_P_ALL = 0x0003

FRAME_BYTES = 10 + 18 + (64 << 10)
# What one direction may hold: 25 ms at 10 Gbit/s, and 500 ms at 1 Gbit/s. More is dropped.
HELD_BYTES = 64 << 20
# What a frame costs beside its bytes: many small ones must not take much more memory than that either.
FRAME_COST = 256
# Frames read at once, before those that are due leave.
BATCH = 32


class Direction:
    """One of the cable's two directions."""

    def __init__(self, source: int, sink: int, seconds: float) -> None:
        self.source = source
        self.sink = sink
        self.seconds = seconds
        self.held = 0
        self.queue: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Read what has arrived; a full queue drops it, as a link's would."""
        for _ in range(BATCH):
            try:
                frame = os.read(self.source, FRAME_BYTES)
            except BlockingIOError:
                return
            cost = len(frame) + FRAME_COST
            if self.held + cost <= HELD_BYTES:
                self.held += cost
                self.queue.append((time.monotonic() + self.seconds, frame))

    def give(self, now: float) -> None:
        """Write what is due."""
        queue = self.queue
        while queue and queue[0][0] <= now:
            frame = queue.popleft()[1]
            self.held -= len(frame) + FRAME_COST
            try:
                os.write(self.sink, frame)
            except OSError:
                # The interface is down, or its queue full: the frame is lost, as on any link.
                continue

    def next(self) -> float:
        """Tell when the first frame is due."""
        return self.queue[0][0] if self.queue else float("inf")


def main(port: str, tap: str, seconds: float) -> None:
    """Make the cable's ends, and pass frames once the caller has plugged them in."""
    bridge_side = open_tap(tap)
    host_side = open_port()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    # From here on it gets frames: any earlier, they would reach the bridge twice.
    host_side.bind((port, ETH_P_ALL))
    index = socket.if_nametoindex(port)
    directions = (
        Direction(host_side.fileno(), bridge_side, seconds),
        Direction(bridge_side, host_side.fileno(), seconds),
    )
    while True:
        try:
            forward(directions)
        except OSError as error:
            if not is_passing(error, port, index):
                return


def open_tap(name: str) -> int:
    """Make the interface; it is there for as long as the descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tap, TUNSETOFFLOAD, OFFLOADS)
    return tap


def open_port() -> socket.socket:
    """Make a socket for raw frames, bound to no interface yet."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setblocking(False)
    raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, HELD_BYTES)
    # More than a rate limit on the port queues, so that it is that limit which drops.
    raw.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 * HELD_BYTES)
    return raw


def forward(directions: tuple[Direction, Direction]) -> None:
    """Pass frames until one cannot be read."""
    by_source = {direction.source: direction for direction in directions}
    sources = list(by_source)
    while True:
        now = time.monotonic()
        for direction in directions:
            direction.give(now)
        due = min(direction.next() for direction in directions)
        wait = None if due == float("inf") else max(0.0, due - time.monotonic())
        # Not poll, which counts in milliseconds.
        for source in select.select(sources, (), (), wait)[0]:
            by_source[source].take()


def is_passing(error: OSError, port: str, index: int) -> bool:
    """Tell whether reading goes on after the error, which it does for a port that is only down."""
    if error.errno == errno.EINVAL:
        # A frame with an offload that the header cannot tell, which is lost.
        return True
    try:
        return error.errno == errno.ENETDOWN and socket.if_nametoindex(port) == index
    except OSError:
        return False


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    except OSError as failure:
        sys.exit(str(failure))
