"""What the operations of a Client come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution.backup import PointInTime
from kvm_clone.findings import Finding
from kvm_clone.hosts import domains
from kvm_clone.upkeep.leftovers import StagedData


@dataclass(frozen=True)
class DiskResult:
    """One disk of the result; sizes in bytes. `data`: what the source's image holds, `sent`: what was sent of it.

    `method`: whether it was copied whole, or what differs was found by digests or by a dirty bitmap.
    """

    target: str
    source: str
    destination: str
    format: str
    virtual_size: int
    data: int
    sent: int
    method: str


@dataclass(frozen=True)
class Transfer:
    """How the content got there; sizes in bytes, times in seconds.

    `bytes_reused`: content that an interrupted attempt had brought; `bytes_resent`: of it, what was sent again.
    `bytes_compared`: what both hosts digested to find what differs.
    """

    route: str
    route_reason: str
    bytes_sent: int
    bytes_resent: int
    bytes_reused: int
    bytes_compared: int
    copy_seconds: float
    prove_seconds: float


@dataclass(frozen=True)
class Result:
    """A finished clone or sync. `changed`: it was not there already; `seconds` are for all of it.

    `proof`: how much was proven equal. `point_in_time`: of the source, what was copied. `removed`: what went with a
    replaced VM.
    """

    operation: str
    source: str
    destination: str
    vm: str
    name: str
    uuid: str
    changed: bool
    verified: bool
    proof: str
    disks: tuple[DiskResult, ...]
    transfer: Transfer
    point_in_time: PointInTime
    seconds: float
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class StagedListing:
    """What one host has staged; `done` says by a journal's path what `cleanup` did with it.

    `jobs`: the VMs there whose backup job of ours nobody reads any more. `active`: what `cleanup` left alone because
    its operation is running.
    """

    host: str
    staged: tuple[StagedData, ...] = field(default_factory=tuple)
    done: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[KvmCloneError, ...] = field(default_factory=tuple)
    jobs: tuple[str, ...] = ()
    active: tuple[StagedData, ...] = ()


@dataclass(frozen=True)
class HostListing:
    """What one host answered to `list_vms`: its VMs, or the error that kept it from answering."""

    host: str
    vms: tuple[domains.Listed, ...] = field(default_factory=tuple)
    error: KvmCloneError | None = None
