"""Waiting for a lock at a host that another process may hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kvm_clone.errors import LockedError

LOCK_PATIENCE_SECONDS = 75.0
"""How long we wait for agents of ours that were cut off to release their locks: longer than a receiver's patience."""

_Answer = TypeVar("_Answer")


async def once_free(call: Callable[[], Awaitable[_Answer]], *, patience: float) -> _Answer:
    """Make a call, again and again for `patience` seconds while another process holds the operation's lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await call()
        except LockedError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(1.0)
