"""Whether there is room for what a sync is about to send, once the comparison has told how much that is."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from kvm_clone.errors import RefusedError
from kvm_clone.hosts.host import Host
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.storage import with_margin
from kvm_clone.tasks import together
from kvm_clone.transfer.compare import Ranges, total
from kvm_clone.units import format_bytes


@dataclass(frozen=True)
class Update:
    """What is to be sent of a disk of a replica: where it is read (path or URI, and format), and the staged file."""

    disk: PlannedDisk
    origin: tuple[str, str]
    part: str
    ranges: Ranges


async def check(source: Host, destination: Host, updates: Sequence[Update]) -> None:
    """Raises RefusedError when the overlays, and then the images below, have no room for what is to be sent.

    What is merged after the commit must not be what fills the disk.
    """
    by_directory: dict[str, list[Update]] = {}
    for update in updates:
        by_directory.setdefault(posixpath.dirname(update.part), []).append(update)
    for directory, those in by_directory.items():
        free = await destination.agent.free(path=directory)
        if with_margin(2 * sum(total(one.ranges) for one in those)) <= free:
            continue  # also if all of it is content, and new in the overlay and below
        needed = with_margin(sum(await together(*(_needed(source, destination, one) for one in those))))
        if needed > free:
            raise RefusedError(
                f"{directory} on {destination.name} has {format_bytes(free)} free, {format_bytes(needed)} are needed "
                "for what has changed",
                subject=directory,
                remedy="make room there; the replica is as it was",
            )


async def _needed(source: Host, destination: Host, update: Update) -> int:
    """Bytes: what the staged file does not hold yet, and what the image below it does not."""
    disk, ranges = update.disk, [list(one) for one in update.ranges]

    async def content(host: Host, path: str, format_: str, *, own: bool = False) -> int:
        return await host.agent.data_in(path, format_, ranges, own=own)

    path, format_ = update.origin
    sent = await content(source, path, format_)
    if disk.below is None:
        return sent  # it shares its blocks with an image that stays: what is written is new
    held: int
    below: int
    held, below = await together(
        content(destination, update.part, disk.format, own=True),
        content(destination, disk.below.path, disk.below.format),
    )
    # Without subclusters an overlay takes whole ones, which the ranges are.
    file = sent if disk.fine else total(update.ranges)
    return max(0, file - held) + max(0, sent - below)
