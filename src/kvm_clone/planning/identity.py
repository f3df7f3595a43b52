"""Whether two hosts are one, and whether two files are: established, and not taken from their names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvm_clone.agent.disks import fingerprint


@dataclass(frozen=True)
class HostIdentity:
    """What a host says of itself; empty where it does not.

    `boot`: of the running kernel, which draws it anew at each start. `libvirt`: the file of libvirt's socket.
    `machine`: /etc/machine-id. `uuid`: the host's UUID by libvirt, which comes from the firmware and repeats, or is
    made up anew at libvirt's every start.
    """

    boot: str = ""
    libvirt: str = ""
    machine: str = ""
    uuid: str = ""

    @property
    def lasting(self) -> str:
        """What stays over a restart, to tell one host's things from another's."""
        return self.machine or self.uuid


def same_host(one: HostIdentity, other: HostIdentity) -> bool:
    """Whether both are one host, whatever the addresses were.

    Two kernels are two hosts. Under one kernel, what counts is whether libvirt is the same, by its socket: containers
    have one each. Where neither is known, machine-id and UUID have to agree.
    """
    if one.boot and other.boot and one.boot != other.boot:
        return False
    if one.boot and other.boot and one.libvirt and other.libvirt:
        return one.libvirt == other.libvirt
    return (one.machine, one.uuid) == (other.machine, other.uuid)


def same_file(ours: str, theirs: str, *, one_host: bool) -> bool:
    """Whether two fingerprints are of one file.

    On one host device and inode say so. Two hosts that see one filesystem number its device in their own ways; inode,
    size, mtime and ctime, in nanoseconds, are the file's own.
    """
    if not ours or not theirs:
        return False
    if one_host and fingerprint.file_id(ours)[1:] != ("0",):  # an inode of 0 tells nothing
        return fingerprint.file_id(ours) == fingerprint.file_id(theirs)
    if one_host:
        return ours == theirs
    return fingerprint.whole(ours) == fingerprint.whole(theirs)


def shared(ours: Mapping[str, str], theirs: Mapping[str, str], *, one_host: bool) -> list[tuple[str, str]]:
    """The pairs of paths, one of each side, whose fingerprints are of one file."""
    return [
        (mine, other)
        for mine, own in ours.items()
        for other, known in theirs.items()
        if same_file(own, known, one_host=one_host)
    ]
