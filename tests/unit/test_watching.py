"""A callback that raises interrupts the operation once, and breaks nothing else."""

from __future__ import annotations

import asyncio

import pytest

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution.watching import Watcher, WatcherError, watched
from kvm_clone.progress import Event, Note


def refuses(event: Event) -> None:
    raise ZeroDivisionError("mine")


async def operate(hear: Watcher, *, to_its_end: bool = False) -> str:
    """An operation whose event is heard by another task, as a reader of answers would."""

    async def reader() -> None:
        hear(Note("first"))
        hear(Note("second"))

    await asyncio.create_task(reader())
    if to_its_end:
        return "done"
    await asyncio.sleep(30)
    return "too late"


def test_an_operation_is_interrupted_by_a_callback_that_raises() -> None:
    cleaned: list[bool] = []

    async def run() -> None:
        async with watched(refuses) as hear:
            try:
                await operate(hear)
            finally:
                await asyncio.sleep(0)  # what an interruption has to undo is not interrupted again
                cleaned.append(True)

    async def outer() -> None:
        with pytest.raises(WatcherError) as caught:
            await run()
        assert isinstance(caught.value, KvmCloneError)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        await asyncio.sleep(0)  # the task goes on: it was not cancelled for good
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(outer())
    assert cleaned == [True]


def test_what_was_done_all_the_same_stays_done(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        async with watched(refuses) as hear:
            hear(Note("the last event"))
            done = "done"
        await asyncio.sleep(0)
        return done

    assert asyncio.run(run()) == "done"
    assert "ZeroDivisionError" in caplog.text


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def run() -> None:
        async with watched(lambda event: None) as hear:
            await operate(hear)

    async def outer() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(outer())


def test_events_are_passed_on() -> None:
    heard: list[Event] = []

    async def run() -> None:
        async with watched(heard.append) as hear:
            await operate(hear, to_its_end=True)

    asyncio.run(run())
    assert heard == [Note("first"), Note("second")]
