"""Options that commands share are declared once, and commands that are alike share them."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import kvm_clone.cli
from kvm_clone.cli.groups import OptionGroup, grouped

CLI = Path(kvm_clone.cli.__file__).parent


@dataclass(frozen=True)
class Size(OptionGroup):
    width: Annotated[int, typer.Option("--width", "-w")] = 1
    high: Annotated[bool, typer.Option("--high/--low")] = False


@dataclass(frozen=True)
class Colour(OptionGroup):
    colour: Annotated[str | None, typer.Option("--colour")] = None


def app() -> typer.Typer:
    made = typer.Typer()

    @made.command()
    @grouped
    def draw(name: str, thick: Annotated[bool, typer.Option("--thick")] = False, *, size: Size, colour: Colour) -> None:
        """Draw."""
        print(name, thick, size, colour)

    return made


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (False, Size(), Colour())),
        (["--thick", "-w", "3", "--high"], (True, Size(3, True), Colour())),
        (["--colour", "red", "--low", "--width=2"], (False, Size(2, False), Colour("red"))),
    ],
)
def test_a_command_gets_its_groups(argv: list[str], expected: tuple[object, ...]) -> None:
    done = CliRunner().invoke(app(), ["line", *argv])
    assert (done.exit_code, done.stdout.strip()) == (0, " ".join(map(str, ("line", *expected))))


@dataclass(frozen=True)
class Bare(OptionGroup):
    size: Annotated[int, typer.Option("--size")]


def twice(width: int = 0, *, size: Size) -> None:
    raise AssertionError


def without_default(*, bare: Bare) -> None:
    raise AssertionError


@pytest.mark.parametrize(("command", "said"), [(twice, "parameter twice"), (without_default, "has no default")])
def test_a_group_that_cannot_be(command: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        grouped(command)  # type: ignore[arg-type]


ALIKE = 6
"""Lines in a row that no two commands may have in common."""


def runs(source: str) -> Counter[tuple[str, ...]]:
    """Every run of that many lines of code, without comments, blank lines, and imports, which are alike by nature."""
    tree = ast.parse(source)
    imports = {
        line
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in imports]
    lines = [line for line in lines if line and not line.startswith("#")]
    return Counter(tuple(lines[at : at + ALIKE]) for at in range(len(lines) - ALIKE + 1))


def test_no_two_commands_are_alike() -> None:
    sources = {file.name: runs(file.read_text()) for file in sorted(CLI.glob("*.py"))}
    assert {"clone.py", "sync.py"} <= sources.keys()
    seen: dict[tuple[str, ...], str] = {}
    for name, found in sources.items():
        for run, count in found.items():
            assert count == 1, f"{name} repeats itself:\n" + "\n".join(run)
            assert run not in seen, f"{name} and {seen[run]} are alike:\n" + "\n".join(run)
            seen[run] = name


def test_alike_lines_are_noticed() -> None:
    lines = "\n".join(f"line{number} = {number}" for number in range(ALIKE))
    assert set(runs(f"import a\n{lines}\n")) == set(runs(f"import b\n\n# words\n{lines}\n"))
