"""What holds for every test: none leaves a process behind, and none is about how busy the machine is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup, or in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the programs that tests interrupt inherit

Children = dict[tuple[int, str], str]
"""Processes by pid and start, which together name one; how each looks."""


SAMPLE = 2
"""Cases of a long table that `make test` takes: the first, the last, and what lies evenly between."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most cases of long tables to `make test-faults`: those of the lab, and of modules marked `sampled`."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"e2e", "sampled"} and not marks & {"faults", "fast"}:
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tables.values():
        taken = {round(at * (len(cases) - 1) / (SAMPLE - 1)) for at in range(SAMPLE)}
        for number, item in enumerate(cases):
            if len(cases) > SAMPLE and number not in taken:
                item.add_marker(pytest.mark.faults)


@pytest.fixture
def children() -> Callable[[], Children]:
    """What tells the children of this process, as they are when it is called."""
    return _children


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    """Fail a test that ends with a child of this process that it did not begin with, be it dead and not awaited.

    What session and module fixtures have started is there when this begins: they are set up before.
    """
    before = _children()
    yield
    left = {child: how for child, how in _children().items() if child not in before}
    if left:
        pytest.fail(f"processes outlive their test: {'; '.join(left.values())}", pytrace=False)


def _children() -> Children:
    found = {}
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except OSError:  # the thread has ended, and its children are the others'
            continue
        for pid in pids:
            try:
                fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
                argv = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # another thread has awaited it just now
                continue
            found[int(pid), fields[19]] = f"{pid} ({fields[0]}) {argv[:200]}"
    return found
