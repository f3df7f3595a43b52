"""The kinds of store that there are."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError
from kvm_clone.agent.staging.directory import DirectoryStore
from kvm_clone.agent.staging.store import Store

KINDS: Dict[str, Store] = {DirectoryStore.kind: DirectoryStore()}
"""By the name that plans and journals have for them."""


def of(described: Mapping[str, Any]) -> Store:
    """The store that a spec or a journal's `create` names; a directory where it names none.

    Raises AgentError (unsupported) for one that this version does not have.
    """
    kind = described.get("store", DirectoryStore.kind)
    store = KINDS.get(kind)
    if store is None:
        raise AgentError(UNSUPPORTED, f"this version of kvm-clone knows no store {kind!r}")
    return store
