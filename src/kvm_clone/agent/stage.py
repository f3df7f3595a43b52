"""What an operation does to the destination's filesystem, and how it is undone.

Everything that is made is journalled before it is made, so that undoing needs the journal and nothing else.
"""

from __future__ import annotations

import functools
import grp
import hashlib
import os
import pwd
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, cast

from . import image, journal, qemu
from .errors import EXISTS, IO, UNSUPPORTED, AgentError, from_exception
from .lock import OperationLock

_Step = TypeVar("_Step", bound=Callable[..., Any])

_LOCK_DIRECTORIES = ("/run/lock", "/var/lock", "/run")
"""Where a lock may lie, the first that exists. One place for each host, so that the lock covers every pool."""


def key_of(name: str) -> str:
    """A VM's name as a part of file names: names hold spaces, quotes and anything but a slash."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def journal_path(directory: str, name: str) -> str:
    """Where the journal of an operation on the VM `name` lies when its first disk lands in `directory`."""
    return os.path.join(directory, f".kvm-clone-{key_of(name)}.journal")


def lock_path(name: str) -> str:
    """Where the lock on operations on the VM `name` lies."""
    directory = next(path for path in (*_LOCK_DIRECTORIES, "/tmp") if os.path.isdir(path))  # noqa: S108
    return os.path.join(directory, f"kvm-clone-{key_of(name)}.lock")


def _one_at_a_time(step: _Step) -> _Step:
    """Calls run side by side, and the end of the operation must not overtake a step that is under way."""

    @functools.wraps(step)
    def waiting(self: Stage, *arguments: Any, **options: Any) -> Any:
        with self._turn:
            return step(self, *arguments, **options)

    return cast(_Step, waiting)


class Stage:
    """One operation's staged files, its journal and its lock, held by this process."""

    def __init__(self, directory: str, name: str, operation: str, about: Dict[str, Any]) -> None:
        """Take the lock and begin the journal.

        An earlier attempt whose holder is dead is undone first. Raises AgentError: locked; unsupported when an earlier
        attempt reached its commit point and libvirt has to be asked what became of it (see `unsettled`).
        """
        self.directory = directory
        self.name = name
        self.operation = operation
        self._lock = OperationLock(lock_path(name), {"operation": operation, "pid": os.getpid(), **about})
        self._journal: Optional[journal.Journal] = None
        self._turn = threading.RLock()
        try:
            path = journal_path(directory, name)
            if os.path.exists(path):
                left = undo_all(_replay_file(path))
                if left:
                    raise AgentError(IO, f"an earlier attempt cannot be undone: {'; '.join(left)}")
                os.unlink(path)
            self._journal = journal.Journal(path)
            self._append(journal.BEGIN, operation=operation, name=name, started=time.time(), **about)
        except BaseException:
            if self._journal is not None:
                self._journal.remove()  # there is nothing yet that it would have to undo
                self._journal = None
            self.release()
            raise

    def _append(self, record: str, /, **fields: Any) -> None:
        if self._journal is None:
            raise AgentError(UNSUPPORTED, "the operation is over")
        self._journal.append(record, **fields)

    def part_path(self, disk: str, final: str) -> str:
        """The temporary name of a disk, in the directory where it will live."""
        return os.path.join(os.path.dirname(final), f".kvm-clone-{self.operation}-{disk}.part")

    @_one_at_a_time
    def create(self, disk: str, final: str, spec: Dict[str, Any]) -> str:
        """Make the empty staged image; its path. `spec`: format, size in bytes, options, mode, user, group."""
        part = self.part_path(disk, final)
        try:
            if os.path.lexists(final):
                raise AgentError(EXISTS, f"{final} is there already; it was left as it is")
            self._append(journal.CREATE, disk=disk, part=part)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if spec["format"] == image.RAW:
                os.truncate(part, spec["size"])
            else:
                qemu.create(part, spec["format"], spec["size"], spec["options"])
            _own(part, spec)
            journal.make_durable(os.path.dirname(part))
        except OSError as error:
            raise from_exception(error, f"creating {part}") from error
        return part

    @_one_at_a_time
    def note(self, record: str, fields: Dict[str, Any]) -> None:
        """Journal that a step was taken (`copied`, `proven`) or is about to be (`define`), or is past (`committed`)."""
        self._append(record, **fields)

    @_one_at_a_time
    def publish(self, disk: str, final: str) -> None:
        """Give the staged file its final name, which nothing may have. Raises AgentError (exists)."""
        part = self.part_path(disk, final)
        try:
            about = os.stat(part)
            self._append(journal.PUBLISH, disk=disk, part=part, final=final, device=about.st_dev, inode=about.st_ino)
            os.link(part, final)  # unlike rename, never replaces what is there
            os.unlink(part)
            journal.make_durable(os.path.dirname(final))
        except OSError as error:
            raise from_exception(error, f"giving {part} its final name {final}") from error

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
        """End the operation: its result stays."""
        if self._journal is not None:
            self._journal.remove()
            self._journal = None
        self.release()

    @_one_at_a_time
    def abandon(self) -> None:
        """The controller is gone: undo, unless libvirt may have the definition already."""
        if self._journal is None or any(entry["record"] == journal.DEFINE for entry in self._journal.records):
            self.release()
        else:
            self.undo()

    def release(self) -> None:
        """Let go of journal and lock, and leave everything as it is."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


def unsettled(directory: str, name: str) -> Optional[Dict[str, Any]]:
    """An earlier operation that may have committed: its `operation`, and whether `committed` is certain."""
    path = journal_path(directory, name)
    if not os.path.exists(path):
        return None
    records = _replay_file(path)
    names = {entry["record"] for entry in records}
    if journal.DEFINE not in names:
        return None
    return {"operation": records[0]["operation"], "committed": journal.COMMITTED in names}


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


def settle(directory: str, name: str, *, committed: bool) -> List[str]:
    """End an unsettled operation, when libvirt was asked: keep its files if it has committed, undo them if not."""
    path = journal_path(directory, name)
    lock = OperationLock(lock_path(name), {"settling": name, "pid": os.getpid()})
    try:
        left = [] if committed else undo_all(_replay_file(path), past_commit=True)
        if not left:
            os.unlink(path)
        return left
    finally:
        lock.release()


def _replay_file(path: str) -> List[journal.Record]:
    with open(path, "rb") as file:
        return journal.replay(file.read())


def undo_all(records: List[journal.Record], *, past_commit: bool = False) -> List[str]:
    """Undo the journalled steps in reverse and go on past a failure; the failures' texts."""
    if not past_commit and any(entry["record"] == journal.DEFINE for entry in records):
        raise AgentError(UNSUPPORTED, "an earlier attempt may have been committed; libvirt has to be asked first")
    left: List[str] = []
    for entry in reversed(records):
        try:
            if entry["record"] == journal.PUBLISH:
                _unlink_inode(entry["final"], (entry["device"], entry["inode"]))
            elif entry["record"] == journal.CREATE:
                _unlink(entry["part"])
        except OSError as error:
            left.append(str(from_exception(error, f"removing {error.filename}")))
    return left


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    journal.make_durable(os.path.dirname(path))


def _unlink_inode(path: str, identity: Tuple[int, int]) -> None:
    """Remove the file if it is the one that was published: another one of that name is not ours."""
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        return
    if (about.st_dev, about.st_ino) == identity:
        _unlink(path)


def _own(path: str, spec: Dict[str, Any]) -> None:
    """Mode and owner as at the source, as far as this host has the owner and we may give files away."""
    os.chmod(path, spec["mode"])
    if os.geteuid() == 0:
        os.chown(path, _id_of(pwd.getpwnam, spec["user"]), _id_of(grp.getgrnam, spec["group"]))


def _id_of(look_up: Any, name: str) -> int:
    """A user's or group's number, or root's where the name is unknown: libvirt gives the file to QEMU at its start."""
    try:
        return int(look_up(name)[2])
    except KeyError:
        return 0
