"""A second kind of store: volumes that have their final path from the first, as a pool of libvirt's makes them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvm_clone.agent.staging import stores
from kvm_clone.agent.staging.store import Held, Store

_NUMBERS = itertools.count(1)


class Volumes(Store):
    """Nothing can be renamed, no name says whose it is, and each volume has a number that stays."""

    kind = "volumes"
    marks_names = False

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def part(self, operation: str, key: str, final: str) -> str:
        return final

    def create(self, part: str, spec: dict[str, Any]) -> None:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, spec["mode"])
        try:
            os.truncate(fd, spec["size"])
        finally:
            os.close(fd)
        self._numbers[part] = next(_NUMBERS)

    def holds(self, path: str) -> bool:
        return os.path.lexists(path)

    def look(self, path: str) -> Held | None:
        if not self.holds(path):
            return None
        about = os.stat(path)
        return Held(about.st_size, about.st_blocks * 512)

    def publish(self, part: str, final: str) -> None:
        assert part == final
        os.stat(final)

    def retract(self, final: str, part: str) -> None:
        self.publish(final, part)

    def remove(self, path: str) -> None:
        if self.holds(path):
            os.unlink(path)
            self._numbers.pop(path, None)

    def identity(self, path: str) -> str:
        os.stat(path)
        return str(self._numbers.get(path, "somebody else's"))


@contextmanager
def known() -> Iterator[Volumes]:
    """Such a store that staging knows in this block."""
    store = Volumes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(stores.KINDS, Volumes.kind, store)
        yield store
