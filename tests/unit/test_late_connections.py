"""A libvirt connection that is still being opened when its operation is cancelled is closed all the same."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvm_clone.errors import TransferError
from kvm_clone.hosts import connections, domains


class Opening:
    """What opens libvirt: it has begun, it may go on, and what it gave was closed."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.begun, self.may_end, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.failure = failure

    def connect(self, uri: str, name: str) -> Any:
        self.begun.set()
        assert self.may_end.wait(10)
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(close=self.closed.set)


async def uri(**how: object) -> str:
    return "test:///default"


HOST: Any = SimpleNamespace(name="kc-b", libvirt_uri=uri)


@pytest.mark.parametrize("failure", [None, TransferError("no libvirt")])
def test_what_is_opened_too_late_is_closed(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = Opening(failure)
    monkeypatch.setattr(domains, "connect", opening.connect)

    async def cancelled() -> None:
        task = asyncio.create_task(connections.open_fenced(HOST))
        await asyncio.to_thread(opening.begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        opening.may_end.set()
        assert await asyncio.to_thread(opening.closed.wait, 10 if failure is None else 0.2) is (failure is None)

    asyncio.run(cancelled())


def test_what_is_opened_in_time_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    opening = Opening()
    opening.may_end.set()
    monkeypatch.setattr(domains, "connect", opening.connect)

    async def given() -> None:
        fenced = await connections.open_fenced(HOST)
        assert not opening.closed.is_set()
        await fenced.close()

    asyncio.run(given())
    assert opening.closed.is_set()
