"""What an operation does to the destination's filesystem, and how it is undone.

Everything that is made is journalled before it is made, so that undoing needs the journal and nothing else. It is done
by the process that holds the operation's lock (hold.py), and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Dict, List, Optional

from kvm_clone.agent import names
from kvm_clone.agent.disks import fingerprint, image, qemu
from kvm_clone.agent.host.this_host import this_host
from kvm_clone.agent.protocol.errors import EXISTS, IO, LOCKED, MISSING, UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.staging import journal, leftovers, marks, merger, records, stores, undo
from kvm_clone.agent.staging.asset_state import AssetState, has_committed, in_commit, states
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
        asked what became of it (see `leftovers.record_outcome`), or is none that we may touch.
        """
        super().__init__(name, {"operation": operation, **about})
        self.directory = directory
        self.operation = operation
        self.keep = keep
        self._directories = directories
        self._journal: Optional[journal.Journal] = None
        self._merger = merger.Merger(self._append)
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
                undo.undo_all(self._journal.records)
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
            raise AgentError(MISSING, f"there is no interrupted attempt to resume at {path}") from error
        if not self._journal.records:
            raise AgentError(MISSING, f"there is no interrupted attempt to resume at {path}: it had just begun")
        leftovers.check_earlier(self._journal, self.operation, self._directories)
        return self._journal.records

    def _finish_earlier(self, path: str) -> None:
        if not has_committed(self._open(path)):
            raise AgentError(UNSUPPORTED, undo.UNSETTLED)

    def _go_on(self, path: str) -> None:
        entries = self._open(path)
        if in_commit(entries):
            raise AgentError(UNSUPPORTED, undo.UNSETTLED)
        for asset in states(entries).values():
            there = asset.look()  # anything but one at our path is refused here
            _wait_for_receiver(asset.path)
            self._retract(asset)
            if there is not None and asset.format == image.QCOW2:
                qemu.repair(asset.part, asset.format)

    def _retract(self, asset: AssetState) -> None:
        """Give a published asset its staged path back: the commit that it was published for has not come.

        Its identity says how far an earlier run came with it: the record alone says nothing of that.
        """
        if asset.is_published:
            self._append(records.RETRACT, disk=asset.key)
            asset.store.retract(asset.final, asset.part)

    def _make_marks(self, directories: List[str]) -> None:
        for directory in directories:
            if directory not in self._records()[0].get("marks", []):
                self._marked.append(directory)
            marks.make(self.operation, directory)

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
        marks.remove_all(self._records()[0])
        self._remove_own_marks()

    def _remove_own_marks(self) -> None:
        """Remove the marks in directories that the journal does not name: those of a run that continues another."""
        while self._marked:
            marks.remove(self.operation, [self._marked.pop()])

    @one_at_a_time
    def create(self, disk: str, final: str, spec: Dict[str, Any]) -> str:
        """Make the empty staged asset; its path. `spec`: see Store.create, and `store`: see stores.of."""
        store = stores.of(spec)
        part = store.part(self.operation, disk, final)
        earlier = states(self._records()).get(disk)
        self.check()
        try:
            ours = store.marks_names or (earlier is not None and earlier.part == part and earlier.is_ours)
            if (part != final or not ours) and store.holds(final):
                raise AgentError(EXISTS, f"{final} is there already; it was left as it is")
            if ours:
                store.remove(part)
            self._append(records.CREATE, **records.created(disk, part, final, spec, _rests_on(spec.get("backing"))))
            store.create(part, spec)
            if not store.marks_names:
                self._append(records.MADE, disk=disk, identity=store.identity(part))
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
        asset = states(self._records()).get(disk)
        if asset is None:
            raise AgentError(UNSUPPORTED, f"there is no staged {disk}")
        part, store = asset.part, asset.store
        try:
            self._append(records.PUBLISH, disk=disk, part=part, final=final, identity=store.identity(part))
            store.publish(part, final)
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
        return merger.overlays(self._records())

    @one_at_a_time
    def merge(self) -> None:
        """See Merger.merge."""
        self.check()
        self._merger.merge(self._records())

    @one_at_a_time
    def merged(self) -> None:
        """See Merger.remove_merged."""
        self.check()
        leftovers.make_definitions_durable()
        self._merger.remove_merged(self._records())

    @one_at_a_time
    def seal(self) -> Optional[Dict[str, str]]:
        """See merger.seal."""
        return merger.seal(self._records())

    @one_at_a_time
    def undo(self, *, past_commit: bool = False) -> List[str]:
        """Undo everything, newest first, and end the operation. What could not be undone is returned, and kept.

        Once the journal says `define`, only a caller who knows that libvirt lacks the definition may undo:
        `past_commit`.
        """
        left: List[str] = []
        if self._journal is not None:
            self.check()
            if past_commit or not in_commit(self._journal.records):
                self.close_fences()
            left = undo.undo_all(self._journal.records, past_commit=past_commit)
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
            for asset in states(self._journal.records).values():
                if asset.part != asset.final or not asset.is_published:
                    asset.remove_staged()
            marks.remove_all(self._journal.records[0])
            self._journal.remove()
            self._journal = None
        self.release()

    def abandon(self) -> None:
        """The controller is gone: undo, unless it is to be kept or libvirt may have the definition already."""
        self._merger.stop()
        with self._turn:
            if self.keep or self._journal is None or in_commit(self._journal.records):
                self.release()
            elif self.is_held:
                self.undo()
            else:
                self.release()

    def release(self) -> None:
        """Release journal and lock, and leave everything as it is, for another run to resume.

        A merge that is under way ends first, unfinished.
        """
        self._merger.stop()
        with self._turn:
            self.close_fences()
            self._merger.release()
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


def _rests_on(backing: Optional[List[str]]) -> Optional[Dict[str, str]]:
    """What the journal says of the image that an overlay rests on: path, format and fingerprint."""
    if backing is None:
        return None
    return {"path": backing[0], "format": backing[1], "fingerprint": fingerprint.of(backing[0])}
