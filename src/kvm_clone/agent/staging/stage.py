"""What an operation does to the destination's filesystem, and how it is undone.

Everything that is made is journalled before it is made, so that undoing needs the journal and nothing else. It is done
by the process that holds the operation's lock (hold.py), and ends with it.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import threading
import time
from typing import Any, Dict, List, Optional

from kvm_clone.agent import names
from kvm_clone.agent.disks import chain, filesystem, fingerprint, image, qemu, reflink
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.host.this_host import this_host
from kvm_clone.agent.protocol.errors import EXISTS, IN_USE, IO, LOCKED, MISSING, UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.staging import journal, leftovers, merge, records
from kvm_clone.agent.staging.hold import Hold, one_at_a_time
from kvm_clone.agent.staging.lock import is_written

_LINGERING = 10.0
"""Seconds that a receiver may take to notice that its controller was killed."""


class Stage(Hold):
    """One operation's staged files, its journal and its lock, held by this process."""

    def __init__(
        self,
        directory: str,
        name: str,
        operation: str,
        about: Dict[str, Any],
        *,
        directories: List[str],
        resume: bool = False,
        keep: bool = False,
        finishing: bool = False,
        discards: str = "",
        marks: Optional[List[str]] = None,
    ) -> None:
        """Take the lock and begin the journal.

        `directories`: where disks of this VM may lie; a journal that names others is none of ours. An earlier attempt
        whose holder is dead is continued with `resume`; else it is undone first, if it is `discards`. `keep`: what is
        staged outlives a controller that dies. `finishing`: the earlier attempt has committed, and what comes after
        that is taken up. `marks`: directories in which another host shall be able to see that it shares them.

        Raises AgentError: locked; unsupported when an earlier attempt reached its commit point and libvirt has to be
        asked what became of it (see `leftovers.settle`), or is none that we may touch.
        """
        super().__init__(name, {"operation": operation, **about})
        self.directory = directory
        self.operation = operation
        self.keep = keep
        self._directories = directories
        self._journal: Optional[journal.Journal] = None
        self._ending = threading.Event()
        self._held: List[ImageLock] = []
        self._marked: List[str] = []
        try:
            path = names.journal_path(directory, name)
            if finishing:
                self._finish_earlier(path)
            elif resume:
                self._go_on(path)
            else:
                self._begin(path, discards, {**about, "marks": marks or []})
            self._make_marks(marks or [])
        except BaseException:
            if self._journal is not None and not (resume or finishing):
                leftovers.undo_all(self._journal.records)
                self._journal.remove()
                self._journal = None
            self.release()
            raise

    def _begin(self, path: str, discards: str, about: Dict[str, Any]) -> None:
        if os.path.lexists(path):
            earlier = journal.Journal(path, resume=True)
            try:
                left = leftovers.discard(earlier, discards, self._directories)
            finally:
                earlier.close()
            if left:
                raise AgentError(IO, f"an earlier attempt cannot be undone: {'; '.join(left)}")
        try:
            self._journal = journal.Journal(path)
        except OSError as error:
            raise from_exception(error, f"beginning the journal {path}") from error
        host = this_host()._asdict()
        self._append(records.BEGIN, operation=self.operation, name=self.name, started=time.time(), host=host, **about)

    def _open(self, path: str) -> List[records.Record]:
        try:
            self._journal = journal.Journal(path, resume=True)
        except FileNotFoundError as error:
            raise AgentError(MISSING, f"there is no interrupted attempt to go on with at {path}") from error
        if not self._journal.records:
            raise AgentError(MISSING, f"there is no interrupted attempt to go on with at {path}: it had just begun")
        leftovers.check_earlier(self._journal, self.operation, self._directories)
        return self._journal.records

    def _finish_earlier(self, path: str) -> None:
        if not leftovers.has_committed(self._open(path)):
            raise AgentError(UNSUPPORTED, leftovers.UNSETTLED)

    def _go_on(self, path: str) -> None:
        entries = self._open(path)
        if leftovers.in_commit(entries):
            raise AgentError(UNSUPPORTED, leftovers.UNSETTLED)
        for disk in leftovers.states(entries).values():
            there = disk.about()  # anything but a file at our name is refused here
            _wait_for_receiver(disk.path)
            self._retract(disk)
            if there is not None and disk.format == image.QCOW2:
                qemu.repair(disk.part, disk.format)

    def _retract(self, disk: leftovers.DiskState) -> None:
        """Give a published file its staged name back: the commit that it was published for has not come.

        The file's identity says how far an earlier run came with it: the record alone says nothing of that.
        """
        if disk.is_published:
            self._append(records.RETRACT, disk=disk.disk)
            filesystem.give_name(disk.final, disk.part)
            journal.make_durable(os.path.dirname(disk.final))

    def _make_marks(self, directories: List[str]) -> None:
        """Make a file in each directory, with its path, by which a host that sees the same directory knows it."""
        for directory in directories:
            path = names.mark_path(self.operation, directory)
            if directory not in self._records()[0].get("marks", []):
                self._marked.append(directory)
            try:
                leftovers.unlink_file(path)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    os.write(fd, os.fsencode(directory))
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise from_exception(error, f"marking {directory}") from error

    def _append(self, record: str, /, **fields: Any) -> None:
        if self._journal is None:
            raise AgentError(UNSUPPORTED, "the operation is over")
        self.check()
        records.check_next(self._journal.records, {"record": record, **fields})
        try:
            self._journal.append(record, **fields)
        except OSError as error:
            raise from_exception(error, f"writing {self._journal.path}") from error

    @property
    def is_held(self) -> bool:
        """Whether the lock and the journal are still ours."""
        return super().is_held and (self._journal is None or self._journal.is_ours)

    def renew(self) -> None:
        """See Hold."""
        if self._journal is not None:
            self._journal.renew()

    @one_at_a_time
    def unmark(self) -> None:
        """Remove the marks: whoever shares the directories has looked."""
        self.check()
        leftovers.remove_marks(self._records()[0])
        self._remove_own_marks()

    def _remove_own_marks(self) -> None:
        """Remove the marks in directories that the journal does not name: those of a run that continues another."""
        while self._marked:
            leftovers.unlink_file(names.mark_path(self.operation, self._marked.pop()))

    @one_at_a_time
    def create(self, disk: str, final: str, spec: Dict[str, Any]) -> str:
        """Make the empty staged image; its path.

        `spec`: format, size in bytes, options, mode, user, group; `backing`: path and format of the image that it is
        an overlay on, if it is one; `copy_of`: the image whose blocks it shares at first, if it does.
        """
        part = names.part_path(self.operation, disk, final)
        backing = spec.get("backing")
        self._records()
        self.check()
        try:
            if os.path.lexists(final):
                raise AgentError(EXISTS, f"{final} is there already; it was left as it is")
            leftovers.unlink_file(part)
            about = {"size": spec["size"], "format": spec["format"], "backing": _rests_on(backing)}
            self._append(records.CREATE, disk=disk, part=part, final=final, **about)
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if spec.get("copy_of"):
                    reflink.clone(spec["copy_of"], fd)
            finally:
                os.close(fd)
            _make_image(part, spec, backing)
            _own(part, spec)
            if backing or spec.get("copy_of"):  # where nothing differs, nothing else makes it durable
                image.settle(part)
            journal.make_durable(os.path.dirname(part))
        except OSError as error:
            raise from_exception(error, f"creating {part}") from error
        return part

    @one_at_a_time
    def note(self, record: str, fields: Dict[str, Any]) -> None:
        """Journal that a step was taken (`copied`, `proven`) or is about to be (`define`), or is past (`committed`)."""
        if record == records.COMMITTED:
            leftovers.make_definitions_durable()
        self._append(record, **fields)

    @one_at_a_time
    def publish(self, disk: str, final: str) -> None:
        """Give the staged file its final name, which nothing may have. Raises AgentError (exists)."""
        part = names.part_path(self.operation, disk, final)
        try:
            self._append(records.PUBLISH, disk=disk, part=part, final=final, identity=fingerprint.identity(part))
            filesystem.give_name(part, final)
            journal.make_durable(os.path.dirname(final))
        except OSError as error:
            raise from_exception(error, f"giving {part} its final name {final}") from error

    def _records(self) -> List[records.Record]:
        if self._journal is None:
            raise AgentError(UNSUPPORTED, "the operation is over")
        return self._journal.records

    @property
    def is_over(self) -> bool:
        """See Hold."""
        return self._journal is None

    @one_at_a_time
    def overlays(self) -> List[Dict[str, Any]]:
        """The overlays of the committed VM that are still there."""
        return [overlay._asdict() for overlay in merge.overlays(self._records())]

    @one_at_a_time
    def merge(self) -> None:
        """Write every overlay into its base, and journal how those are then.

        Until `merged`, no VM can start on the overlays or on what is below. Ends early, with AgentError (interrupted),
        when the operation is let go of meanwhile.
        """
        self.check()
        entries = self._records()
        found = merge.overlays(entries)
        if not any(entry["record"] == records.MERGING for entry in entries):
            _check_below(found, leftovers.states(entries))
            self._append(records.MERGING)
        for overlay in found:
            self._held += merge.merge(overlay, self._ending)
        untouched = merge.is_as_committed(entries)
        images = {one.disk: [one.base, fingerprint.of(one.base)] for one in found}
        self._append(records.MERGED, untouched=untouched, images=images)

    @one_at_a_time
    def merged(self) -> None:
        """Remove the merged overlays: libvirt's definition no longer names them."""
        self.check()
        leftovers.make_definitions_durable()
        for overlay in merge.overlays(self._records()):
            leftovers.unlink_file(overlay.path)
        self._let_go()

    @one_at_a_time
    def seal(self) -> Optional[Dict[str, str]]:
        """The fingerprint of each disk of the committed VM; None when somebody has written them since."""
        entries = self._records()
        if not merge.is_untouched(entries):
            return None
        return {disk: fingerprint.of(path) for disk, (path, _) in merge.journalled_images(entries).items()}

    def _let_go(self) -> None:
        for lock in self._held:
            lock.release()
        self._held = []

    @one_at_a_time
    def undo(self, *, past_commit: bool = False) -> List[str]:
        """Undo everything, newest first, and end the operation. What could not be undone is returned, and kept.

        Once the journal says `define`, only a caller who knows that libvirt lacks the definition may undo:
        `past_commit`.
        """
        left: List[str] = []
        if self._journal is not None:
            self.check()
            if past_commit or not leftovers.in_commit(self._journal.records):
                self.close_fences()
            left = leftovers.undo_all(self._journal.records, past_commit=past_commit)
            if left:
                self._journal.close()
            else:
                self._journal.remove()
            self._journal = None
        self.release()
        return left

    @one_at_a_time
    def finish(self) -> None:
        """End the operation: its result stays, and staged files that were not part of it go."""
        if self._journal is not None:
            self.check()
            self.close_fences()
            for disk in leftovers.states(self._journal.records).values():
                leftovers.unlink_file(disk.part)
            leftovers.remove_marks(self._journal.records[0])
            self._journal.remove()
            self._journal = None
        self.release()

    def abandon(self) -> None:
        """The controller is gone: undo, unless it is to be kept or libvirt may have the definition already."""
        self._ending.set()
        with self._turn:
            if self.keep or self._journal is None or leftovers.in_commit(self._journal.records):
                self.release()
            elif self.is_held:
                self.undo()
            else:
                self.release()

    def release(self) -> None:
        """Let go of journal and lock, and leave everything as it is, for another run to go on with.

        A merge that is under way ends first, unfinished.
        """
        self._ending.set()
        with self._turn:
            self.close_fences()
            self._let_go()
            if self.is_held:
                with contextlib.suppress(OSError, AgentError):  # what it is, the next run that marks there says
                    self._remove_own_marks()
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            super().release()


def _wait_for_receiver(path: str) -> None:
    """Wait until nobody writes the staged file. Raises AgentError (locked)."""
    deadline = time.monotonic() + _LINGERING
    while is_written(path):
        if time.monotonic() >= deadline:
            raise AgentError(LOCKED, f"the receiver of the interrupted attempt still writes {path}")
        time.sleep(0.05)


def _make_image(part: str, spec: Dict[str, Any], backing: Optional[List[str]]) -> None:
    if spec.get("copy_of"):
        qemu.resize(part, spec["format"], spec["size"])
    elif spec["format"] == image.RAW:
        os.truncate(part, spec["size"])
    else:
        below = chain.Node(*backing) if backing else None
        qemu.create(part, spec["format"], spec["size"], spec["options"], below)


def _rests_on(backing: Optional[List[str]]) -> Optional[Dict[str, str]]:
    """What the journal says of the image that an overlay rests on: path, format and fingerprint."""
    if backing is None:
        return None
    return {"path": backing[0], "format": backing[1], "fingerprint": fingerprint.of(backing[0])}


def _check_below(overlays: List[merge.Overlay], disks: Dict[str, leftovers.DiskState]) -> None:
    """What an overlay holds fits the image that it was made on, as that was. Raises AgentError (in use)."""
    for overlay in overlays:
        state = disks.get(overlay.disk)
        backing = state.backing if state is not None else {}
        if backing and not fingerprint.is_still(backing["path"], backing["fingerprint"]):
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
