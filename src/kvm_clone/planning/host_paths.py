"""New paths for what two VMs of one host cannot share: logs and sockets that a VM's start makes. Pure."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterator

from kvm_clone.definition.references import Reference, Role
from kvm_clone.planning.facts import Facts
from kvm_clone.planning.things import plain_path

_NAME_MAX = 255
"""Bytes in a file's name."""

_SOCKET_MAX = 107
"""Bytes in a UNIX socket's path."""


def renames(facts: Facts, name: str) -> dict[str, str]:
    """Return the new path of each log and socket that another VM of the destination has already.

    `name`: the clone's. A path for which there is no free name is left out.
    """
    claimed = (*facts.destination.things.objects.used.items(), *facts.destination.paths_in_use.items())
    used = {plain_path(path) for path, names in claimed if path.startswith("/") and names - {name}}
    own = [reference for reference in facts.source.references if reference.is_renamed]
    taken = used | {plain_path(reference.value) for reference in own}
    found: dict[str, str] = {}
    for reference in own:
        if plain_path(reference.value) in used and reference.value not in found:
            new = _free(reference, facts.source.domain.name, name, taken)
            if new is not None:
                found[reference.value] = new
                taken.add(plain_path(new))
    return found


def _free(reference: Reference, old: str, new: str, taken: set[str]) -> str | None:
    directory, file = posixpath.split(reference.value)
    for candidate in itertools.islice(_candidates(file, old, new), len(taken) + 2):
        path = posixpath.join(directory, candidate)
        too_long = reference.role is Role.SOCKET and len(path.encode()) > _SOCKET_MAX
        if plain_path(path) not in taken and not too_long and len(candidate.encode()) <= _NAME_MAX:
            return path
    return None


def _candidates(file: str, old: str, new: str) -> Iterator[str]:
    """Yield the name with the new VM's name for the old one's, else before the extension; then numbered ones."""
    new = re.sub(r"[\t\r\n]", "_", new)  # libvirt keeps none of these in an attribute
    pattern = rf"(?<![0-9A-Za-z]){re.escape(old)}(?![0-9A-Za-z])"
    renamed = re.sub(pattern, lambda _: new, file, count=1)
    stem, extension = posixpath.splitext(renamed)
    if re.search(pattern, file) is None:
        stem = f"{stem}-{new}"
    yield stem + extension
    yield from (f"{stem}-{number}{extension}" for number in itertools.count(2))
