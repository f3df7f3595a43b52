"""The fault matrix as a document, which tests in several processes fill in cell by cell."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Cell = tuple[str, str, str]
"""What ran, the record that had been journalled, and the fault."""


@dataclass(frozen=True)
class Shape:
    """The tables: one for each kind, a line for each record, a column for each fault."""

    kinds: tuple[str, ...]
    records: tuple[str, ...]
    faults: tuple[str, ...]


def note(path: Path, shape: Shape, cell: Cell, outcome: str) -> None:
    """Write a cell into the document; the others stay as they are."""
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        seen = read(file.read(), shape)
        seen[cell] = outcome
        os.truncate(file.fileno(), 0)
        file.write(as_markdown(seen, shape))


def read(text: str, shape: Shape) -> dict[Cell, str]:
    """The cells of a document."""
    seen: dict[Cell, str] = {}
    kind = ""
    for line in text.splitlines():
        if line.startswith("## A "):
            kind = line.removeprefix("## A ")
        elif kind and line.startswith("| `"):
            record, *outcomes = (word.strip(" `") for word in line.strip("|").split("|"))
            seen.update({(kind, record, fault): one for fault, one in zip(shape.faults, outcomes, strict=True) if one})
    return seen


_LEGEND = """# Fault matrix

What was seen when a fault hit right after a record of the journal had become durable, or while it was being written
(`make test-faults`; `nothing`: when the journal was there, and no record yet). After every
cell: the old VM, if there was one, was untouched or completely replaced; a replica that was synced was bit by bit as
before, or as its source through whatever its definition named; no VM was defined with incomplete disks; the same
command with `--idempotent` ended with exit code 0 and a clone equal to its source; no staged file, journal, lock or
process remained.

| word | the run that was hit |
|---|---|
| goes on | ended with exit code 0 by itself |
| resumed | failed; the next run went on with what was staged |
| anew | failed; the next run copied everything |
| complete | failed after its commit; the next run only tidied up |
| | there is nothing of that kind to hit at that moment |
"""


def as_markdown(seen: Mapping[Cell, str], shape: Shape) -> str:
    """The cells as a document."""
    text = _LEGEND
    for kind in shape.kinds:
        text += f"\n## A {kind}\n\n| after | {' | '.join(shape.faults)} |\n|---|{'---|' * len(shape.faults)}\n"
        for record in shape.records:
            outcomes = [seen.get((kind, record, fault), "") for fault in shape.faults]
            if any(outcomes):
                text += f"| `{record}` | {' | '.join(outcomes)} |\n"
    return text
