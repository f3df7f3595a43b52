"""What names something on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvm_clone.errors import UsageError


def naming(called: str) -> Callable[[Any], Any]:
    """The callback of a parameter, or of one that may be repeated, whose value names something: see `name`."""

    def checked(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [name(word, called) for word in value]
        return None if value is None else name(value, called)

    return checked


def name(word: str, called: str) -> str:
    """The word, which names something. Raises UsageError for one that is empty, or that libvirt's UTF-8 cannot have."""
    if not word.strip():
        raise UsageError(f"{called} is empty", subject=called, remedy=f"give {called} a value, or leave it out")
    if any("\ud800" <= char <= "\udfff" for char in word):  # how Python keeps a byte that is no text
        raise UsageError(f"{called} is not UTF-8 text: {word!r}", subject=called, remedy="write it in UTF-8")
    return word
