"""Clone KVM/libvirt virtual machines between hosts over SSH, proven byte for byte."""

from kvm_clone.api import Client, CloneResult, DiskResult, HostListing, Request, StagedListing
from kvm_clone.errors import ExitCode, KvmCloneError
from kvm_clone.options import CloneOptions, Retry, Route
from kvm_clone.progress import DiskProgress, Event, Note, Phase, PhaseStarted
from kvm_clone.ssh import SshOptions
from kvm_clone.version import __version__

__all__ = [
    "Client",
    "CloneOptions",
    "CloneResult",
    "DiskProgress",
    "DiskResult",
    "Event",
    "ExitCode",
    "HostListing",
    "KvmCloneError",
    "Note",
    "Phase",
    "PhaseStarted",
    "Request",
    "Retry",
    "Route",
    "SshOptions",
    "StagedListing",
    "__version__",
]
