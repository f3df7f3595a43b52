"""The steps that plans are made of. What each does is in run.py; docs/design.md has the table."""

from __future__ import annotations

from dataclasses import dataclass

from kvm_clone.options import Quiesce, Verify
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.domain_facts import BackupJob


@dataclass(frozen=True)
class RemoveExisting:
    """Remove the VM of that name before copying, as --cleanup-existing asks. Undo: none, by the user's own choice."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class SettleStage:
    """Journal on which side of its commit point an earlier attempt ended. Undo: none needed."""

    directory: str
    operation: str
    committed: bool


@dataclass(frozen=True)
class DiscardStage:
    """Undo an earlier attempt whose journal lies elsewhere. Undo: none needed."""

    directory: str
    operation: str


@dataclass(frozen=True)
class BeginStage:
    """Take the destination's lock, and begin the journal in `directory` or go on with it. Undo: remove it, let go.

    `discards`: the earlier attempt that is undone first. `marks`: the directories that have files which the operation
    removes or writes into: the source must not see them as its own.
    """

    directory: str
    resume: bool
    discards: str = ""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TakeLock:
    """Take the destination's lock, and no journal. Undo: let go."""


@dataclass(frozen=True)
class ReleaseLock:
    """Let go of the lock. Undo: none needed."""


@dataclass(frozen=True)
class CreateDisk:
    """Make the empty staged image. Undo: remove it."""

    disk: Asset


@dataclass(frozen=True)
class CopyDisks:
    """Send every disk's content. Undo: nothing of its own, the staged images go."""

    disks: tuple[Asset, ...]


@dataclass(frozen=True)
class ProveDisks:
    """Digest the disks at both ends and compare. Undo: nothing."""

    disks: tuple[Asset, ...]
    proof: Verify


@dataclass(frozen=True)
class CheckSource:
    """Make sure that the source's images are as they were when the plan was made. Undo: nothing."""

    disks: tuple[Asset, ...]


@dataclass(frozen=True)
class PublishDisk:
    """Give the staged image its final name. Undo: remove it."""

    disk: Asset


@dataclass(frozen=True)
class StopDomain:
    """Stop the VM that is about to be replaced. Undo: start it again."""


@dataclass(frozen=True)
class DefineDomain:
    """Define the clone: the commit point. Undo: none; a definition that libvirt refuses changes nothing.

    `remove`, `forget`: what RemoveReplaced is to remove, journalled for whoever has to do it.
    """

    remove: tuple[str, ...]
    forget: tuple[str, ...]


@dataclass(frozen=True)
class RemoveReplaced:
    """Remove what only the replaced VM had: files, snapshots and checkpoints by name.

    After the commit: a failure here is a warning.
    """

    paths: tuple[str, ...]
    forget: tuple[str, ...]


@dataclass(frozen=True)
class EndStage:
    """Remove the journal and let go of the lock. After the commit: a failure here is a warning."""

    directories: tuple[str, ...]


@dataclass(frozen=True)
class TakeUpCommitted:
    """Take the lock, and go on with an earlier run that has committed. Undo: none needed."""

    directory: str
    operation: str


@dataclass(frozen=True)
class BeginBackup:
    """Let libvirt offer the running source's disks as they are at one instant. Undo: end the job."""

    job: BackupJob
    quiesce: Quiesce
    stale: tuple[str, ...]


@dataclass(frozen=True)
class EndBackup:
    """End the backup job. Undo: none needed."""


@dataclass(frozen=True)
class MergeDisks:
    """Write the overlays that the commit defined into the images below, and define the VM onto those.

    After the commit: a failure here is a warning, and the next run goes on with it.
    """


@dataclass(frozen=True)
class SealReplica:
    """Record how the VM is now, so that a later sync knows whether somebody has used it. After the commit."""


@dataclass(frozen=True)
class DropCheckpoints:
    """Delete checkpoints of ours on the source that are not needed any more. After the commit."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class VerifyExisting:
    """Digest a finished clone against its source."""

    disks: tuple[Asset, ...]


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
