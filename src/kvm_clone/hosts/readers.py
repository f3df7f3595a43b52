"""Readers of answers: each takes what JSON gave and returns it typed.

Raises ValueError, TypeError or KeyError for what is malformed.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
Read = Callable[[Any], _T]


def anything(answer: Any) -> Any:
    """What is not looked into."""
    return answer


def nothing(answer: Any) -> None:
    """The answer of a call that has none."""
    if answer is not None:
        raise ValueError("it is not null")


def truth(answer: Any) -> bool:
    """A boolean."""
    return _of(bool, answer)


def text(answer: Any) -> str:
    """A string."""
    return _of(str, answer)


def whole(answer: Any) -> int:
    """An integer that is not negative."""
    if type(answer) is not int or answer < 0:
        raise ValueError("it is no whole number")
    return answer


def number(answer: Any) -> float:
    """A number that is not negative."""
    if type(answer) not in (int, float) or not answer >= 0:
        raise ValueError("it is no positive number")
    return float(answer)


def optional(read: Read[_T]) -> Read[_T | None]:
    """A reader that takes null too."""
    return lambda answer: None if answer is None else read(answer)


def listed(read: Read[_T], count: int | None = None) -> Read[list[_T]]:
    """A reader of lists, of `count` items if that is given."""

    def take(answer: Any) -> list[_T]:
        items = _of(list, answer)
        if count is not None and len(items) != count:
            raise ValueError(f"it has {len(items)} items, {count} were asked for")
        return [read(item) for item in items]

    return take


def mapped(read: Read[_T]) -> Read[dict[str, _T]]:
    """A reader of objects whose values are alike."""
    return lambda answer: {key: read(value) for key, value in _of(dict, answer).items()}


def pair(answer: Any) -> tuple[int, int]:
    """One [start, end) pair in bytes, or two counts."""
    start, end = listed(whole, 2)(answer)
    return start, end


def record(kind: type[_T], *may_lack: str) -> Read[_T]:
    """A reader of objects that become a dataclass, each field read by its type.

    What the object has beside the fields is passed over. A field of `may_lack` that it has not takes its default; every
    other one has to be there, whether it has a default or not. Raises NotImplementedError for a field of a type that
    nothing here reads.
    """
    readers = _readers(kind)

    def take(answer: Any) -> _T:
        given = _of(dict, answer)
        missing = [name for name in readers if name not in given and name not in may_lack]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return kind(**{name: _field(name, read, given[name]) for name, read in readers.items() if name in given})

    return take


def _field(name: str, read: Read[Any], answer: Any) -> Any:
    try:
        return read(answer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _readers(kind: type[Any]) -> dict[str, Read[Any]]:
    """The reader of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {one.name: _reader(hints[one.name]) for one in fields(kind)}


_PLAIN: dict[Any, Read[Any]] = {bool: truth, str: text, int: whole, float: number, type(None): nothing}


def _reader(hint: Any) -> Read[Any]:
    """The reader of a field of this type."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return record(hint)
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union) and len(inner) == 2 and inner[1] is type(None):
        return optional(_reader(inner[0]))
    if kind is Mapping and inner[0] is str:
        return mapped(_reader(inner[1]))
    if kind in (frozenset, Sequence) or (kind is tuple and inner[1:] == (...,)):
        make, items = tuple if kind is Sequence else kind, listed(_reader(inner[0]))
        return lambda answer: make(items(answer))
    raise NotImplementedError(f"nothing reads {hint}")


def _of(kind: type[_T], answer: Any) -> _T:
    if not isinstance(answer, kind):
        raise TypeError(f"it is no {kind.__name__}")
    return answer
