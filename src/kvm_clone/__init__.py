"""Clone KVM/libvirt virtual machines between hosts over SSH, proven byte for byte."""

from kvm_clone.client import Client, Request
from kvm_clone.errors import ExitCode, KvmCloneError
from kvm_clone.hosts.ssh import SshOptions
from kvm_clone.options import CloneOptions, Quiesce, Retry, Route, SyncOptions, Verify
from kvm_clone.progress import DiskProgress, Event, Note, Phase, PhaseStarted
from kvm_clone.results import DiskResult, HostListing, Result, StagedListing
from kvm_clone.version import __version__

__all__ = [
    "Client",
    "CloneOptions",
    "DiskProgress",
    "DiskResult",
    "Event",
    "ExitCode",
    "HostListing",
    "KvmCloneError",
    "Note",
    "Phase",
    "PhaseStarted",
    "Quiesce",
    "Request",
    "Result",
    "Retry",
    "Route",
    "SshOptions",
    "StagedListing",
    "SyncOptions",
    "Verify",
    "__version__",
]
