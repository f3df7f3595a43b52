"""Whether two hosts, or two files, are the same one, whatever their names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvm_clone.agent.disks import fingerprint


@dataclass(frozen=True)
class HostIdentity:
    """What a host says of itself; empty where it says nothing.

    `boot`: the boot id of the running kernel. `libvirt`: device, inode and ctime of libvirt's socket.
    `machine`: /etc/machine-id. `uuid`: the host's UUID by libvirt, which comes from the firmware and repeats, or is
    temporary: libvirt draws a new one at each start.
    """

    boot: str = ""
    libvirt: str = ""
    machine: str = ""
    uuid: str = ""

    @property
    def lasting(self) -> str:
        """What identifies the host and stays the same over a restart."""
        return self.machine or self.uuid


def same_host(one: HostIdentity, other: HostIdentity) -> bool:
    """Whether both are one host, whatever their addresses.

    Two kernels are two hosts. Under one kernel libvirt's socket decides: each container has its own. Where neither is
    known, machine-id and UUID have to be equal.
    """
    if one.boot and other.boot and one.boot != other.boot:
        return False
    if one.boot and other.boot and one.libvirt and other.libvirt:
        return one.libvirt == other.libvirt
    return (one.machine, one.uuid) == (other.machine, other.uuid)


def same_file(ours: str, theirs: str, *, one_host: bool) -> bool:
    """Whether two fingerprints are of one file.

    On one host device and inode decide. Two hosts that see one filesystem give its device different numbers; inode,
    size, mtime and ctime in nanoseconds are the same on both.
    """
    if not ours or not theirs:
        return False
    if one_host and fingerprint.file_id(ours)[1:] != ("0",):  # an inode of 0 identifies nothing
        return fingerprint.file_id(ours) == fingerprint.file_id(theirs)
    if one_host:
        return ours == theirs
    return fingerprint.whole(ours) == fingerprint.whole(theirs)


def shared(ours: Mapping[str, str], theirs: Mapping[str, str], *, one_host: bool) -> list[tuple[str, str]]:
    """Return the pairs of paths, one of each side, whose fingerprints are of one file."""
    return [
        (mine, other)
        for mine, own in ours.items()
        for other, known in theirs.items()
        if same_file(own, known, one_host=one_host)
    ]
