"""Whether there is room for what a sync is about to send, once the comparison has told how much that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvm_clone.errors import RefusedError
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.storage import with_margin
from kvm_clone.tasks import together
from kvm_clone.transfer.compare import Ranges, Side, total
from kvm_clone.units import format_bytes


@dataclass(frozen=True)
class Update:
    """What is to be sent of an asset of a replica: the image that is read, the staged one, and the ranges."""

    asset: Asset
    source: Image
    staged: Image
    ranges: Ranges


async def check(source: Host, destination: Host, updates: Sequence[Update]) -> None:
    """Raises RefusedError when the overlays, and then the images below, have no room for what is to be sent.

    What is merged after the commit must not be what fills the disk.
    """
    by_container: dict[str, list[Update]] = {}
    for update in updates:
        by_container.setdefault(update.asset.place.container, []).append(update)
    for container, those in by_container.items():
        free = int(await destination.call("free", path=container))
        if with_margin(2 * sum(total(one.ranges) for one in those)) <= free:
            continue  # also if all of it is content, and new in the overlay and below
        needed = with_margin(sum(await together(*(_needed(source, destination, one) for one in those))))
        if needed > free:
            raise RefusedError(
                f"{container} on {destination.name} has {format_bytes(free)} free, {format_bytes(needed)} are needed "
                "for what has changed",
                subject=container,
                remedy="make room there; the replica is as it was",
            )


async def _needed(source: Host, destination: Host, update: Update) -> int:
    """Bytes: what the staged file does not hold yet, and what the image below it does not."""
    asset, ranges = update.asset, update.ranges
    sent = await Side(source, update.source).data_in(ranges)
    if asset.below is None:
        return sent  # it shares its blocks with an image that stays: what is written is new
    held: int
    below: int
    held, below = await together(
        Side(destination, update.staged).data_in(ranges, own=True),
        Side(destination, asset.below).data_in(ranges),
    )
    # Without subclusters an overlay takes whole ones, which the ranges are.
    file = sent if asset.fine else total(ranges)
    return max(0, file - held) + max(0, sent - below)
