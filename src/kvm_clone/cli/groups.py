"""Options that several commands share, declared once: a dataclass whose fields become parameters of each command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints


class OptionGroup:
    """The base of dataclasses whose fields are options: annotated as a command's parameters are, with a default."""


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it: the fields of each option group in place of the parameter of that type.

    Raises TypeError for a field that is a parameter already, or has no default.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {one.name: one.annotation for one in own if _is_group(one.annotation)}
    parameters = [one for one in own if one.name not in groups]
    for kind in groups.values():
        parameters += _options(kind)
    by_name = {one.name: one for one in parameters}
    if len(by_name) != len(parameters):
        raise TypeError(f"{command.__name__} has a parameter twice: {[one.name for one in parameters]}")

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    # Typer reads both.
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {name: one.annotation for name, one in by_name.items()}
    return called


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, OptionGroup)


def _options(kind: Any) -> list[inspect.Parameter]:
    """The fields of a group as parameters that are given by name."""
    hints = get_type_hints(kind, include_extras=True)
    options = []
    for field in fields(kind):
        if field.default is MISSING:
            raise TypeError(f"{kind.__name__}.{field.name} has no default")
        named = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(field.name, named, default=field.default, annotation=hints[field.name]))
    return options
