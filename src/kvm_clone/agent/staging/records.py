"""What a journal may say. A journal is input: what is not of this form, or names what we would not, does not count."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from kvm_clone.agent import names
from kvm_clone.agent.disks import chain
from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError
from kvm_clone.agent.staging import stores
from kvm_clone.agent.staging.directory import DirectoryStore

BEGIN = "begin"  # an operation holds the lock: operation, name, host, version, source, started, marks
CREATE = "create"  # an asset is about to be made: disk (its key), part, final, size in bytes, format, backing, store
MADE = "made"  # it was made, in a store whose staged names do not say that they are ours: disk, identity
DURABLE = "durable"  # what is durable in the staged file, all before the byte `end` and perhaps more: disk, end, ranges
COPIED = "copied"  # a staged file holds all content, durably: disk, bytes
PROVEN = "proven"  # both ends' digests agreed: disk
PUBLISH = "publish"  # a staged file is about to get its final name: disk, part, final, identity (fingerprint.identity)
RETRACT = "retract"  # a published file is about to get its staged name back: disk
DEFINE = (
    "define"  # the definition is about to be given to libvirt, the commit point: uuid, remove, forget, merge, images
)
WITHDRAWN = "withdrawn"  # libvirt does not have the definition, and will not get this one
COMMITTED = "committed"  # libvirt has the definition
MERGING = "merging"  # the images below the overlays are as they were when those were made, and are about to be written
MERGED = "merged"  # the overlays are in the images below, which libvirt may be told to use: untouched, images

Record = Dict[str, Any]

_LARGEST = 1 << 63


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _path(value: Any) -> bool:
    return isinstance(value, str) and names.is_plain(value)


def _disk(value: Any) -> bool:
    return isinstance(value, str) and names.DISK.fullmatch(value) is not None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _ranges(value: Any) -> bool:
    """[start, end) pairs in order and apart."""
    pairs = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
    ends = [end for one in value for end in one] if pairs else []
    return pairs and all(map(_count, ends)) and all(ends[at] < ends[at + 1] for at in range(len(ends) - 1))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _paths(value: Any) -> bool:
    return isinstance(value, list) and all(map(_path, value))


def _named_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _backing(value: Any) -> bool:
    keys = {"path", "format", "fingerprint"}
    return value is None or (_named_texts(value) and value.keys() == keys and _path(value["path"]))


def _format(value: Any) -> bool:
    return value in (chain.RAW, chain.QCOW2)


def _images(value: Any) -> bool:
    return isinstance(value, dict) and all(_disk(disk) and _texts(one) and len(one) == 2 for disk, one in value.items())


def _overlay(value: Any) -> bool:
    keys = {"disk", "path", "base", "base_format"}
    return _named_texts(value) and value.keys() == keys and _disk(value["disk"]) and _path(value["base"])


def _overlays(value: Any) -> bool:
    return isinstance(value, list) and all(map(_overlay, value))


def durable(disk: str, ranges: Sequence[Sequence[int]]) -> Record:
    """The fields of a `durable` record; the ranges are in order and apart; one from byte 0 is its `end`."""
    end = ranges[0][1] if ranges and not ranges[0][0] else 0
    rest = [list(one) for one in ranges if one[0]]
    return {"disk": disk, "end": end, **({"ranges": rest} if rest else {})}


def created(key: str, part: str, final: str, spec: Mapping[str, Any], backing: Optional[Dict[str, str]]) -> Record:
    """The fields of a `create` record. A directory, which version 0.1 knew alone, is not named."""
    about = {"disk": key, "part": part, "final": final, "size": spec["size"], "format": spec["format"]}
    kind = stores.of(spec).kind
    return {**about, "backing": backing, **({} if kind == DirectoryStore.kind else {"store": kind})}


_Check = Callable[[Any], bool]

_NEEDED: Dict[str, Dict[str, _Check]] = {
    BEGIN: {"operation": lambda value: _text(value) and bool(names.OPERATION.fullmatch(value)), "name": _text},
    CREATE: {"disk": _disk, "part": _path, "final": _path, "size": _count, "format": _format},
    MADE: {"disk": _disk, "identity": _text},
    DURABLE: {"disk": _disk, "end": _count},
    COPIED: {"disk": _disk},
    PROVEN: {"disk": _disk},
    PUBLISH: {"disk": _disk, "part": _path, "final": _path, "identity": _text},
    RETRACT: {"disk": _disk},
    DEFINE: {},
    WITHDRAWN: {},
    COMMITTED: {},
    MERGING: {},
    MERGED: {"untouched": lambda value: isinstance(value, bool)},
}
"""What each record has, and what that has to be."""

_PERHAPS: Dict[str, Dict[str, _Check]] = {
    BEGIN: {
        "started": _number,
        "kind": _text,
        "version": _text,
        "controller": _text,
        "process": _count,
        "source": _named_texts,
        "host": _named_texts,
        "marks": _paths,
    },
    CREATE: {"backing": _backing, "store": _text},
    DURABLE: {"ranges": _ranges},
    DEFINE: {"uuid": _text, "remove": _texts, "forget": _texts, "images": _images, "merge": _overlays},
    MERGED: {"images": _images},
}
"""What a record may have."""


def check(records: List[Record]) -> None:
    """Raises AgentError (unsupported) when these are no journal of ours."""
    assets: Dict[str, Record] = {}
    for number, entry in enumerate(records):
        if not _is_record(entry) or (entry["record"] == BEGIN) != (number == 0):
            raise AgentError(UNSUPPORTED, f"record {number + 1} of the journal is none of ours; it was left as it is")
        disk, kind = entry.get("disk"), entry["record"]
        if kind == CREATE:
            assets[entry["disk"]] = entry
        elif disk is not None and (not isinstance(disk, str) or disk not in assets):
            raise AgentError(UNSUPPORTED, f"record {number + 1} of the journal is of a disk that was not made")
        if not _names_ours(entry, records[0]["operation"], assets):
            raise AgentError(
                UNSUPPORTED, f"record {number + 1} of the journal names files that we would not have named"
            )


def check_next(records: List[Record], entry: Record) -> None:
    """Raises AgentError (unsupported) when whoever reads the journal would not take this record for ours."""
    try:
        check([one for one in records if one["record"] in (BEGIN, CREATE)] + [entry])
    except AgentError as error:
        raise AgentError(UNSUPPORTED, f"the journal cannot say this: {entry}") from error


def _is_record(entry: Any) -> bool:
    if not isinstance(entry, dict) or not _text(entry.get("record")) or entry["record"] not in _NEEDED:
        return False
    needed, perhaps = _NEEDED[entry["record"]], _PERHAPS.get(entry["record"], {})
    return all(key in entry and fits(entry[key]) for key, fits in needed.items()) and all(
        fits(entry[key]) for key, fits in perhaps.items() if key in entry
    )


def _names_ours(entry: Record, operation: str, assets: Dict[str, Record]) -> bool:
    """Whether the names in the record are what we make of the operation, the asset, and its final name or its base."""
    if entry["record"] in (CREATE, PUBLISH):
        created = assets[entry["disk"]]
        final = created["final"]
        plain = not os.path.basename(final).startswith(names.PREFIX)
        part = stores.of(created).part(operation, entry["disk"], final)
        return plain and entry["final"] == final and entry["part"] == part
    overlays = entry.get("merge", []) if entry["record"] == DEFINE else []
    return all(one["path"] == names.overlay_path(operation, one["disk"], one["base"]) for one in overlays)


def in_directories(records: List[Record], directories: List[str]) -> None:
    """Raises AgentError (unsupported) when a file that the journal names lies in none of these directories."""
    for entry in records:
        named = [(entry["final"], stores.of(entry).container(entry["final"]))] if entry["record"] == CREATE else []
        if entry["record"] == DEFINE:
            named += [(one["base"], os.path.dirname(one["base"])) for one in entry.get("merge", [])]
        for path, container in named:
            if container not in directories:
                raise AgentError(
                    UNSUPPORTED,
                    f"the journal names {path}, where none of ours would have put a disk; it was left as it is",
                )
