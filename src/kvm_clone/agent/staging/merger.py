"""The merge of a committed operation's overlays, as its journal has it, and the locks that are held from then on."""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict, List, Optional

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.protocol.errors import IN_USE, AgentError
from kvm_clone.agent.staging import files, merge, records
from kvm_clone.agent.staging.asset_state import AssetState, states


class Merger:
    """What comes after the commit of a sync. No VM can start on the overlays, or below, from the merge to the end."""

    def __init__(self, append: Callable[..., None]) -> None:
        """`append`: journals a record."""
        self._append = append
        self._ending = threading.Event()
        self._held: List[ImageLock] = []

    def merge(self, entries: List[records.Record]) -> None:
        """Write every overlay into its base, and journal how those are then.

        Ends early, with AgentError (interrupted), after `stop`.
        """
        found = merge.overlays(entries)
        if not any(entry["record"] == records.MERGING for entry in entries):
            _check_below(found, states(entries))
            self._append(records.MERGING)
        for overlay in found:
            self._held += merge.merge(overlay, self._ending)
        untouched = merge.is_as_committed(entries)
        images = {one.disk: [one.base, fingerprint.of(one.base)] for one in found}
        self._append(records.MERGED, untouched=untouched, images=images)

    def remove_merged(self, entries: List[records.Record]) -> None:
        """Remove the merged overlays: libvirt's definition no longer names them."""
        for overlay in merge.overlays(entries):
            files.unlink_file(overlay.path)
        self.release()

    def stop(self) -> None:
        """A merge that is under way ends soon, unfinished."""
        self._ending.set()

    def release(self) -> None:
        """Let others use the images again."""
        for lock in self._held:
            lock.release()
        self._held = []


def seal(entries: List[records.Record]) -> Optional[Dict[str, str]]:
    """The fingerprint of each disk of the committed VM; None when somebody has written them since."""
    if not merge.is_untouched(entries):
        return None
    return {disk: fingerprint.of(path) for disk, (path, _) in merge.journalled_images(entries).items()}


def overlays(entries: List[records.Record]) -> List[Dict[str, Any]]:
    """The overlays of the committed VM that are still there, in the form that crosses the wire."""
    return [overlay._asdict() for overlay in merge.overlays(entries)]


def _check_below(overlays: List[merge.Overlay], assets: Dict[str, AssetState]) -> None:
    """What an overlay holds fits the image that it was made on, as that was. Raises AgentError (in use)."""
    for overlay in overlays:
        state = assets.get(overlay.disk)
        backing = state.backing if state is not None else {}
        if backing and not fingerprint.is_still(backing["path"], backing["fingerprint"]):
            raise AgentError(
                IN_USE,
                f"{overlay.base} was written since {overlay.path} was made on it, perhaps by a guest that was resumed "
                "from an older saved state: the two do not fit together",
            )
