"""Check that there is room for what a sync is about to send, once the comparison has found out how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvm_clone.errors import RefusedError
from kvm_clone.gather import together
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.storage import with_margin
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
    """Raise RefusedError when the overlays, and then the images below, have no room for what is to be sent.

    The merge after the commit must not run out of room.
    """
    by_container: dict[str, list[Update]] = {}
    for update in updates:
        by_container.setdefault(update.asset.place.container, []).append(update)
    for container, those in by_container.items():
        free = await destination.agent.free(container)
        if with_margin(2 * sum(total(one.ranges) for one in those)) <= free:
            continue  # enough even if all of it is content, and new in the overlay and below
        needed = with_margin(sum(await together(*(_needed(source, destination, one) for one in those))))
        if needed > free:
            raise RefusedError(
                f"{container} on {destination.name} has {format_bytes(free)} free, {format_bytes(needed)} are needed "
                "for what has changed",
                subject=container,
                remedy="make room there; the replica is as it was",
            )


async def _needed(source: Host, destination: Host, update: Update) -> int:
    """Return how many bytes the staged image and the image below it still need."""
    asset, ranges = update.asset, update.ranges
    sent = await Side(source, update.source).data_in(ranges)
    if asset.below is None:
        return sent  # it shares blocks with an image that stays: every write takes new ones
    held: int
    below: int
    held, below = await together(
        Side(destination, update.staged).data_in(ranges, own=True),
        Side(destination, asset.below).data_in(ranges),
    )
    # Without subclusters an overlay takes whole clusters, as the ranges are.
    file = sent if asset.fine else total(ranges)
    return max(0, file - held) + max(0, sent - below)
