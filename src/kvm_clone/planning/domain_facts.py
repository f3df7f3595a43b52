"""What libvirt says of a host's domains, pools and abilities, and a backup job to begin. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvm_clone.agent.staging.scratch import SOCKETS
from kvm_clone.definition.volumes import Locations

SHUT_OFF = "shut off"

RUNNING = ("running", "blocked", "paused")
"""States in which a VM's disks can be read by a backup job."""

FILE_POOLS = ("dir", "fs", "netfs")
"""Kinds of storage pool whose volumes are files in a directory."""

OURS = "kvm-clone-"
"""The beginning of our sockets' names; a backup job with another socket belongs to another tool."""

CHECKPOINTS = "kvm-clone."
"""The beginning of our checkpoints' names."""


@dataclass(frozen=True)
class CpuFacts:
    """What a host's libvirt says of a VM's CPU.

    `modes`: whether the emulator supports each. `models`: whether each is usable unchanged. `refusal`: why the host's
    CPU is not compatible. `unknown`: why the CPUs could not be compared. `blockers`: the features that the host lacks
    for the model, where libvirt names them.
    """

    modes: Mapping[str, bool] = field(default_factory=dict)
    models: Mapping[str, bool] = field(default_factory=dict)
    refusal: str = ""
    unknown: str = ""
    blockers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A domain as libvirt knows it. `xml` is its persistent definition, secrets included.

    `volumes`: where the volumes are that this names.
    """

    name: str
    uuid: str
    state: str
    persistent: bool
    xml: str
    managed_save: bool = False
    snapshots: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    volumes: Locations = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """A storage pool. `path` is empty for kinds that have no directory."""

    name: str
    type: str
    path: str
    active: bool


@dataclass(frozen=True)
class Abilities:
    """What a host offers to VMs: memory in bytes, the number of CPUs, their features, networks (whether active).

    `refusal`: why libvirt there cannot run the VM's emulator, machine type or architecture. `version`: libvirt's, as
    major * 1,000,000 + minor * 1,000 + release. `uuid`: the host's. `uefi`: whether it can choose a loader of UEFI.
    """

    memory: int = 0
    cpus: int = 0
    refusal: str = ""
    cpu: CpuFacts = field(default_factory=CpuFacts)
    networks: Mapping[str, bool] = field(default_factory=dict)
    version: int = 0
    uuid: str = ""
    uefi: bool = True


@dataclass(frozen=True)
class Live:
    """What is known of a running domain beyond its definition.

    `paths`: its own disks' files by target, as QEMU has them open. `jobs`: the block jobs under way, by target.
    `backup`: the backup job's socket or server, empty without a job. `agent`: whether a guest agent is connected.
    `variables`: the file of its UEFI variables, empty where it has none.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    jobs: tuple[str, ...] = ()
    backup: str = ""
    agent: bool = False
    variables: str = ""

    @property
    def backup_is_ours(self) -> bool:
        """Whether this program began the backup job."""
        return self.backup.startswith(f"{SOCKETS}/{OURS}")


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup job: its scratch file, and whether it can have a checkpoint (qcow2 only)."""

    target: str
    scratch: str
    trackable: bool


@dataclass(frozen=True)
class BackupJob:
    """A backup job to begin.

    `incremental`: the checkpoint since which a dirty bitmap is wanted. `checkpoint`: the one to make. Both may be
    empty.
    """

    socket: str
    disks: tuple[BackupDisk, ...]
    incremental: str = ""
    checkpoint: str = ""
