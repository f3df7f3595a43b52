"""How large functions and files are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import figures
import pytest

MOST_LINES, MOST_AT_95 = 60, 24
"""Lines of a function: the longest, and what 95 of 100 keep to."""
MOST_FILE_LINES, MOST_PARAMETERS = 450, 12

TOO_LONG_YET: set[str] = set()
"""Files that are to be cut; none may be added."""


@pytest.fixture(scope="module")
def found() -> figures.Figures:
    return figures.measure()


def test_functions_are_short(found: figures.Figures) -> None:
    assert [one for one in found.functions if one.lines > MOST_LINES] == []
    assert figures.percentile([one.lines for one in found.functions], 95) <= MOST_AT_95


def test_functions_have_few_parameters(found: figures.Figures) -> None:
    assert [one for one in found.functions if one.parameters > MOST_PARAMETERS and not one.is_command] == []


def test_files_can_be_read_in_one_sitting(found: figures.Figures) -> None:
    too_long = {name for name, lines in found.files.items() if lines > MOST_FILE_LINES}
    assert too_long == TOO_LONG_YET & found.files.keys()


def test_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "__init__.py").write_text("")
    (tmp_path / "one" / "a.py").write_text(
        "from kvm_clone.two.b import c\n\n\ndef f(x, *y, z=1, **w):\n    def g():\n        pass\n    return g\n"
    )
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b.py").write_text("class C:\n    async def c(self):\n        pass\n")
    found = figures.measure(tmp_path)
    assert {(one.name, one.lines, one.parameters) for one in found.functions} == {("f", 4, 4), ("g", 2, 0), ("c", 2, 0)}
    assert found.files == {"one/__init__.py": 0, "one/a.py": 7, "two/b.py": 3}
    assert found.arrows == {("one", "two")}


@pytest.mark.parametrize(("share", "expected"), [(50, 5), (95, 10), (100, 10), (0, 1)])
def test_percentiles(share: int, expected: int) -> None:
    assert figures.percentile(list(range(10, 0, -1)), share) == expected


def test_figures_are_printed() -> None:
    script = Path(figures.__file__)
    done = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True)
    assert "functions: " in done.stdout
    assert "arrows between packages: " in done.stdout
