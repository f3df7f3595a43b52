#!/usr/bin/env python3
"""Prints how large functions and files are, and which packages import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kvm_clone"


@dataclass(frozen=True)
class Function:
    """A function: where, its lines with decorators and docstring, and its parameters but `self` and `cls`."""

    file: str
    name: str
    lines: int
    parameters: int
    is_command: bool


@dataclass(frozen=True)
class Figures:
    """Functions, lines by file, and the pairs of packages of which the first imports the second."""

    functions: tuple[Function, ...]
    files: dict[str, int]
    arrows: frozenset[tuple[str, str]]


def measure(source: Path = SOURCE) -> Figures:
    """The figures of all modules below a directory."""
    functions: list[Function] = []
    files: dict[str, int] = {}
    arrows: set[tuple[str, str]] = set()
    for path in sorted(source.rglob("*.py")):
        name, text = str(path.relative_to(source)), path.read_text()
        tree = ast.parse(text, name)
        files[name] = len(text.splitlines())
        functions += _functions(name, tree)
        arrows |= {(package_of(name), target) for target in _imported(tree) if target != package_of(name)}
    return Figures(tuple(functions), files, frozenset(arrows))


def package_of(name: str) -> str:
    """The package, or the single module, that a file belongs to."""
    return name.partition("/")[0].removesuffix(".py")


def _functions(name: str, tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            taken = node.args
            words = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
            words += [one for one in (taken.vararg, taken.kwarg) if one is not None]
            count = len([one for one in words if one.arg not in ("self", "cls")])
            is_command = name.startswith("cli/") and node.name.endswith("_command")
            yield Function(name, node.name, (node.end_lineno or first) - first + 1, count, is_command)


def _imported(tree: ast.Module) -> Iterator[str]:
    """The packages of ours that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            ours, _, rest = node.module.partition(".")
            if ours == "kvm_clone":
                yield from [rest.split(".")[0]] if rest else [alias.name for alias in node.names]


def percentile(numbers: list[int], share: int) -> int:
    """What `share` of 100 numbers are not above."""
    ordered = sorted(numbers)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def main() -> None:
    """Print the figures."""
    found = measure()
    lines = [one.lines for one in found.functions]
    shares = ", ".join(f"p{share} {percentile(lines, share)}" for share in (50, 95))
    print(f"functions: {len(lines)}; lines: {shares}, most {max(lines)}")
    print(f"parameters: most {max(one.parameters for one in found.functions if not one.is_command)}")
    longest = sorted(found.files, key=found.files.__getitem__, reverse=True)[:5]
    print(f"files: {len(found.files)}; longest: {', '.join(f'{name} {found.files[name]}' for name in longest)}")
    print(f"packages: {len({package_of(name) for name in found.files if '/' in name})}")
    print(f"arrows between packages: {len(found.arrows)}")


if __name__ == "__main__":
    main()
