"""After the commit of a sync: the overlays that hold what changed are written into the images that they rest on.

The VM is defined onto its overlays by then, and reading through an overlay is right at every instant of the merge, so
that it can be interrupted and repeated. While an overlay's lock is held no VM can start on it, and what it has is
known to be in the image below.
"""

from __future__ import annotations

import os
import time
from threading import Event
from typing import Any, Dict, List, NamedTuple

from . import chain, fingerprint, header, image, qemu, records
from .errors import IN_USE, INTERRUPTED, AgentError
from .lock import ImageLock

_TRIES = 3
"""How often a merge is taken up again because a VM was started and stopped on the overlay meanwhile."""

_PATIENCE_SECONDS, _LOOK_SECONDS = 10.0, 0.2
"""How long a merge waits for an image that is locked, and how often it tries: others look at it for a moment."""


_LOCKED = ('" lock', "Is another process using")
"""In the last line that qemu-img prints of an image that others have open."""


class Overlay(NamedTuple):
    """An overlay at its final name, and the image that it rests on."""

    disk: str
    path: str
    base: str
    base_format: str


def overlays(entries: List[records.Record]) -> List[Overlay]:
    """The overlays that the journal's last `define` names and that are still there."""
    define = _last(entries, records.DEFINE)
    named = [Overlay(**one) for one in define.get("merge", [])]
    return [one for one in named if os.path.lexists(one.path)]


def merge(overlay: Overlay, ending: Event) -> List[ImageLock]:
    """Write the overlay's content into its base, durably; the locks say that nobody has changed either since.

    Raises AgentError: in-use when a VM runs on it, interrupted once `ending` is set.
    """
    for _ in range(_TRIES):
        before = fingerprint.of(overlay.path)
        _write_down(overlay, ending)
        image.settle(overlay.base)
        locks = [ImageLock(overlay.path)]
        try:
            locks.append(ImageLock(overlay.base))
        except BaseException:
            locks[0].release()
            raise
        if fingerprint.content(before) == fingerprint.content(fingerprint.of(overlay.path)):
            return locks
        for lock in locks:
            lock.release()
    raise AgentError(IN_USE, f"a VM is started on {overlay.path} again and again")


def _write_down(overlay: Overlay, ending: Event) -> None:
    if header.read(overlay.path).snapshots:
        raise AgentError(IN_USE, f"{overlay.path} has internal snapshots, which would be lost with it")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        if ending.is_set():
            raise AgentError(INTERRUPTED, f"merging {overlay.path} was left to the next run")
        try:
            return qemu.merge(overlay.path, chain.Node(overlay.base, overlay.base_format), ending)
        except AgentError as error:
            if not any(words in str(error) for words in _LOCKED):
                raise
            if time.monotonic() > deadline:
                raise AgentError(IN_USE, f"another process uses {overlay.path}, or what it rests on") from error
        time.sleep(_LOOK_SECONDS)


def journalled_images(entries: List[records.Record]) -> Dict[str, List[str]]:
    """Path and fingerprint of each disk of the committed VM, as the journal has them, by the disk's target."""
    found: Dict[str, List[str]] = dict(_last(entries, records.DEFINE).get("images", {}))
    found.update(_last(entries, records.MERGED).get("images", {}))
    return found


def is_untouched(entries: List[records.Record]) -> bool:
    """Whether nobody has touched the committed VM's disks since the journal says how they were."""
    return _are_untouched(entries, journalled_images(entries))


def is_as_committed(entries: List[records.Record]) -> bool:
    """Whether nobody has written the committed VM's disks, overlays among them, until they are merged."""
    return _are_untouched(entries, _last(entries, records.DEFINE).get("images", {}))


def _are_untouched(entries: List[records.Record], images: Dict[str, List[str]]) -> bool:
    """Whether the images, each with its fingerprint, are as they were, and an earlier merge has found nothing else."""
    merged = _last(entries, records.MERGED)
    if merged and not merged["untouched"]:
        return False
    return all(fingerprint.is_untouched(path, then) for path, then in images.values())


def _last(entries: List[records.Record], kind: str) -> Dict[str, Any]:
    return next((entry for entry in reversed(entries) if entry["record"] == kind), {})
