"""What an operation does to the destination's filesystem, and how it is undone.

Everything that is made is journalled before it is made, so that undoing needs the journal and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import hashlib
import os
import pwd
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, cast

from . import facts, filesystem, image, journal, merge, qemu, reflink
from .errors import EXISTS, IN_USE, IO, LOCKED, MISSING, UNSUPPORTED, AgentError, from_exception
from .lock import ImageLock, OperationLock, holder_of, is_written

_Step = TypeVar("_Step", bound=Callable[..., Any])

_PAST_COMMIT = (journal.COMMITTED, journal.MERGING, journal.MERGED)
"""What is journalled when libvirt is known to have the definition."""

MOST_JOURNALS = 1000
"""So many journals of one directory are told."""

_LINGERING = 10.0
"""Seconds that a receiver may take to notice that its controller was killed."""

_UNSETTLED = "an earlier attempt may have been committed; libvirt has to be asked first"

_DEFINITIONS = "/etc/libvirt/qemu"
"""Where libvirt keeps the definitions of its VMs."""

_LOCK_DIRECTORIES = ("/run/lock", "/var/lock", "/run")
"""Where a lock may lie, the first that exists. One place for each host, so that the lock covers every pool."""


def key_of(name: str) -> str:
    """A VM's name as a part of file names: names hold spaces, quotes and anything but a slash."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def journal_path(directory: str, name: str) -> str:
    """Where the journal of an operation on the VM `name` lies when its first disk lands in `directory`."""
    return os.path.join(directory, f".kvm-clone-{key_of(name)}.journal")


def lock_directory() -> str:
    """Where locks lie on this host."""
    return next(path for path in (*_LOCK_DIRECTORIES, "/tmp") if os.path.isdir(path))  # noqa: S108


def lock_path(name: str) -> str:
    """Where the lock on operations on the VM `name` lies."""
    return os.path.join(lock_directory(), f"kvm-clone-{key_of(name)}.lock")


def _one_at_a_time(step: _Step) -> _Step:
    """Calls run side by side, and the end of the operation must not overtake a step that is under way."""

    @functools.wraps(step)
    def waiting(self: Stage, *arguments: Any, **options: Any) -> Any:
        with self._turn:
            return step(self, *arguments, **options)

    return cast(_Step, waiting)


class Stage:
    """One operation's staged files, its journal and its lock, held by this process."""

    def __init__(
        self,
        directory: str,
        name: str,
        operation: str,
        about: Dict[str, Any],
        *,
        resume: bool = False,
        keep: bool = False,
        finishing: bool = False,
    ) -> None:
        """Take the lock and begin the journal.

        An earlier attempt whose holder is dead is continued with `resume`, else undone first. `keep`: what is staged
        outlives a controller that dies. `finishing`: the earlier attempt has committed, and what comes after that is
        taken up. Raises AgentError: locked; unsupported when an earlier attempt reached its commit point and libvirt
        has to be asked what became of it (see `settle`).
        """
        self.directory = directory
        self.name = name
        self.operation = operation
        self.keep = keep
        self._lock = OperationLock(lock_path(name), {"operation": operation, "pid": os.getpid(), **about})
        self._journal: Optional[journal.Journal] = None
        self._turn = threading.RLock()
        self._held: List[ImageLock] = []
        try:
            path = journal_path(directory, name)
            if finishing:
                self._finish_earlier(path)
            elif resume:
                self._go_on(path)
            else:
                self._begin(path, about)
        except BaseException:
            if self._journal is not None and not (resume or finishing):
                self._journal.remove()  # there is nothing yet that it would have to undo
                self._journal = None
            self.release()
            raise

    def _begin(self, path: str, about: Dict[str, Any]) -> None:
        if os.path.exists(path):
            left = undo_all(_replay_file(path))
            if left:
                raise AgentError(IO, f"an earlier attempt cannot be undone: {'; '.join(left)}")
            os.unlink(path)
        self._journal = journal.Journal(path)
        self._append(journal.BEGIN, operation=self.operation, name=self.name, started=time.time(), **about)

    def _open(self, path: str) -> List[journal.Record]:
        try:
            self._journal = journal.Journal(path, resume=True)
        except FileNotFoundError as error:
            raise AgentError(MISSING, f"there is no interrupted attempt to go on with at {path}") from error
        records = self._journal.records
        if not records or records[0]["operation"] != self.operation:
            raise AgentError(LOCKED, f"another operation has taken the place of {self.operation}")
        return records

    def _finish_earlier(self, path: str) -> None:
        if not has_committed(self._open(path)):
            raise AgentError(UNSUPPORTED, _UNSETTLED)

    def _go_on(self, path: str) -> None:
        records = self._open(path)
        if in_commit(records):
            raise AgentError(UNSUPPORTED, _UNSETTLED)
        for disk in states(records).values():
            _wait_for_receiver(disk.path)
            self._retract(disk)
            if disk.format == image.QCOW2 and os.path.exists(disk.part):
                qemu.repair(disk.part, disk.format)

    def _retract(self, disk: DiskState) -> None:
        """Give a published file its staged name back: the commit that it was published for has not come.

        The file's identity says how far an earlier run came with it: the record alone says nothing of that.
        """
        if disk.is_published:
            self._append(journal.RETRACT, disk=disk.disk)
            filesystem.give_name(disk.final, disk.part)
            journal.make_durable(os.path.dirname(disk.final))

    def _append(self, record: str, /, **fields: Any) -> None:
        if self._journal is None:
            raise AgentError(UNSUPPORTED, "the operation is over")
        try:
            self._journal.append(record, **fields)
        except OSError as error:
            raise from_exception(error, f"writing {self._journal.path}") from error

    def part_path(self, disk: str, final: str) -> str:
        """The temporary name of a disk, in the directory where it will live."""
        return os.path.join(os.path.dirname(final), f".kvm-clone-{self.operation}-{disk}.part")

    @_one_at_a_time
    def create(self, disk: str, final: str, spec: Dict[str, Any]) -> str:
        """Make the empty staged image; its path.

        `spec`: format, size in bytes, options, mode, user, group; `backing`: path and format of the image that it is
        an overlay on, if it is one; `copy_of`: the image whose blocks it shares at first, if it does.
        """
        part = self.part_path(disk, final)
        backing = spec.get("backing")
        try:
            if os.path.lexists(final):
                raise AgentError(EXISTS, f"{final} is there already; it was left as it is")
            _unlink(part)
            about = {"size": spec["size"], "format": spec["format"], "backing": _rests_on(backing)}
            self._append(journal.CREATE, disk=disk, part=part, final=final, **about)
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if spec.get("copy_of"):
                    reflink.clone(spec["copy_of"], fd)
            finally:
                os.close(fd)
            if spec.get("copy_of"):
                qemu.resize(part, spec["format"], spec["size"])
            elif spec["format"] == image.RAW:
                os.truncate(part, spec["size"])
            else:
                qemu.create(part, spec["format"], spec["size"], spec["options"], backing and tuple(backing))
            _own(part, spec)
            journal.make_durable(os.path.dirname(part))
        except OSError as error:
            raise from_exception(error, f"creating {part}") from error
        return part

    @_one_at_a_time
    def note(self, record: str, fields: Dict[str, Any]) -> None:
        """Journal that a step was taken (`copied`, `proven`) or is about to be (`define`), or is past (`committed`)."""
        if record == journal.COMMITTED:
            _make_definitions_durable()
        self._append(record, **fields)

    @_one_at_a_time
    def publish(self, disk: str, final: str) -> None:
        """Give the staged file its final name, which nothing may have. Raises AgentError (exists)."""
        part = self.part_path(disk, final)
        try:
            self._append(journal.PUBLISH, disk=disk, part=part, final=final, identity=_identity(part))
            filesystem.give_name(part, final)
            journal.make_durable(os.path.dirname(final))
        except OSError as error:
            raise from_exception(error, f"giving {part} its final name {final}") from error

    def _records(self) -> List[journal.Record]:
        if self._journal is None:
            raise AgentError(UNSUPPORTED, "the operation is over")
        return self._journal.records

    @property
    def is_over(self) -> bool:
        """Whether this process has nothing more to do with the operation."""
        return self._journal is None

    @_one_at_a_time
    def overlays(self) -> List[Dict[str, Any]]:
        """The overlays of the committed VM that are still there."""
        return [overlay._asdict() for overlay in merge.overlays(self._records())]

    @_one_at_a_time
    def merge(self) -> None:
        """Write every overlay into its base, and journal how those are then.

        Until `merged`, no VM can start on the overlays or on what is below.
        """
        records = self._records()
        found = merge.overlays(records)
        if not any(entry["record"] == journal.MERGING for entry in records):
            _check_below(found, states(records))
            self._append(journal.MERGING)
        for overlay in found:
            self._held += merge.merge(overlay)
        untouched = merge.is_as_committed(records)
        images = {one.disk: [one.base, facts.fingerprint(one.base)] for one in found}
        self._append(journal.MERGED, untouched=untouched, images=images)

    @_one_at_a_time
    def merged(self) -> None:
        """Remove the merged overlays: libvirt's definition no longer names them."""
        _make_definitions_durable()
        for overlay in merge.overlays(self._records()):
            _unlink(overlay.path)
        self._let_go()

    @_one_at_a_time
    def seal(self) -> Optional[Dict[str, str]]:
        """The fingerprint of each disk of the committed VM; None when somebody has written them since."""
        records = self._records()
        if not merge.is_untouched(records):
            return None
        return {disk: facts.fingerprint(path) for disk, (path, _) in merge.journalled_images(records).items()}

    def _let_go(self) -> None:
        for lock in self._held:
            lock.release()
        self._held = []

    @_one_at_a_time
    def undo(self, *, past_commit: bool = False) -> List[str]:
        """Undo everything, newest first, and end the operation. What could not be undone is returned, and kept.

        Once the journal says `define`, only a caller who knows that libvirt lacks the definition may undo:
        `past_commit`.
        """
        left: List[str] = []
        if self._journal is not None:
            left = undo_all(self._journal.records, past_commit=past_commit)
            if left:
                self._journal.close()
            else:
                self._journal.remove()
            self._journal = None
        self.release()
        return left

    @_one_at_a_time
    def finish(self) -> None:
        """End the operation: its result stays, and staged files that were not part of it go."""
        if self._journal is not None:
            for disk in states(self._journal.records).values():
                _unlink(disk.part)
            self._journal.remove()
            self._journal = None
        self.release()

    @_one_at_a_time
    def abandon(self) -> None:
        """The controller is gone: undo, unless it is to be kept or libvirt may have the definition already."""
        if self.keep or self._journal is None or in_commit(self._journal.records):
            self.release()
        else:
            self.undo()

    @_one_at_a_time
    def release(self) -> None:
        """Let go of journal and lock, and leave everything as it is, for another run to go on with."""
        self._let_go()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


class DiskState:
    """What a journal says of one disk: its names, how much is durable in bytes, and its identity once published."""

    def __init__(self, record: journal.Record) -> None:
        self.disk: str = record["disk"]
        self.part: str = record["part"]
        self.final: str = record["final"]
        self.size: int = record["size"]
        self.format: str = record["format"]
        self.backing: Dict[str, str] = record.get("backing") or {}
        self.durable = 0
        self.identity: Optional[str] = None

    @property
    def is_published(self) -> bool:
        """Whether the file has its final name, which may have become somebody else's."""
        return self.identity is not None and _has_identity(self.final, self.identity)

    @property
    def path(self) -> str:
        """Where the file lies."""
        return self.final if self.is_published else self.part

    def _is_whole(self, about: os.stat_result) -> bool:
        """Whether the file can be filled further: a crash or a hand may have cut it short or torn it."""
        if self.backing and not _is_still(self.backing):
            return False
        return about.st_size == self.size if self.format == image.RAW else qemu.is_sound(self.path, self.format)

    def as_dict(self) -> Dict[str, Any]:
        """The form that crosses the wire, with the bytes that the file takes, and those of content that it has."""
        try:
            about: Optional[os.stat_result] = os.stat(self.path)
        except FileNotFoundError:
            about = None
        durable = self.durable if self.durable and about and self._is_whole(about) else 0
        return {
            "part": self.part,
            "final": self.final,
            "size": self.size,
            "format": self.format,
            "durable": durable,
            "data": facts.data_held(self.path, self.format) if durable else 0,
            "allocated": about.st_blocks * 512 if about else 0,
            "backing": self.backing.get("path", ""),
        }


def states(records: List[journal.Record]) -> Dict[str, DiskState]:
    """The state of each disk after these records."""
    found: Dict[str, DiskState] = {}
    for entry in records:
        record = entry["record"]
        if record == journal.CREATE:
            found[entry["disk"]] = DiskState(entry)
        elif record == journal.DURABLE:
            found[entry["disk"]].durable = max(found[entry["disk"]].durable, entry["end"])
        elif record == journal.PUBLISH:
            found[entry["disk"]].identity = entry["identity"]
    return found


def in_commit(records: List[journal.Record]) -> bool:
    """Whether libvirt may have the definition: only it can say."""
    last = [entry["record"] for entry in records if entry["record"] in (journal.DEFINE, journal.WITHDRAWN)]
    return bool(last) and last[-1] == journal.DEFINE


def has_committed(records: List[journal.Record]) -> bool:
    """Whether libvirt is known to have the definition."""
    return in_commit(records) and records[-1]["record"] in _PAST_COMMIT


def staged(directories: List[str], name: Optional[str] = None) -> List[Dict[str, Any]]:
    """The interrupted and running operations whose journals lie in these directories; all, or those on one VM."""
    found: List[Dict[str, Any]] = []
    for directory in sorted(set(directories)):
        paths, error = _journals(directory) if name is None else ([journal_path(directory, name)], "")
        found += [_summary(directory, path) for path in paths if os.path.lexists(path)]
        if error:
            found.append({"directory": directory, "path": directory, "error": error})
    return found


def _journals(directory: str) -> Tuple[List[str], str]:
    """The paths of the journals in the directory, and why they may not be all."""
    try:
        names, more = filesystem.names_in(directory, [".kvm-clone-"], MOST_JOURNALS, ".journal")
    except (FileNotFoundError, NotADirectoryError):
        return [], ""
    except OSError as error:
        return [], str(error.strerror)
    left_out = f"it has more than {MOST_JOURNALS} journals, of which the others were not looked at" if more else ""
    return [os.path.join(directory, name) for name in names], left_out


def _summary(directory: str, path: str) -> Dict[str, Any]:
    """What a journal says, or the `error` that keeps it from being read."""
    try:
        records = _replay_file(path)
    except (AgentError, OSError) as error:
        return {"directory": directory, "path": path, "error": str(error)}
    if not records:
        return {"directory": directory, "path": path, "error": "the journal is empty: its operation had just begun"}
    define = next((entry for entry in reversed(records) if entry["record"] == journal.DEFINE), {})
    holder = holder_of(lock_path(records[0]["name"]))
    return {
        **records[0],
        "directory": directory,
        "path": path,
        "changed": os.stat(path).st_mtime,
        "active": bool(holder),
        "holder": holder,
        "defining": in_commit(records),
        "committed": has_committed(records),
        "remove": define.get("remove", []),
        "forget": define.get("forget", []),
        "published": [state.final for state in states(records).values() if state.path == state.final],
        "disks": {disk: state.as_dict() for disk, state in states(records).items()},
    }


def _wait_for_receiver(path: str) -> None:
    """Wait until nobody writes the staged file. Raises AgentError (locked)."""
    deadline = time.monotonic() + _LINGERING
    while is_written(path):
        if time.monotonic() >= deadline:
            raise AgentError(LOCKED, f"the receiver of the interrupted attempt still writes {path}")
        time.sleep(0.05)


def recover(directory: str, name: str) -> List[str]:
    """Undo what an operation whose holder is dead had begun; what could not be undone is returned, and kept.

    Raises AgentError: locked while the holder lives, unsupported when the operation may have committed.
    """
    path = journal_path(directory, name)
    lock = OperationLock(lock_path(name), {"recovering": name, "pid": os.getpid()})
    try:
        if not os.path.exists(path):
            return []
        left = undo_all(_replay_file(path))
        if not left:
            os.unlink(path)
        return left
    finally:
        lock.release()


def settle(directory: str, name: str, *, committed: bool) -> None:
    """Journal on which side of its commit point an operation was interrupted, when libvirt has been asked."""
    lock = OperationLock(lock_path(name), {"settling": name, "pid": os.getpid()})
    try:
        log = journal.Journal(journal_path(directory, name), resume=True)
        try:
            if in_commit(log.records):
                if committed:
                    _make_definitions_durable()
                log.append(journal.COMMITTED if committed else journal.WITHDRAWN)
        finally:
            log.close()
    finally:
        lock.release()


def remove_files(paths: List[str]) -> List[Dict[str, str]]:
    """Remove files; for each its `path` and what came of it: `removed`, `missing`, or the `error`."""
    done = []
    for path in paths:
        try:
            _unlink_there(path)
            done.append({"path": path, "result": "removed"})
        except FileNotFoundError:
            done.append({"path": path, "result": "missing"})
        except OSError as error:
            done.append({"path": path, "result": "error", "error": str(error.strerror)})
    return done


def _unlink_there(path: str) -> None:
    os.unlink(path)
    journal.make_durable(os.path.dirname(path))


def _make_definitions_durable() -> None:
    """Make sure that a power cut brings no definition back whose disks are about to go.

    libvirt makes the file durable that it puts in place of another, and not the directory.
    """
    with contextlib.suppress(OSError):  # libvirt of another make keeps them elsewhere
        journal.make_durable(_DEFINITIONS)


def _replay_file(path: str) -> List[journal.Record]:
    with open(path, "rb") as file:
        return journal.replay(file.read())


def undo_all(records: List[journal.Record], *, past_commit: bool = False) -> List[str]:
    """Undo the journalled steps in reverse and go on past a failure; the failures' texts."""
    if not past_commit and in_commit(records):
        raise AgentError(UNSUPPORTED, _UNSETTLED)
    left: List[str] = []
    for entry in reversed(records):
        try:
            if entry["record"] == journal.PUBLISH:
                _unlink_published(entry["final"], entry["identity"])
            elif entry["record"] == journal.CREATE:
                _unlink(entry["part"])
        except OSError as error:
            path = entry["final" if entry["record"] == journal.PUBLISH else "part"]
            left.append(str(from_exception(error, f"removing {path}")))
    return left


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _unlink_there(path)


def _identity(path: str) -> str:
    """By which a file is known again, for nobody writes it before the commit: inode, size and mtime.

    Not the device, whose number is another one after some reboots.
    """
    about = os.lstat(path)
    return f"{filesystem.lasting_inode(about)}:{about.st_size}:{about.st_mtime_ns}"


def _has_identity(path: str, identity: str) -> bool:
    try:
        return _identity(path) == identity
    except FileNotFoundError:
        return False


def _unlink_published(path: str, identity: str) -> None:
    """Remove the file if it is the one that was published: another one of that name is not ours."""
    if _has_identity(path, identity):
        _unlink(path)


def _rests_on(backing: Optional[List[str]]) -> Optional[Dict[str, str]]:
    """What the journal says of the image that an overlay rests on: path, format and fingerprint."""
    if backing is None:
        return None
    return {"path": backing[0], "format": backing[1], "fingerprint": facts.fingerprint(backing[0])}


def _is_still(backing: Dict[str, str]) -> bool:
    """Whether the image that an overlay rests on is as it was: on another one the overlay says nothing."""
    return merge.is_still(backing["path"], backing["fingerprint"])


def _check_below(overlays: List[merge.Overlay], disks: Dict[str, DiskState]) -> None:
    """What an overlay holds fits the image that it was made on, as that was. Raises AgentError (in use)."""
    for overlay in overlays:
        state = disks.get(overlay.disk)
        if state is not None and state.backing and not _is_still(state.backing):
            raise AgentError(
                IN_USE,
                f"{overlay.base} was written since {overlay.path} was made on it, perhaps by a guest that was resumed "
                "from an older saved state: the two do not fit together",
            )


def _own(path: str, spec: Dict[str, Any]) -> None:
    """Mode and owner as at the source, as far as this host has the owner and we may give files away."""
    filesystem.own(path, spec["mode"], _id_of(pwd.getpwnam, spec["user"]), _id_of(grp.getgrnam, spec["group"]))


def _id_of(look_up: Any, name: str) -> int:
    """A user's or group's number, or root's where the name is unknown: libvirt gives the file to QEMU at its start."""
    try:
        return int(look_up(name)[2])
    except KeyError:
        return 0
