"""What journals say of operations that were interrupted, or are under way, and the end of the interrupted ones."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Dict, List, Optional, Tuple

from kvm_clone.agent import names
from kvm_clone.agent.disks import filesystem
from kvm_clone.agent.protocol.errors import LOCKED, UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.staging import records
from kvm_clone.agent.staging.asset_state import has_committed, in_commit, states
from kvm_clone.agent.staging.files import make_durable
from kvm_clone.agent.staging.journal import LEASE_SECONDS, Journal, elsewhere, look
from kvm_clone.agent.staging.lock import OperationLock, holder_of
from kvm_clone.agent.staging.records import Record
from kvm_clone.agent.staging.undo import undo_all

_DEFINITIONS = "/etc/libvirt/qemu"
"""Where libvirt keeps the definitions of its VMs."""

MOST_JOURNALS = 1000
"""Of one directory, that are reported: an answer has to fit into a message."""

_JUST_BEGUN: Dict[str, Any] = {
    "record": records.BEGIN,
    "operation": "",
    "name": "",
    "active": True,
    "holder": "an operation that has just begun",
    "foreign": "",
    "defining": False,
    "committed": False,
    "remove": [],
    "forget": [],
    "published": [],
    "disks": {},
}
"""What is known of an operation whose journal has no record yet."""


def staged(directories: List[str], name: Optional[str] = None) -> List[Dict[str, Any]]:
    """The interrupted and running operations whose journals lie in these directories; all, or those on one VM.

    The files that they name must lie in these directories too. One that is malformed has an `error` instead.
    """
    found: List[Dict[str, Any]] = []
    for directory in sorted(set(directories)):
        wanted, error = _journals_in(directory) if name is None else ([names.journal_path(directory, name)], "")
        for path in wanted:
            if os.path.lexists(path):
                found += _summary(directory, path, directories)
        if error:
            found.append({"directory": directory, "path": directory, "error": error})
    return found


def _journals_in(directory: str) -> Tuple[List[str], str]:
    """The paths of the journals in the directory, and why they may not be all."""
    try:
        found, more = filesystem.names_in(directory, [names.PREFIX], MOST_JOURNALS, names.JOURNAL)
    except (FileNotFoundError, NotADirectoryError):  # a pool's directory may be gone
        return [], ""
    except OSError as error:
        return [], str(error.strerror)
    left_out = f"it has more than {MOST_JOURNALS} journals, of which the others were not looked at" if more else ""
    return [os.path.join(directory, name) for name in found], left_out


def _summary(directory: str, path: str, directories: List[str]) -> List[Dict[str, Any]]:
    """What a journal says, or the `error` for which it does not count; nothing for one that says nothing yet."""
    where = {"directory": directory, "path": path}
    try:
        found = look(path)
        if not found.records:
            return [{**_JUST_BEGUN, **where, "changed": found.changed}] if found.active else []
        _check_name(path, found.records[0])
        records.in_directories(found.records, directories)
        return [{**_described(found.records, found.active), **where, "changed": found.changed}]
    except FileNotFoundError:  # it has just ended
        return []
    except (AgentError, OSError) as error:
        return [{**where, "error": str(from_exception(error))}]


def sweep(directories: List[str]) -> List[str]:
    """Remove what operations that had just begun have left: journals that say nothing and that nobody has; their paths.

    One that is younger than a lease may be about to say something.
    """
    removed: List[str] = []
    for directory in sorted(set(directories)):
        for path in _journals_in(directory)[0]:
            with contextlib.suppress(AgentError, OSError):  # whatever it is, it is more than nothing
                found = look(path)
                if not found.records and not found.active and abs(time.time() - found.changed) > LEASE_SECONDS:
                    removed += _removed_if_empty(path)
        with contextlib.suppress(OSError):
            removed += [path for path in filesystem.stale_probes(directory) if filesystem.remove_probe(path)]
    return removed


def _removed_if_empty(path: str) -> List[str]:
    """Remove a journal that says nothing, under its lock: somebody may have begun since it was looked at."""
    opened = Journal(path, resume=True)
    try:
        if opened.records:
            return []
        opened.remove()
        return [path]
    finally:
        opened.close()


def _described(entries: List[Record], locked: bool) -> Dict[str, Any]:
    begin = entries[0]
    define = next((entry for entry in reversed(entries) if entry["record"] == records.DEFINE), {})
    foreign = elsewhere(begin)
    holder = "" if foreign else holder_of(names.lock_path(begin["name"]))
    if locked and not holder:
        holder = f"operation {begin['operation']} on {foreign or 'this host'}"
    return {
        **begin,
        "active": bool(holder),
        "holder": holder,
        "foreign": foreign,
        "defining": in_commit(entries),
        "committed": has_committed(entries),
        "remove": define.get("remove", []),
        "forget": define.get("forget", []),
        "published": [state.final for state in states(entries).values() if state.is_published],
        # Of what another host has staged nothing is looked at.
        "disks": {} if foreign else {disk: state.as_dict() for disk, state in states(entries).items()},
    }


def _check_name(path: str, begin: Record) -> None:
    """Whoever can rename files there may have given it another VM's. Raises AgentError (unsupported)."""
    if path != names.journal_path(os.path.dirname(path), begin["name"]):
        raise AgentError(UNSUPPORTED, f"{path} is of an operation on {begin['name']}, whose journal has another name")


def check_earlier(journal: Journal, operation: str, directories: List[str]) -> None:
    """That the journal is of the operation which the controller has looked at, and of this host.

    Raises AgentError: locked when another one has taken its place, unsupported when it is none that we may touch.
    """
    begin = journal.records[0]
    if begin["operation"] != operation:
        raise AgentError(
            LOCKED, f"another operation, {begin['operation']}, has taken the place of {operation or 'none'}"
        )
    _check_name(journal.path, begin)
    foreign = elsewhere(begin)
    if foreign:
        raise AgentError(UNSUPPORTED, f"{journal.path} is of an operation on {foreign}, which alone can end it")
    records.in_directories(journal.records, directories)


def recover(directory: str, name: str, operation: str, directories: List[str]) -> List[str]:
    """Undo what an operation whose holder is dead had begun; what could not be undone is returned, and kept.

    Raises AgentError: locked while the holder lives or when another operation has taken its place, unsupported when
    the operation may have committed, or is none that we may touch.
    """
    lock = OperationLock(names.lock_path(name), {"recovering": name, "pid": os.getpid()})
    try:
        try:
            journal = Journal(names.journal_path(directory, name), resume=True)
        except FileNotFoundError:
            return []
        try:
            return discard(journal, operation, directories)
        finally:
            journal.close()
    finally:
        lock.release()


def discard(journal: Journal, operation: str, directories: List[str]) -> List[str]:
    """Undo an interrupted operation and remove its journal; what could not be undone, in which case it is kept."""
    left: List[str] = []
    if journal.records:
        check_earlier(journal, operation, directories)
        left = undo_all(journal.records)
    if not left:
        journal.remove()
    return left


def record_outcome(directory: str, name: str, operation: str, directories: List[str], *, committed: bool) -> None:
    """Journal on which side of its commit point an operation was interrupted, when libvirt has been asked."""
    lock = OperationLock(names.lock_path(name), {"settling": name, "pid": os.getpid()})
    try:
        journal = Journal(names.journal_path(directory, name), resume=True)
        try:
            if in_commit(journal.records):
                check_earlier(journal, operation, directories)
                if committed:
                    make_definitions_durable()
                journal.append(records.COMMITTED if committed else records.WITHDRAWN)
        finally:
            journal.close()
    finally:
        lock.release()


def make_definitions_durable() -> None:
    """Make sure that a power cut brings no definition back whose disks are about to go.

    libvirt makes the file durable that it puts in place of another, and not the directory.
    """
    with contextlib.suppress(OSError):  # libvirt of another make keeps them elsewhere
        make_durable(_DEFINITIONS)
