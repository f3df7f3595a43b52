"""Undoing what a journal says was made, newest first."""

from __future__ import annotations

from typing import Dict, List

from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.staging import marks, records
from kvm_clone.agent.staging.asset_state import AssetState, in_commit, states
from kvm_clone.agent.staging.records import Record

UNSETTLED = "an earlier attempt may have been committed; libvirt has to be asked first"


def undo_all(entries: List[Record], *, past_commit: bool = False) -> List[str]:
    """Undo the journalled steps in reverse and go on past a failure; the failures' texts.

    Raises AgentError (unsupported) when libvirt may have the definition, unless the caller knows that it has not:
    `past_commit`.
    """
    if not past_commit and in_commit(entries):
        raise AgentError(UNSUPPORTED, UNSETTLED)
    left: List[str] = []
    assets = states(entries)
    for entry in reversed(entries):
        try:
            _undo(entry, assets)
        except OSError as error:
            path = entry.get("final" if entry["record"] == records.PUBLISH else "part", "marks")
            left.append(str(from_exception(error, f"removing {path}")))
        except AgentError as error:
            left.append(str(error))
    return left


def _undo(entry: Record, assets: Dict[str, AssetState]) -> None:
    if entry["record"] == records.BEGIN:
        marks.remove_all(entry)
    elif entry["record"] == records.PUBLISH:
        # Only the asset that was published: another one of that name is not ours.
        store = assets[entry["disk"]].store
        if store.is_still(entry["final"], entry["identity"]):
            store.remove(entry["final"])
    elif entry["record"] == records.CREATE:
        created = AssetState(entry)
        created.made = assets[entry["disk"]].made
        created.remove_staged()
