"""The callback that hears of an operation's events, kept from breaking what calls it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from kvm_clone.errors import KvmCloneError
from kvm_clone.progress import Event, OnEvent

log = logging.getLogger(__name__)


class WatcherError(KvmCloneError):
    """The callback that was given for an operation's events raised; the operation was interrupted for it."""


class Watcher:
    """Passes events on until the callback raises, which then interrupts the task that this was made in.

    Events come from many places, few of which could end cleanly with somebody else's exception.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._task = asyncio.current_task()
        self.error: Exception | None = None

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        if self.error is not None:
            return
        try:
            self._on_event(event)
        except Exception as error:
            log.debug("the callback raised", exc_info=error)
            self.error = error
            if self._task is not None:
                self._task.cancel()


@contextlib.asynccontextmanager
async def watched(on_event: OnEvent) -> AsyncIterator[Watcher]:
    """The callback for the block's events. Raises WatcherError when it has raised and the block was interrupted.

    A block that was done all the same stays done.
    """
    watcher = Watcher(on_event)
    task = asyncio.current_task()
    try:
        yield watcher
    except asyncio.CancelledError:
        if watcher.error is None:
            raise
        assert task is not None
        task.uncancel()
        raise WatcherError(
            f"the operation was interrupted: its on_event callback raised {watcher.error!r}",
            remedy="mend the callback; what was copied is kept for another run, unless that was declined",
        ) from watcher.error
    if watcher.error is not None:
        log.warning("the on_event callback raised %r", watcher.error)
        with contextlib.suppress(asyncio.CancelledError):  # what the callback has caused, and nothing waits for
            await asyncio.sleep(0)
        assert task is not None
        task.uncancel()
