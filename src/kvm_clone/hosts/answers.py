"""What agents answer, checked.

Each reader takes an answer and returns it typed. Raises ValueError, TypeError or KeyError for one that is malformed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
Read = Callable[[Any], _T]
Ranges = list[tuple[int, int]]
"""[start, end) pairs in bytes."""


@dataclass(frozen=True)
class Use:
    """Who uses a file: `state` is one of agent.host.uses; `identity` is its device and inode."""

    path: str
    state: str
    why: str
    identity: str


@dataclass(frozen=True)
class Removed:
    """What came of removing a file: `result` is removed, missing or error, and `error` says why."""

    path: str
    result: str
    error: str


@dataclass(frozen=True)
class Overlay:
    """An overlay of a committed sync that is still there, and the image below it."""

    path: str
    base: str
    base_format: str


@dataclass(frozen=True)
class Probe:
    """Whether one host reaches the other: `error` is empty when it does. `rate` is in bytes a second."""

    error: str
    rate: float


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


def rate(answer: Any) -> float:
    """A number of bytes a second."""
    if type(answer) not in (int, float) or answer < 0:
        raise ValueError("it is no rate")
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


def fields(*names: str) -> Read[dict[str, Any]]:
    """A reader of objects that have these fields at least, or an `error` that says why they have not."""

    def take(answer: Any) -> dict[str, Any]:
        found: dict[str, Any] = _of(dict, answer)
        if "error" in found:
            text(found["error"])
            return found
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return found

    return take


def use(answer: Any) -> Use:
    """One file's use."""
    return Use(*(text(answer[name]) for name in ("path", "state", "why", "identity")))


def removed(answer: Any) -> Removed:
    """What came of one file."""
    result = text(answer["result"])
    return Removed(text(answer["path"]), result, text(answer["error"]) if result == "error" else "")


def overlay(answer: Any) -> Overlay:
    """One overlay."""
    return Overlay(*(text(answer[name]) for name in ("path", "base", "base_format")))


def probe(answer: Any) -> Probe:
    """What came of a probe."""
    return Probe(text(answer["error"]), rate(answer["rate"]))


def pair(answer: Any) -> tuple[int, int]:
    """One [start, end) pair in bytes."""
    start, end = listed(whole, 2)(answer)
    return start, end


def digests(answer: Any) -> dict[int, str]:
    """Digests by the segment's first byte."""
    return {whole(at): text(digest) for at, digest in _of(list, answer)}


def _of(kind: type[_T], answer: Any) -> _T:
    if not isinstance(answer, kind):
        raise TypeError(f"it is no {kind.__name__}")
    return answer
