"""Running several things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Await everything at once, results in order. The first failure cancels the rest, waits for it, and is raised.

    asyncio.gather leaves the rest running; asyncio.TaskGroup raises a group instead of the failure.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            if not task.cancelling():  # gather has told them; once more would disturb them in tidying up
                task.cancel()
        await undisturbed(_settled(tasks))
        raise


async def _settled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def undisturbed(work: Coroutine[Any, Any, Result]) -> Result:
    """Await work to its end, which must be near. A cancellation that comes meanwhile is raised after that."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # nobody else asks for it
    raise cancelled
