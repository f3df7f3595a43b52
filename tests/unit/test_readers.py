"""readers.record: a dataclass from what JSON gave, each field by its type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kvm_clone.hosts.readers import record


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Outer:
    yes: bool
    word: str
    rate: float
    perhaps: int | None
    words: tuple[str, ...]
    kinds: frozenset[str]
    pairs: Sequence[Sequence[int]]
    inner: Inner
    named: Mapping[str, Inner]
    spare: str = "spare"


WELL: dict[str, Any] = {
    "yes": True,
    "word": "a",
    "rate": 2,
    "perhaps": None,
    "words": ["a", "b"],
    "kinds": ["a", "a"],
    "pairs": [[1, 2]],
    "inner": {"number": 1, "more": "is passed over"},
    "named": {"a": {"number": 2}},
}


def test_every_field_is_read_by_its_type() -> None:
    expected = Outer(True, "a", 2.0, None, ("a", "b"), frozenset("a"), ((1, 2),), Inner(1), {"a": Inner(2)})
    assert record(Outer, "spare")(WELL) == expected
    assert record(Outer)({**WELL, "spare": "there"}).spare == "there"


def test_a_field_with_a_default_has_to_be_there_too() -> None:
    with pytest.raises(ValueError, match="it has no spare"):
        record(Outer)(WELL)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("yes", 1, "yes: it is no bool"),
        ("word", None, "word: it is no str"),
        ("rate", -0.5, "rate: it is no positive number"),
        ("rate", True, "rate: it is no positive number"),
        ("perhaps", "1", "perhaps: it is no whole number"),
        ("words", "ab", "words: it is no list"),
        ("kinds", [1], "kinds: it is no str"),
        ("pairs", [1], "pairs: it is no list"),
        ("inner", {}, "inner: it has no number"),
        ("inner", {"number": 1.0}, "inner: number: it is no whole number"),
        ("named", [], "named: it is no dict"),
        ("named", {"a": None}, "named: it is no dict"),
    ],
)
def test_a_field_of_another_type(field: str, value: Any, why: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{why}"):
        record(Outer, "spare")({**WELL, field: value})


def test_a_type_that_nothing_reads_is_found_at_once() -> None:
    @dataclass(frozen=True)
    class Odd:
        items: list[int]

    with pytest.raises(NotImplementedError, match="nothing reads"):
        record(Odd)
