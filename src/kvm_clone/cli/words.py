"""Names on the command line, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from kvm_clone.errors import UsageError


def name_argument(metavar: str, text: str) -> Any:
    """A positional parameter of a command whose value is a name, or a list of names. `text`: its help."""
    return typer.Argument(metavar=metavar, help=text, callback=naming(metavar.strip("[].")))


def name_option(flag: str, text: str, *, metavar: str = "NAME") -> Any:
    """An option whose value is a name, or a list of names. `text`: its help."""
    return typer.Option(flag, metavar=metavar, help=text, callback=naming(flag))


def naming(called: str) -> Callable[[Any], Any]:
    """A Typer callback that checks a parameter's value, or each of its values, by `name`. `called`: the parameter."""

    def checked(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [name(word, called) for word in value]
        return None if value is None else name(value, called)

    return checked


def name(word: str, called: str) -> str:
    """The word. Raises UsageError for a word that is empty or not UTF-8, which libvirt requires."""
    if not word.strip():
        raise UsageError(f"{called} is empty", subject=called, remedy=f"give {called} a value, or leave it out")
    if any("\ud800" <= char <= "\udfff" for char in word):  # how Python keeps a byte that is not UTF-8
        raise UsageError(f"{called} is not UTF-8 text: {word!r}", subject=called, remedy="write it in UTF-8")
    return word
