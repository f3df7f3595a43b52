"""The contract of what assets land in, which staging, journals and undoing know alone.

tests/agent/test_store_contract.py holds every kind of store to it. A new kind is registered in stores.py.
"""

from __future__ import annotations

import abc
import os
from typing import Any, Dict, NamedTuple, Optional


class Held(NamedTuple):
    """What lies at a path: its size, and the room that it takes, both in bytes."""

    size: int
    allocated: int


class Store(abc.ABC):
    """Where assets land.

    An asset has two paths: the staged one, under which it is filled and proven, and the final one, under which libvirt
    opens it. Where nothing can be renamed they are the same. Until it is published an asset may be removed at any time.
    """

    kind: str
    """What plans and journals call it."""

    marks_names: bool
    """Whether a staged path has our mark, so that what lies there is ours, whoever made it. Of a store without such
    names an asset is removed only if the journal has the identity that it was made with."""

    @abc.abstractmethod
    def part(self, operation: str, key: str, final: str) -> str:
        """The staged path of the asset `key` of an operation: the same for the same arguments, in every run."""

    @abc.abstractmethod
    def create(self, part: str, spec: Dict[str, Any]) -> None:
        """Make the asset, durably, where nothing is.

        `spec`: format, size in bytes, options, mode, user, group; `backing`: path and format of the image that it is
        an overlay on, if it is one; `copy_of`: the image whose content it begins with, if it does. Raises OSError,
        FileExistsError among them; AgentError.
        """

    @abc.abstractmethod
    def holds(self, path: str) -> bool:
        """Whether anything has this path, one of ours or not. Raises OSError."""

    @abc.abstractmethod
    def look(self, path: str) -> Optional[Held]:
        """What lies there, None for nothing. Raises OSError; AgentError for what cannot be one of ours."""

    @abc.abstractmethod
    def publish(self, part: str, final: str) -> None:
        """Give the asset its final path, durably, replacing nothing; goes on where a crash ended it. Raises OSError."""

    @abc.abstractmethod
    def retract(self, final: str, part: str) -> None:
        """Give a published asset its staged path back, durably; can be repeated. Raises OSError."""

    @abc.abstractmethod
    def remove(self, path: str) -> None:
        """Remove what lies there, durably, if anything does. Raises OSError, AgentError as `look` does."""

    @abc.abstractmethod
    def identity(self, path: str) -> str:
        """By which the asset is known again while nobody writes it, under either path. Raises FileNotFoundError."""

    def is_still(self, path: str, identity: str) -> bool:
        """Whether what lies there is the asset of this identity. Raises OSError."""
        try:
            return self.identity(path) == identity
        except FileNotFoundError:
            return False

    def container(self, final: str) -> str:
        """The directory that a journal's reader has to know the final path to lie in."""
        return os.path.dirname(final)
