"""Every step has what takes it and its row in the documentation, and no run begins with a step that has not."""

from __future__ import annotations

import asyncio
import re
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cases import Case

from kvm_clone.errors import RefusedError
from kvm_clone.execution.handlers import handler, handlers
from kvm_clone.execution.run import Run
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.ssh import SshOptions, parse_address
from kvm_clone.planning.steps import Step
from kvm_clone.progress import Event

KINDS = typing.get_args(Step)
DESIGN = (Path(__file__).parents[2] / "docs/design.md").read_text()


@dataclass(frozen=True)
class Invented:
    """A step of another version."""


def test_every_step_is_taken_by_something_of_its_own() -> None:
    taken_by = {handler(kind.__new__(kind)).func for kind in KINDS}  # type: ignore[attr-defined]
    assert len(taken_by) == len(KINDS)


def test_the_documentation_has_a_row_for_every_step() -> None:
    table = DESIGN.partition("### Steps\n")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| ([A-Z][A-Za-z, ]*?) \|", table, re.MULTILINE)
    assert sorted(name for cell in cells for name in cell.split(", ")) == sorted(kind.__name__ for kind in KINDS)


def test_an_unknown_step_is_refused_wherever_it_stands() -> None:
    known = Case().plan().steps
    assert len(handlers(known)) == len(known)
    for given in ((Invented(), *known), (*known, Invented())):
        with pytest.raises(RefusedError, match="Invented"):
            handlers(typing.cast("tuple[Step, ...]", given))


def test_a_run_with_an_unknown_step_does_nothing(tmp_path: Path) -> None:
    events: list[Event] = []
    taken: list[str] = []

    async def reconnect() -> Host:
        raise AssertionError("nothing is to be undone")

    async def attempt() -> None:
        plan = Case().plan()
        plan = replace(plan, steps=typing.cast("tuple[Step, ...]", (*plan.steps, Invented())))
        hosts = [Host(parse_address(name), SshOptions(), tmp_path, interactive=False) for name in ("a", "b")]
        nothing = typing.cast(LibvirtHost, None)
        source, destination = ((host, nothing) for host in hosts)
        await Run(plan, source, destination, reconnect, events.append, lambda name, *_: taken.append(name)).run()

    with pytest.raises(RefusedError, match="Invented"):
        asyncio.run(attempt())
    assert (events, taken) == ([], [])
