"""Clone KVM/libvirt virtual machines between hosts over SSH, proven byte for byte."""

from kvm_clone.client import Client, Request
from kvm_clone.errors import ExitCode, KvmCloneError
from kvm_clone.execution.backup import Consistency, PointInTime
from kvm_clone.hosts.ssh import SshOptions
from kvm_clone.options import CloneOptions, Quiesce, Retry, Route, SyncOptions, Verify
from kvm_clone.progress import DiskProgress, Event, Note, Phase, PhaseStarted
from kvm_clone.results import DiskResult, HostListing, Result, StagedListing, Transfer
from kvm_clone.version import __version__

__all__ = [
    "Client",
    "CloneOptions",
    "Consistency",
    "DiskProgress",
    "DiskResult",
    "Event",
    "ExitCode",
    "HostListing",
    "KvmCloneError",
    "Note",
    "Phase",
    "PhaseStarted",
    "PointInTime",
    "Quiesce",
    "Request",
    "Result",
    "Retry",
    "Route",
    "SshOptions",
    "StagedListing",
    "SyncOptions",
    "Transfer",
    "Verify",
    "__version__",
]
