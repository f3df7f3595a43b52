"""The type of a reference to the host, and its roles."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """How a VM uses what it refers to. The first group are paths in the host's filesystem."""

    DATA = "data"
    """Content that the VM owns or reads: a disk, a file of QEMU's own arguments."""
    FIRMWARE = "firmware"
    """What the VM boots with, read only: loader, kernel, ACPI table."""
    FILE = "file"
    """Another file that is only read: a ROM, a key, a configuration."""
    PROGRAM = "program"
    OUTPUT = "output"
    """A file that QEMU or libvirt writes: a log, a serial port's file."""
    SOCKET = "socket"
    PIPE = "pipe"
    DEVICE = "device"
    DIRECTORY = "directory"

    NETWORK = "network"
    PORTGROUP = "portgroup"
    """NETWORK/PORTGROUP."""
    BRIDGE = "bridge"
    INTERFACE = "interface"
    """A network device of the host."""
    NWFILTER = "nwfilter"
    ADDRESS = "address"
    """An IP address that QEMU listens on."""
    SERVER = "server"
    """Something that is reached over the network."""
    EXCLUSIVE = "exclusive"
    """A number or name that one running VM of a host can have: a vsock CID, a TCP port."""
    VOLUME = "volume"
    """POOL/VOLUME."""
    SECRET = "secret"  # noqa: S105 - a role, not a password
    """A UUID, or USAGE-TYPE/USAGE; never the secret's value."""
    HUGEPAGES = "hugepages"
    """A page size in KiB; 0 is the host's default size."""
    NUMA = "numa"
    """A set of the host's NUMA nodes, such as 0-1,3."""
    CPUSET = "cpuset"
    """A set of the host's CPUs, such as 0-3,^2."""
    HOST_DEVICE = "host-device"
    """BUS:ADDRESS, such as pci:0000:06:00.0."""
    SECLABEL = "seclabel"
    """A security model, such as selinux."""
    CGROUP = "cgroup"
    """A resource partition."""
    TIED = "tied"
    """A property of the host that cannot be looked up."""
    COMMAND_LINE = "command-line"
    """What is passed to QEMU as it is."""

    INERT = "inert"
    """What looks like a path but names nothing of the host: the guest's own, free text, made at every start."""
    UNKNOWN = "unknown"
    """No rule knows it."""


PATHS = frozenset(
    {
        Role.DATA,
        Role.FIRMWARE,
        Role.FILE,
        Role.PROGRAM,
        Role.OUTPUT,
        Role.SOCKET,
        Role.PIPE,
        Role.DEVICE,
        Role.DIRECTORY,
        Role.UNKNOWN,
    }
)
"""Roles whose value is a path in the host's filesystem, if it is absolute."""


@dataclass(frozen=True)
class Reference:
    """One reference to the host.

    `kind`: the element that has it, such as serial. `where`: its place, such as devices/serial[0]/source@path.
    `made`: QEMU or libvirt makes it when the VM starts. `readonly`: the VM does not write to this DATA.
    """

    kind: str
    where: str
    value: str
    role: Role
    made: bool = False
    readonly: bool = False

    @property
    def is_path(self) -> bool:
        """Whether the value is an absolute path in the host's filesystem."""
        return self.role in PATHS and self.value.startswith("/")

    @property
    def is_renamed(self) -> bool:
        """Whether a clone can have it under another name: QEMU's own arguments are kept as they are."""
        return self.made and self.is_path and not self.kind.startswith("qemu:")

    @property
    def owner(self) -> str:
        """The device or the part of the definition that has the reference: the first two steps of `where`."""
        return "/".join(self.where.split("@")[0].split("/")[:2])
