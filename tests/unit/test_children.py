"""Child processes: none is left, and asyncio knows the end of each, whenever something is cancelled."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvm_clone
from kvm_clone import Client, SshOptions
from kvm_clone.errors import KvmCloneError
from kvm_clone.hosts import ssh
from kvm_clone.hosts.children import Process, answer, deaf, end_process, kill_process, spawn, stop_process
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.survey import find_route
from kvm_clone.options import CloneOptions, Route, TransferOptions
from kvm_clone.transfer import transport
from kvm_clone.transfer.content import Content, PreparedStream

pytestmark = pytest.mark.sampled

SLEEP = ("sleep", "1000")


@pytest.fixture(autouse=True)
def _asyncio_knows_every_child(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """It says so if another has awaited one of its children."""
    with caplog.at_level(logging.WARNING, "asyncio"):
        yield
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture
def run(children: Callable[[], Any]) -> Run:
    """Runs something, and looks for children before asyncio tidies up behind it."""

    def run(main: Callable[[], Awaitable[Any]]) -> Any:
        async def watched() -> Any:
            before = set(children())
            result = await main()
            assert set(children()) == before
            return result

        return asyncio.run(watched())

    return run


async def cancelled(work: Callable[[], Awaitable[Any]], *, steps: int, times: int = 1) -> bool:
    """Begin it, let the loop go round so many times, and cancel it; whether it was cancelled."""
    task = asyncio.ensure_future(work())
    for _ in range(times):
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


async def started(*argv: str, **options: Any) -> Process:
    return await spawn(*argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, **options)


@pytest.mark.parametrize("argv", [SLEEP, ("true",)])
@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_it_is_started(argv: tuple[str, ...], times: int, run: Run) -> None:
    async def main() -> None:
        for steps in range(12):
            task_done: list[Process] = []

            async def work(done: list[Process] = task_done) -> None:
                done.append(await started(*argv))

            if not await cancelled(work, steps=steps, times=times):
                await kill_process(*task_done)

    run(main)


def test_what_cannot_be_started(run: Run) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await spawn("/nonexistent")

    run(main)


ENDINGS: dict[str, Callable[[Process], Awaitable[None]]] = {
    "end": end_process,
    "stop": stop_process,
    "kill": kill_process,
}


@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_cancelled_while_it_is_ended(how: str, times: int, run: Run) -> None:
    async def main() -> None:
        for steps in (1, 2, 3, 5):
            process = await started("sh", "-c", "trap '' TERM; echo ready; exec sleep 1000")
            assert process.stdout is not None
            await process.stdout.readline()
            began = time.monotonic()
            await cancelled(lambda child=process: ENDINGS[how](child), steps=steps, times=times)  # type: ignore[misc]
            assert time.monotonic() - began < 4
            assert process.returncode == -signal.SIGKILL
            await kill_process(process)

    run(main)


def test_cancelled_while_several_are_killed(run: Run) -> None:
    async def main() -> None:
        processes = [await started(*SLEEP) for _ in range(4)]
        assert await cancelled(lambda: kill_process(*processes), steps=1)
        assert {process.returncode for process in processes} == {-signal.SIGKILL}

    run(main)


@pytest.mark.parametrize("how", ENDINGS)
def test_one_that_has_just_ended_is_left_to_asyncio(how: str, run: Run) -> None:
    """Its own methods for a signal would await it, and asyncio would not know how it ended."""

    async def main() -> None:
        process = await started("sh", "-c", "exit 7")
        time.sleep(0.2)
        await ENDINGS[how](process)
        assert process.returncode == 7
        await kill_process(process)

    run(main)


@pytest.mark.parametrize("how", ["end", "stop"])
def test_one_that_ends_by_itself_may(how: str, tmp_path: Path, run: Run) -> None:
    said = tmp_path / "said"
    script = f"trap 'echo told > {said}; exit 3' TERM; echo ready; read line || echo end >> {said}; exit 3"

    async def main() -> None:
        process = await started("sh", "-c", script)
        assert process.stdout is not None
        await process.stdout.readline()
        await ENDINGS[how](process)
        assert process.returncode == 3
        await kill_process(process)

    run(main)
    assert said.read_text() == ("end\n" if how == "end" else "told\n")


@pytest.mark.parametrize("times", [1, 2])
def test_cancelled_while_it_answers(times: int, run: Run) -> None:
    async def main() -> None:
        for steps in (1, 5, 10, 20, 50):
            assert await cancelled(lambda: answer(["sh", "-c", "sleep 5 & exec sleep 1000"]), steps=steps, times=times)

    run(main)


@pytest.mark.parametrize("how", ENDINGS)
def test_a_process_of_its_own_may_hold_its_pipes(how: str, run: Run) -> None:
    async def main() -> None:
        process = await started("sh", "-c", "sleep 15 & echo $!; exec sleep 1000")
        assert process.stdout is not None
        grandchild = int(await process.stdout.readline())
        began = time.monotonic()
        if how == "end":
            await end_process(process, 0.1)
        else:
            await ENDINGS[how](process)
        assert time.monotonic() - began < 5
        assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM)
        os.kill(grandchild, signal.SIGKILL)
        await kill_process(process)

    run(main)


@pytest.mark.parametrize("how", ENDINGS)
def test_a_process_of_its_own_may_hold_an_input_that_is_full(how: str, run: Run) -> None:
    async def main() -> None:
        process = await started("sh", "-c", "exec 3<&0; sleep 1000 & echo $!; exec sleep 1000")
        assert process.stdout is not None
        assert process.stdin is not None
        grandchild = int(await process.stdout.readline())
        process.stdin.write(bytes(1 << 20))
        try:
            await (end_process(process, 0.1) if how == "end" else ENDINGS[how](process))
            await kill_process(process)
            assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM)
        finally:
            os.kill(grandchild, signal.SIGKILL)

    run(main)


def test_an_answer(run: Run) -> None:
    assert run(lambda: answer(["sh", "-c", "echo out; echo err >&2; exit 3"])) == (3, b"out\n", b"err\n")


def test_children_do_not_hear_ctrl_c(run: Run) -> None:
    async def main() -> None:
        process = await started(*deaf(["sh", "-c", "echo ready; read line; exit 5"]))
        assert process.stdout is not None
        await process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        await end_process(process)
        assert process.returncode == 5
        await kill_process(process)

    run(main)


def test_nothing_of_ours_runs_between_fork_and_exec() -> None:
    """In a process with threads it may wait for ever for a lock that another thread held."""
    package = Path(next(iter(kvm_clone.__path__)))
    found = [
        f"{file.relative_to(package)}:{node.lineno}"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.keyword | ast.arg) and node.arg == "preexec_fn")
        or (isinstance(node, ast.Constant) and node.value == "preexec_fn")
        or (isinstance(node, ast.Attribute) and node.attr in ("fork", "forkpty"))
    ]
    assert found == []


@pytest.fixture
def addresses() -> Iterator[dict[str, str]]:
    """Hosts that refuse, that take a connection and say nothing, and that are this machine."""
    with socket.socket() as refusing, socket.create_server(("127.0.0.1", 0)) as silent:
        refusing.bind(("127.0.0.1", 0))
        yield {
            "refuses": f"ssh://root@127.0.0.1:{refusing.getsockname()[1]}",
            "is silent": f"ssh://root@127.0.0.1:{silent.getsockname()[1]}",
            "is here": "localhost",
        }


MOMENTS = [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]


async def stopped_at(moment: float, work: Callable[[], Awaitable[Any]]) -> None:
    """Cancel it, as a time limit, a signal and the failure of what is beside it would, and as often as can be."""
    task = asyncio.ensure_future(work())
    await asyncio.wait([task], timeout=moment)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    if not task.cancelled():
        assert isinstance(task.exception(), KvmCloneError | None)


@pytest.mark.parametrize(
    "pair", [("refuses", "refuses"), ("refuses", "is here"), ("is silent", "refuses"), ("is here", "is silent")]
)
def test_connecting_is_stopped_at_any_moment(addresses: dict[str, str], pair: tuple[str, str], run: Run) -> None:
    """By the other host's failure, too."""
    one, other = (addresses[name] for name in pair)

    async def main() -> None:
        for moment in MOMENTS:
            async with Client(SshOptions(retries=0, connect_timeout=5)) as client:
                await stopped_at(moment, lambda: client.clone(one, other, "web", CloneOptions()))

    run(main)


def test_one_host_s_failure_ends_the_other_s_connection(addresses: dict[str, str], run: Run) -> None:
    async def main() -> None:
        for _ in range(5):
            async with Client(SshOptions(retries=0)) as client:
                with pytest.raises(KvmCloneError):
                    await client.clone(addresses["refuses"], addresses["refuses"], "web")
                with pytest.raises(KvmCloneError):
                    await client.clone(addresses["refuses"], addresses["is silent"], "web")

    run(main)


def test_a_host_that_says_nothing_is_left_at_once(addresses: dict[str, str], run: Run) -> None:
    """ssh hears neither Ctrl-C nor the end of its input while it connects."""

    async def main() -> None:
        async with Client(SshOptions(retries=0, connect_timeout=60)) as client:
            task = asyncio.ensure_future(client.list_vms([addresses["is silent"]]))
            await asyncio.wait([task], timeout=1.5)
            began = time.monotonic()
            assert task.cancel()
            await asyncio.wait([task])
            assert time.monotonic() - began < 4

    run(main)


def test_listing_is_stopped_at_any_moment(addresses: dict[str, str], run: Run) -> None:
    async def main() -> None:
        for moment in MOMENTS[::2]:
            async with Client(SshOptions(retries=0)) as client:
                await stopped_at(moment, lambda: client.list_vms(list(addresses.values())))

    run(main)


@contextlib.asynccontextmanager
async def two_hosts(directory: Path) -> Any:
    hosts = [Host(ssh.parse_address("localhost"), ssh.SshOptions(), directory, interactive=False) for _ in range(2)]
    try:
        for host in hosts:
            await host.connect()
        yield hosts
    finally:
        for host in hosts:
            await host.close()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_closing_a_host_is_done_to_the_end(tmp_path: Path, run: Run, steps: int) -> None:
    async def main() -> None:
        host = Host(ssh.parse_address("localhost"), ssh.SshOptions(), tmp_path, interactive=False)
        await host.connect()
        await cancelled(host.close, steps=steps, times=3)
        assert host.link.lost

    run(main)


def test_a_stream_is_stopped_at_any_moment(tmp_path: Path, run: Run, children: Callable[[], Any]) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (source, destination):
            before = set(children())

            async def opened() -> None:
                async with transport.opened(source, destination, Route.RELAY):
                    await asyncio.sleep(0.05)

            for moment in MOMENTS:
                await stopped_at(moment, opened)
                assert set(children()) == before

    run(main)


def test_measuring_is_stopped_at_any_moment(tmp_path: Path, run: Run, children: Callable[[], Any]) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (source, destination):
            before = set(children())
            for moment in MOMENTS:
                await stopped_at(moment, lambda: find_route(source, destination, Route.RELAY, measured=True))
                assert set(children()) == before
            assert (await find_route(source, destination, Route.RELAY, measured=True)).rate > 0

    run(main)


def test_a_stream_that_was_prepared_is_closed_whoever_is_stopped(
    tmp_path: Path, run: Run, children: Callable[[], Any]
) -> None:
    """The copy that waits for it, or who closes it."""

    async def main() -> None:
        async with two_hosts(tmp_path) as (source, destination):
            before = set(children())
            for moment in MOMENTS:
                content = Content(source, destination, "web", TransferOptions(Route.RELAY, 1), lambda _: None)
                content.prepare()
                waiting = asyncio.ensure_future(content._stream())
                await asyncio.wait([waiting], timeout=moment)
                waiting.cancel()
                await asyncio.wait([waiting])
                if waiting.cancelled():
                    await cancelled(content.close, steps=1, times=2)
                else:
                    prepared = waiting.result()
                    assert isinstance(prepared, PreparedStream)
                    await cancelled(prepared.close, steps=1, times=2)
                assert set(children()) == before

    run(main)
