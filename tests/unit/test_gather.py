"""tasks.py: order, concurrency, and what becomes of the rest when one fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvm_clone.gather import together, undisturbed


async def value(what: Any, after: asyncio.Event | None = None) -> Any:
    if after is not None:
        await after.wait()
    return what


async def fail(error: BaseException, after: asyncio.Event | None = None) -> None:
    await value(None, after)
    raise error


class Witness:
    """Work that never ends by itself, and takes a moment to stop."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.stopped = False

    async def work(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.stopped = True


def test_results_are_in_order() -> None:
    async def main() -> list[Any]:
        first_may_end = asyncio.Event()

        async def second() -> str:
            first_may_end.set()
            return "second"

        return await together(value("first", first_may_end), second(), value(None))

    assert asyncio.run(main()) == ["first", "second", None]


def test_nothing_to_do() -> None:
    assert asyncio.run(together()) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), asyncio.CancelledError()])
def test_the_first_failure_stops_the_rest_and_is_raised_itself(error: BaseException) -> None:
    async def main() -> None:
        witness = Witness()
        with pytest.raises(type(error)) as caught:
            await together(witness.work(), fail(error, witness.started))
        assert witness.stopped
        if isinstance(error, Exception):
            assert caught.value is error
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_of_two_failures_the_earlier_is_raised() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="earlier"):
            await together(fail(ValueError("earlier")), fail(ValueError("later")))

    asyncio.run(main())


def test_a_failure_while_stopping_does_not_hide_the_cause() -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def stubborn() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise OSError("while stopping")

        with pytest.raises(ValueError, match="the cause"):
            await together(stubborn(), fail(ValueError("the cause"), started))

    asyncio.run(main())


def test_cancelling_stops_all() -> None:
    async def main() -> None:
        one, two = Witness(), Witness()
        task = asyncio.ensure_future(together(one.work(), two.work()))
        await one.started.wait()
        await two.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (one.stopped, two.stopped) == (True, True)

    asyncio.run(main())


class Tidying:
    """Work that takes a few rounds to stop, and counts how often it is told to."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.told = 0
        self.stopped = False

    async def work(self) -> None:
        self.started.set()
        rounds = 5
        while rounds:
            try:
                await asyncio.sleep(0.01 if self.told else 100)
                rounds -= 1
            except asyncio.CancelledError:
                self.told += 1
        self.stopped = True
        raise asyncio.CancelledError


@pytest.mark.parametrize("cause", ["cancelled", "failed"])
def test_what_is_stopped_is_told_once(cause: str) -> None:
    """Told again, it would be disturbed in tidying up; the quick one must not hide that the other still does."""

    async def main() -> None:
        one, quick, may_fail = Tidying(), Witness(), asyncio.Event()
        task = asyncio.ensure_future(together(one.work(), quick.work(), fail(ValueError("x"), may_fail)))
        await one.started.wait()
        if cause == "cancelled":
            task.cancel()
        else:
            may_fail.set()
        await asyncio.wait([task])
        assert (one.told, one.stopped, quick.stopped) == (1, True, True)

    asyncio.run(main())


def test_stopping_is_not_disturbed_by_a_second_cancellation() -> None:
    async def main() -> None:
        one, quick = Tidying(), Witness()
        task = asyncio.ensure_future(together(one.work(), quick.work()))
        await one.started.wait()
        task.cancel()
        while not quick.stopped:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (one.told, one.stopped) == (1, True)

    asyncio.run(main())


async def slow(result: Any) -> Any:
    await asyncio.sleep(0.05)
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("result", ["done", ValueError("x")])
def test_what_is_not_disturbed_comes_to_its_end(times: int, result: Any) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def work() -> Any:
            try:
                return await slow(result)
            finally:
                ended.set()

        task = asyncio.ensure_future(undisturbed(work()))
        for _ in range(times):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert ended.is_set()
        assert task.cancelled() is (times > 0)
        if not times:
            assert task.exception() is result if isinstance(result, Exception) else task.result() == result

    asyncio.run(main())


def test_what_cancels_itself_is_cancelled() -> None:
    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await undisturbed(slow(asyncio.CancelledError()))

    asyncio.run(main())
