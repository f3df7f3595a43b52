"""What libvirt says of a host's domains, pools and abilities, as plain data; and a backup job to begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvm_clone.agent.staging.scratch import SOCKETS

SHUT_OFF = "shut off"

RUNNING = ("running", "blocked", "paused")
"""States in which a VM's disks can be read by a backup job."""

FILE_POOLS = ("dir", "fs", "netfs")
"""Kinds of storage pool whose volumes are files in a directory."""

OURS = "kvm-clone-"
"""Begins the name of our sockets' files; a backup job with another one is another tool's."""

CHECKPOINTS = "kvm-clone."
"""Begins the names of our checkpoints."""


@dataclass(frozen=True)
class CpuFacts:
    """What a host's libvirt says of a VM's CPU.

    `modes`: whether each is supported; `models`: whether each is usable as it is, for the emulator. `refusal`: why the
    host's CPU is not compatible. `unknown`: why that could not be found out. `blockers`: the features that keep the
    model from being usable, where libvirt names them.
    """

    modes: Mapping[str, bool] = field(default_factory=dict)
    models: Mapping[str, bool] = field(default_factory=dict)
    refusal: str = ""
    unknown: str = ""
    blockers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A domain as libvirt knows it. `xml` is its persistent definition, secrets included."""

    name: str
    uuid: str
    state: str
    persistent: bool
    xml: str
    managed_save: bool = False
    snapshots: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """A storage pool. `path` is empty for kinds that have no directory."""

    name: str
    type: str
    path: str
    active: bool


@dataclass(frozen=True)
class Abilities:
    """What a host can give a VM: memory in bytes, CPUs, its CPU, networks (whether active).

    `refusal`: why libvirt there cannot run the VM's emulator, machine type or architecture. `version`: libvirt's own,
    as major * 1,000,000 + minor * 1,000 + release. `uuid`: the host's own.
    """

    memory: int = 0
    cpus: int = 0
    refusal: str = ""
    cpu: CpuFacts = field(default_factory=CpuFacts)
    networks: Mapping[str, bool] = field(default_factory=dict)
    version: int = 0
    uuid: str = ""


@dataclass(frozen=True)
class Live:
    """What is known of a running domain beyond its definition.

    `paths`: its own disks' files by target, as QEMU has them open. `jobs`: the block jobs under way, by target.
    `backup`: the backup job's socket or server, empty without a job. `agent`: whether a guest agent is connected.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    jobs: tuple[str, ...] = ()
    backup: str = ""
    agent: bool = False

    @property
    def backup_is_ours(self) -> bool:
        """Whether the backup job was begun by this program."""
        return self.backup.startswith(f"{SOCKETS}/{OURS}")


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup job: its file for scratch, and whether a checkpoint can be kept of it (qcow2 only)."""

    target: str
    scratch: str
    trackable: bool


@dataclass(frozen=True)
class BackupJob:
    """A backup job to begin.

    `incremental`: the checkpoint from which on a dirty bitmap is wanted, `checkpoint`: the one to make; both may be
    empty.
    """

    socket: str
    disks: tuple[BackupDisk, ...]
    incremental: str = ""
    checkpoint: str = ""
