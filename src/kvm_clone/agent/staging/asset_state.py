"""What a journal says of each asset of an operation, and how far the operation has come."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Set

from kvm_clone.agent.disks import chain, fingerprint, qemu
from kvm_clone.agent.disks.disk import Ranges, union
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError
from kvm_clone.agent.staging import records, stores
from kvm_clone.agent.staging.records import Record
from kvm_clone.agent.staging.store import Held

_PAST_COMMIT = (records.COMMITTED, records.MERGING, records.MERGED)
"""What is journalled when libvirt is known to have the definition."""


class AssetState:
    """One asset: its store and its paths, which ranges are durable, and its identity once published.

    `made`: the identities that it was made with, of a store whose names are not marked.
    """

    def __init__(self, record: Record) -> None:
        self.key: str = record["disk"]
        self.store = stores.of(record)
        self.part: str = record["part"]
        self.final: str = record["final"]
        self.size: int = record["size"]
        self.format: str = record["format"]
        self.backing: Dict[str, str] = record.get("backing") or {}
        self.durable: Ranges = ()
        self.identity: Optional[str] = None
        self.made: Set[str] = set()

    def add_durable(self, ranges: Ranges) -> None:
        """The ranges are durable too; what lies behind the asset's end is none of it."""
        self.durable = union(self.durable, [(start, min(end, self.size)) for start, end in ranges])

    @property
    def is_published(self) -> bool:
        """Whether the asset has its final path, which may have become somebody else's."""
        return self.identity is not None and self.store.is_still(self.final, self.identity)

    @property
    def path(self) -> str:
        """Where the asset lies."""
        return self.final if self.is_published else self.part

    @property
    def is_ours(self) -> bool:
        """Whether what has the staged path was made by us."""
        return self.store.marks_names or any(self.store.is_still(self.part, identity) for identity in self.made)

    def look(self) -> Optional[Held]:
        """What lies there, None for nothing. Raises AgentError (unsupported) when it cannot be ours."""
        return self.store.look(self.path)

    def remove_staged(self) -> None:
        """Remove what has the staged path. Raises OSError; AgentError (unsupported) where it may be somebody else's."""
        if self.is_ours:
            self.store.remove(self.part)
        elif self.store.holds(self.part):
            raise AgentError(
                UNSUPPORTED, f"{self.part} is not known to be ours, and was left: if it is not needed, remove it"
            )

    def _is_whole(self, held: Held) -> bool:
        """Whether the asset can be filled further: a crash or a hand may have cut it short or torn it."""
        if self.backing and not fingerprint.is_still(self.backing["path"], self.backing["fingerprint"]):
            return False
        return held.size == self.size if self.format == chain.RAW else qemu.is_sound(self.path, self.format)

    def as_dict(self) -> Dict[str, Any]:
        """The form that crosses the wire, with the bytes that the asset takes, and those of content that it has."""
        held = self.look()
        durable = self.durable if self.durable and held and self.is_ours and self._is_whole(held) else []
        return {
            "part": self.part,
            "final": self.final,
            "size": self.size,
            "format": self.format,
            "durable": sum(end - start for start, end in durable),
            "ranges": durable,
            "data": host_info.data_held(self.path, self.format) if durable else 0,
            "allocated": held.allocated if held else 0,
            "backing": self.backing.get("path", ""),
        }


def states(entries: List[Record]) -> Dict[str, AssetState]:
    """The state of each asset after these records."""
    found: Dict[str, AssetState] = {}
    for entry in entries:
        record = entry["record"]
        if record == records.CREATE:
            made = found[entry["disk"]].made if entry["disk"] in found else set()
            found[entry["disk"]] = AssetState(entry)
            found[entry["disk"]].made = made
        elif record == records.MADE:
            found[entry["disk"]].made.add(entry["identity"])
        elif record == records.DURABLE:
            found[entry["disk"]].add_durable([[0, entry["end"]], *entry.get("ranges", [])])
        elif record == records.PUBLISH:
            found[entry["disk"]].identity = entry["identity"]
    return found


def in_commit(entries: List[Record]) -> bool:
    """Whether libvirt may have the definition: only it can say."""
    last = [entry["record"] for entry in entries if entry["record"] in (records.DEFINE, records.WITHDRAWN)]
    return bool(last) and last[-1] == records.DEFINE


def has_committed(entries: List[Record]) -> bool:
    """Whether libvirt is known to have the definition."""
    return in_commit(entries) and entries[-1]["record"] in _PAST_COMMIT
