"""The steps that plans are made of, each with its description for people.

What takes a step is found by its class (execution/handlers.py); the table "Steps" in docs/design.md has a row for each.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from kvm_clone.options import Quiesce, Verify
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.domain_facts import BackupJob


@dataclass(frozen=True)
class RemoveExisting:
    """Remove the VM of that name before copying, as --cleanup-existing asks. Undo: none, by the user's own choice."""

    paths: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return f"remove the existing VM{_listed(self.paths)}"


@dataclass(frozen=True)
class SettleStage:
    """Journal on which side of its commit point an earlier attempt ended. Undo: none needed."""

    directory: str
    operation: str
    committed: bool

    def describe(self) -> str:
        """What the step does, for people."""
        return f"note that the earlier attempt {'has' if self.committed else 'has not'} committed"


@dataclass(frozen=True)
class DiscardStage:
    """Undo an earlier attempt whose journal lies elsewhere. Undo: none needed."""

    directory: str
    operation: str

    def describe(self) -> str:
        """What the step does, for people."""
        return f"undo the earlier attempt in {self.directory}"


@dataclass(frozen=True)
class BeginStage:
    """Take the destination's lock, and begin the journal in `directory` or resume it. Undo: remove it, unlock.

    `discards`: the earlier attempt that is undone first. `marks`: the directories that have files which the operation
    removes or writes into: the source must not see them as its own.
    """

    directory: str
    resume: bool
    discards: str = ""
    marks: tuple[str, ...] = ()

    def describe(self) -> str:
        """What the step does, for people."""
        return f"lock, and {'resume the' if self.resume else 'begin a'} journal in {self.directory}"


@dataclass(frozen=True)
class TakeLock:
    """Take the destination's lock, and no journal. Undo: release it."""

    def describe(self) -> str:
        """What the step does, for people."""
        return "lock"


@dataclass(frozen=True)
class ReleaseLock:
    """Release the lock. Undo: none needed."""

    def describe(self) -> str:
        """What the step does, for people."""
        return "unlock"


@dataclass(frozen=True)
class CreateDisk:
    """Make the empty staged image. Undo: remove it."""

    disk: Asset

    def describe(self) -> str:
        """What the step does, for people."""
        disk = self.disk
        return f"{'take up' if disk.staged else 'make'} the staged image of {disk.key} ({disk.source.format})"


@dataclass(frozen=True)
class CopyDisks:
    """Send every disk's content. Undo: nothing of its own, the staged images go."""

    disks: tuple[Asset, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return f"send the content of {_targets(self.disks)}"


@dataclass(frozen=True)
class ProveDisks:
    """Digest the disks at both ends and compare. Undo: nothing."""

    disks: tuple[Asset, ...]
    proof: Verify

    def describe(self) -> str:
        """What the step does, for people."""
        part = "what was sent of " if self.proof is Verify.SENT else ""
        return f"digest {part}{_targets(self.disks)} and compare"


@dataclass(frozen=True)
class CheckSource:
    """Make sure that the source's images are as they were when the plan was made. Undo: nothing."""

    disks: tuple[Asset, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return "make sure that the source has not changed"


@dataclass(frozen=True)
class PublishDisk:
    """Give the staged image its final name. Undo: remove it."""

    disk: Asset

    def describe(self) -> str:
        """What the step does, for people."""
        return f"give {self.disk.key} its final name, {self.disk.place.path}"


@dataclass(frozen=True)
class StopDomain:
    """Stop the VM that is about to be replaced. Undo: start it again."""

    def describe(self) -> str:
        """What the step does, for people."""
        return "stop the existing VM"


@dataclass(frozen=True)
class DefineDomain:
    """Define the clone: the commit point. Undo: none; a definition that libvirt refuses changes nothing.

    `remove`, `forget`: what RemoveReplaced is to remove, journalled for whoever has to do it.
    """

    remove: tuple[str, ...]
    forget: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return "define the VM: the commit"


@dataclass(frozen=True)
class RemoveReplaced:
    """Remove what only the replaced VM had: files, snapshots and checkpoints by name.

    After the commit: a failure here is a warning.
    """

    paths: tuple[str, ...]
    forget: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return f"remove what only the VM as it was had{_listed(self.paths)}"


@dataclass(frozen=True)
class EndStage:
    """Remove the journal and release the lock. After the commit: a failure here is a warning."""

    directories: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return "remove the journal, and unlock"


@dataclass(frozen=True)
class TakeUpCommitted:
    """Take the lock, and continue an earlier run that has committed. Undo: none needed."""

    directory: str
    operation: str

    def describe(self) -> str:
        """What the step does, for people."""
        return f"finish what has committed in {self.directory}"


@dataclass(frozen=True)
class BeginBackup:
    """Let libvirt offer the running source's disks as they are at one instant. Undo: end the job."""

    job: BackupJob
    quiesce: Quiesce
    stale: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        job = self.job
        since = f", with what changed since {job.incremental}" if job.incremental else ""
        where = ", ".join(sorted({posixpath.dirname(disk.scratch) for disk in job.disks}))
        return f"take one point in time of the running source (quiesce {self.quiesce}){since}; scratch in {where}"


@dataclass(frozen=True)
class EndBackup:
    """End the backup job. Undo: none needed."""

    def describe(self) -> str:
        """What the step does, for people."""
        return "end the backup job and remove its scratch"


@dataclass(frozen=True)
class MergeDisks:
    """Write the overlays that the commit defined into the images below, and define the VM onto those.

    After the commit: a failure here is a warning, and the next run continues it.
    """

    def describe(self) -> str:
        """What the step does, for people."""
        return "merge the overlays into the replica's images, and define it onto those"


@dataclass(frozen=True)
class SealReplica:
    """Record how the VM is now, so that a later sync knows whether somebody has used it. After the commit."""

    def describe(self) -> str:
        """What the step does, for people."""
        return "record how it is now"


@dataclass(frozen=True)
class DropCheckpoints:
    """Delete checkpoints of ours on the source that are not needed any more. After the commit."""

    names: tuple[str, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return f"delete the source's checkpoint {', '.join(self.names)}"


@dataclass(frozen=True)
class VerifyExisting:
    """Digest a finished clone against its source."""

    disks: tuple[Asset, ...]

    def describe(self) -> str:
        """What the step does, for people."""
        return f"digest {_targets(self.disks)} on both hosts and compare"


def _targets(disks: tuple[Asset, ...]) -> str:
    return ", ".join(disk.key for disk in disks)


def _listed(paths: tuple[str, ...]) -> str:
    return f": {', '.join(paths)}" if paths else ""


Step = (
    RemoveExisting
    | SettleStage
    | DiscardStage
    | BeginStage
    | TakeLock
    | ReleaseLock
    | CreateDisk
    | CopyDisks
    | ProveDisks
    | CheckSource
    | PublishDisk
    | StopDomain
    | DefineDomain
    | RemoveReplaced
    | EndStage
    | TakeUpCommitted
    | BeginBackup
    | EndBackup
    | MergeDisks
    | SealReplica
    | DropCheckpoints
    | VerifyExisting
)
