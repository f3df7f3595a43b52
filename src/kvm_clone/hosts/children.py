"""Child processes: begun, ended and awaited, whatever is cancelled meanwhile.

A cancellation that comes while a child is being started or ended, by a second failure or a time limit, must not leave
it behind. Whoever starts a child with `spawn` has to end it by one of the functions here, or to await its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

from kvm_clone.gather import undisturbed

Process = asyncio.subprocess.Process

_PATIENCE_SECONDS = 5.0
_STOP_SECONDS = 1.0
_PIPES_SECONDS = 1.0


def deaf(argv: Sequence[str]) -> list[str]:
    """The command, ignoring Ctrl-C: a terminal sends it to our children as well, and we need them to roll back."""
    return ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *argv]


async def spawn(*argv: str, **options: Any) -> Process:
    """Start a child, as asyncio.create_subprocess_exec does; cancelled meanwhile, none is left."""
    begun: list[Process] = []

    async def begin() -> None:
        begun.append(await asyncio.create_subprocess_exec(*argv, **options))

    try:
        await undisturbed(begin())
    except asyncio.CancelledError:
        for process in begun:
            await kill_process(process)
        raise
    return begun[0]


async def answer(argv: list[str]) -> tuple[int | None, bytes, bytes]:
    """The status of a command that ends soon, and what it writes to stdout and stderr."""
    pipe = asyncio.subprocess.PIPE
    process = await spawn(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        await kill_process(process)
        raise
    return process.returncode, out, err


async def end_process(process: Process, patience: float = _PATIENCE_SECONDS) -> None:
    """Close a child's input, which ends an agent, and kill it if it does not end, or if there is no time for that.

    What it writes to stdout is read and dropped meanwhile: nobody else may read it.
    """
    if process.stdin is not None:
        process.stdin.close()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await _at_end(process)
    finally:
        await undisturbed(_ended(process))


async def stop_process(process: Process) -> None:
    """Ask a child to end, which lets ssh give back a terminal that it asks a passphrase of; then kill it."""
    _send(process, signal.SIGTERM)
    try:
        await end_process(process, _STOP_SECONDS)
    finally:
        await kill_process(process)


async def kill_process(*processes: Process) -> None:
    """Kill children that have not ended, await their end, and close their pipes."""
    await undisturbed(_killed(processes))


async def _killed(processes: tuple[Process, ...]) -> None:
    for process in processes:
        _send(process, signal.SIGKILL)
    for process in processes:
        _close_pipes(process)
        await _ended(process)


async def _at_end(process: Process) -> None:
    """Wait for a child's end. asyncio waits for that of its output too, which ends when all of it is read."""
    dropping = asyncio.ensure_future(_drop(process.stdout)) if process.stdout is not None else None
    try:
        await process.wait()
    finally:
        if dropping is not None:
            dropping.cancel()
            await asyncio.gather(dropping, return_exceptions=True)


async def _drop(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


async def _ended(process: Process) -> None:
    """Kill a child that has not ended, and await its end, which to asyncio is also that of its pipes."""
    _send(process, signal.SIGKILL)
    try:
        async with asyncio.timeout(_PIPES_SECONDS):
            await process.wait()
    except TimeoutError:  # a process that it has started holds them open
        _close_pipes(process)
        await process.wait()
    await _forget_input(process)


def _close_pipes(process: Process) -> None:
    transport: asyncio.SubprocessTransport = process._transport  # type: ignore[attr-defined] # there is no other way
    for descriptor in range(3):
        pipe = transport.get_pipe_transport(descriptor)
        if pipe is not None:
            pipe.close()


def _send(process: Process, number: signal.Signals) -> None:
    """Send a signal. Not by its own method: that reaps a child that has just ended, behind asyncio's back."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


async def _forget_input(process: Process) -> None:
    """What an ended child has not read is no news: without this asyncio complains of it on stderr."""
    if process.stdin is not None:
        if process.stdin.transport.get_write_buffer_size():  # one of the child's own may hold the other end for ever
            process.stdin.transport.abort()
        process.stdin.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await process.stdin.wait_closed()
