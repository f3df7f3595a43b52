"""After the commit of a sync: the overlays that hold what changed are written into the images that they rest on.

The VM is defined onto its overlays by then, and reading through an overlay is right at every instant of the merge, so
that it can be interrupted and repeated. While an overlay's lock is held no VM can start on it, and what it has is
known to be in the image below.
"""

from __future__ import annotations

import os
import time
from array import array
from contextlib import contextmanager
from threading import Event
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar

from kvm_clone.agent.disks import chain, fingerprint, header, image, qemu
from kvm_clone.agent.disks.disk import DATA, Disk, Extent, split, zero_data
from kvm_clone.agent.disks.file import FileDisk
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.process import killed_by
from kvm_clone.agent.protocol.errors import IN_USE, INTERRUPTED, UNSUPPORTED, AgentError
from kvm_clone.agent.protocol.wire import CHUNK
from kvm_clone.agent.staging import records

_Result = TypeVar("_Result")

_HOLE = 4096
"""Bytes. The least hole that is made below: what filesystems allocate by."""

_ZEROS = bytes(_HOLE)
_ZERO = -1

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
    """Write the overlay's content into its base, durably; the locks say that nobody changes either any more.

    It takes no more room below than the content does: what is zero is a hole there, also where the overlay has whole
    clusters. Raises AgentError: in-use when a VM runs on it, interrupted once `ending` is set; it can be repeated.
    """
    if header.read(overlay.path).snapshots:
        raise AgentError(IN_USE, f"{overlay.path} has internal snapshots, which would be lost with it")
    locks = [_patiently(overlay, ending, lambda: ImageLock(overlay.path))]
    try:
        with _until(ending, overlay):
            size = int(qemu.info(overlay.path, image.QCOW2)["virtual-size"])
            below = _patiently(overlay, ending, lambda: qemu.info(overlay.base, overlay.base_format))
            if int(below["virtual-size"]) < size:
                qemu.resize(overlay.base, overlay.base_format, size)
            write_down(overlay, size, ending)
        image.flush_and_drop_cache(overlay.base)
        locks.append(ImageLock(overlay.base))
    except BaseException:
        locks[0].release()
        raise
    return locks


@contextmanager
def _until(ending: Event, overlay: Overlay) -> Iterator[None]:
    """Once `ending` is set the block ends soon, with AgentError (interrupted), whatever QEMU's programs wait for."""
    try:
        with killed_by(ending):
            yield
    except (AgentError, OSError):
        _check_time(overlay, ending)
        raise


def _patiently(overlay: Overlay, ending: Event, act: Callable[[], _Result]) -> _Result:
    """What `act` returns once nobody has the images open.

    Raises AgentError: in-use when somebody keeps them, interrupted once `ending` is set.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        _check_time(overlay, ending)
        try:
            return act()
        except AgentError as error:
            if error.kind != IN_USE and not any(words in str(error) for words in _LOCKED):
                raise
            if time.monotonic() > deadline:
                raise AgentError(IN_USE, f"another process uses {overlay.path}, or what it rests on") from error
        time.sleep(_LOOK_SECONDS)


def write_down(overlay: Overlay, size: int, ending: Event) -> None:
    """Give the base what the overlay itself holds. Nobody writes the overlay; QEMU's lock keeps others off the base.

    Raises AgentError (interrupted) once `ending` is set.
    """
    held = _patiently(overlay, ending, lambda: _held(overlay, size))
    base = [chain.Node(overlay.base, overlay.base_format)]
    below = _patiently(overlay, ending, lambda: qemu.open_nbd(base, writable=True))
    above, buffer = FileDisk(overlay.path), memoryview(bytearray(CHUNK))
    try:
        for at in range(0, len(held), 3):
            start, end, host = held[at : at + 3]
            if host == _ZERO:
                _check_time(overlay, ending)
                zero_data(below, start, end)
                continue
            for piece in split(Extent(start, end - start, DATA, host), CHUNK):
                _check_time(overlay, ending)
                _copy_down(above, piece, below, buffer)
        below.flush()
    finally:
        above.close()
        below.close()


def _check_time(overlay: Overlay, ending: Event) -> None:
    if ending.is_set():
        raise AgentError(INTERRUPTED, f"merging {overlay.path} was left to the next run; it can be repeated")


def _held(overlay: Overlay, size: int) -> "array[int]":
    """What the overlay itself holds: start, end, and where that lies in its file or _ZERO, for each range in turn.

    Known whole before the base is written: QEMU reads the base's own tables for it, which then change. Three numbers a
    range, since there may be millions.
    """
    held = array("q")
    layers = [chain.Node(overlay.path, image.QCOW2), chain.Node(overlay.base, overlay.base_format)]
    for extent in qemu.map_extents(layers, 0, size):
        if extent.kind == DATA and extent.host is None and not extent.layer:
            raise AgentError(UNSUPPORTED, f"{overlay.path} has compressed clusters, which no overlay of ours has")
        if not extent.layer:
            held.extend((extent.offset, extent.end, _ZERO if extent.host is None else extent.host))
    return held


def _copy_down(above: FileDisk, piece: Extent, below: Disk, buffer: memoryview) -> None:
    """Write the content of a piece of at most CHUNK bytes, and make holes where it is zero."""
    assert piece.host is not None
    content = buffer[: piece.length]
    above.readinto(piece.host, content)
    for start, end, is_zero in _runs(content, piece.offset):
        if is_zero:
            zero_data(below, start, end)
        else:
            below.write(start, content[start - piece.offset : end - piece.offset])


def _runs(content: memoryview, offset: int) -> Iterator[Tuple[int, int, bool]]:
    """The content, which lies at `offset`, in (start, end, whether it is all zeros), cut at multiples of _HOLE."""
    first = position = offset
    was_zero: Optional[bool] = None
    while position < offset + len(content):
        end = min(offset + len(content), position - position % _HOLE + _HOLE)
        is_zero = content[position - offset : end - offset].tobytes() == _ZEROS[: end - position]
        if was_zero is not None and is_zero != was_zero:
            yield first, position, was_zero
            first = position
        was_zero, position = is_zero, end
    if was_zero is not None:
        yield first, position, was_zero


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
