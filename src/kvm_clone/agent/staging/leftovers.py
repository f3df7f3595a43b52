"""What journals say of operations that were interrupted, or are under way, and the end of the interrupted ones."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Any, Dict, List, Optional, Tuple

from kvm_clone.agent import names
from kvm_clone.agent.disks import chain, filesystem, fingerprint, qemu
from kvm_clone.agent.disks.disk import Ranges, union
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol.errors import LOCKED, UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.staging import records
from kvm_clone.agent.staging.journal import LEASE_SECONDS, Journal, elsewhere, look, make_durable
from kvm_clone.agent.staging.lock import OperationLock, holder_of
from kvm_clone.agent.staging.records import Record

_PAST_COMMIT = (records.COMMITTED, records.MERGING, records.MERGED)
"""What is journalled when libvirt is known to have the definition."""

UNSETTLED = "an earlier attempt may have been committed; libvirt has to be asked first"

_DEFINITIONS = "/etc/libvirt/qemu"
"""Where libvirt keeps the definitions of its VMs."""

MOST_JOURNALS = 1000
"""Of one directory, that are told: an answer has to fit into a message."""

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


class DiskState:
    """What a journal says of one disk: its names, which ranges are durable, and its identity once published."""

    def __init__(self, record: Record) -> None:
        self.disk: str = record["disk"]
        self.part: str = record["part"]
        self.final: str = record["final"]
        self.size: int = record["size"]
        self.format: str = record["format"]
        self.backing: Dict[str, str] = record.get("backing") or {}
        self.durable: Ranges = ()
        self.identity: Optional[str] = None

    def add_durable(self, ranges: Ranges) -> None:
        """The ranges are durable too; what lies behind the disk's end is none of it."""
        self.durable = union(self.durable, [(start, min(end, self.size)) for start, end in ranges])

    @property
    def is_published(self) -> bool:
        """Whether the file has its final name, which may have become somebody else's."""
        return self.identity is not None and has_identity(self.final, self.identity)

    @property
    def path(self) -> str:
        """Where the file lies."""
        return self.final if self.is_published else self.part

    def _is_whole(self, about: os.stat_result) -> bool:
        """Whether the file can be filled further: a crash or a hand may have cut it short or torn it."""
        if self.backing and not fingerprint.is_still(self.backing["path"], self.backing["fingerprint"]):
            return False
        return about.st_size == self.size if self.format == chain.RAW else qemu.is_sound(self.path, self.format)

    def about(self) -> Optional[os.stat_result]:
        """The file, None if it is not there. Raises AgentError (unsupported) when it is no regular file."""
        try:
            about = os.lstat(self.path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(about.st_mode):
            raise AgentError(UNSUPPORTED, f"{self.path} is no regular file, and none of ours; it was left as it is")
        return about

    def as_dict(self) -> Dict[str, Any]:
        """The form that crosses the wire, with the bytes that the file takes, and those of content that it has."""
        about = self.about()
        durable = self.durable if self.durable and about and self._is_whole(about) else []
        return {
            "part": self.part,
            "final": self.final,
            "size": self.size,
            "format": self.format,
            "durable": sum(end - start for start, end in durable),
            "ranges": durable,
            "data": host_info.data_held(self.path, self.format) if durable else 0,
            "allocated": about.st_blocks * 512 if about else 0,
            "backing": self.backing.get("path", ""),
        }


def states(entries: List[Record]) -> Dict[str, DiskState]:
    """The state of each disk after these records."""
    found: Dict[str, DiskState] = {}
    for entry in entries:
        record = entry["record"]
        if record == records.CREATE:
            found[entry["disk"]] = DiskState(entry)
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
        "published": [state.final for state in states(entries).values() if state.path == state.final],
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


def settle(directory: str, name: str, operation: str, directories: List[str], *, committed: bool) -> None:
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


def undo_all(entries: List[Record], *, past_commit: bool = False) -> List[str]:
    """Undo the journalled steps in reverse and go on past a failure; the failures' texts."""
    if not past_commit and in_commit(entries):
        raise AgentError(UNSUPPORTED, UNSETTLED)
    left: List[str] = []
    for entry in reversed(entries):
        try:
            if entry["record"] == records.PUBLISH:
                _unlink_published(entry["final"], entry["identity"])
            elif entry["record"] == records.CREATE:
                unlink_file(entry["part"])
            elif entry["record"] == records.BEGIN:
                remove_marks(entry)
        except OSError as error:
            path = entry.get("final" if entry["record"] == records.PUBLISH else "part", "marks")
            left.append(str(from_exception(error, f"removing {path}")))
        except AgentError as error:
            left.append(str(error))
    return left


def remove_marks(begin: Record) -> None:
    """Remove the marks that the operation has left in directories."""
    for directory in begin.get("marks", []):
        unlink_file(names.mark_path(begin["operation"], directory))


def make_definitions_durable() -> None:
    """Make sure that a power cut brings no definition back whose disks are about to go.

    libvirt makes the file durable that it puts in place of another, and not the directory.
    """
    with contextlib.suppress(OSError):  # libvirt of another make keeps them elsewhere
        make_durable(_DEFINITIONS)


def unlink_file(path: str) -> None:
    """Remove a file of ours, durably, if it is there. Raises OSError; AgentError (unsupported) for what is no file."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise AgentError(UNSUPPORTED, f"{path} is no regular file, and none of ours; it was left as it is")
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    make_durable(os.path.dirname(path))


def has_identity(path: str, identity: str) -> bool:
    """Whether the file there is the one of this identity."""
    try:
        return fingerprint.identity(path) == identity
    except FileNotFoundError:
        return False


def _unlink_published(path: str, identity: str) -> None:
    """Remove the file if it is the one that was published: another one of that name is not ours."""
    if has_identity(path, identity):
        unlink_file(path)
