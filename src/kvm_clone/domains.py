"""libvirt calls. They block, so that callers put them on a thread; none of them decides anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import libvirt

from kvm_clone import definition
from kvm_clone.errors import ConnectError, KvmCloneError, TransferError
from kvm_clone.xmlspan import Document

STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: "unknown",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}
SHUT_OFF = "shut off"

FILE_POOLS = ("dir", "fs", "netfs")
"""Kinds of storage pool whose volumes are files in a directory."""

_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_NO_SUPPORT)

libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; libvirt would print them as well


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
class DiskUse:
    """One disk of a listed domain; sizes in bytes, None where libvirt cannot say."""

    target: str
    path: str | None
    virtual_size: int | None
    allocated: int | None


@dataclass(frozen=True)
class Listed:
    """One row of `list`. `memory` is in bytes."""

    host: str
    name: str
    uuid: str
    state: str
    vcpus: int
    memory: int
    disks: tuple[DiskUse, ...] = field(default_factory=tuple)


def connect(uri: str, host: str) -> libvirt.virConnect:
    """Open libvirt. Raises ConnectError."""
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise ConnectError(
            f"cannot open libvirt on {host}: {error.get_error_message()}",
            subject=host,
            remedy="check that libvirt runs there and that this user may use it: virsh -c qemu:///system list",
        ) from error


@contextlib.contextmanager
def failing_as(what: str, subject: str) -> Iterator[None]:
    """Turn libvirt's errors into TransferError that says what was being done."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise TransferError(f"{what}: {error.get_error_message()}", subject=subject) from error


def find(connection: libvirt.virConnect, name: str) -> Domain | None:
    """The domain of that name, None when there is none. Raises libvirt.libvirtError."""
    try:
        domain = connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    return Domain(
        name=domain.name(),
        uuid=domain.UUIDString(),
        state=STATES.get(domain.state()[0], "unknown"),
        persistent=bool(domain.isPersistent()),
        xml=domain.XMLDesc(flags),
        managed_save=bool(domain.hasManagedSaveImage()),
        snapshots=tuple(domain.snapshotListNames()),
        checkpoints=_checkpoints(domain),
    )


def _checkpoints(domain: libvirt.virDomain) -> tuple[str, ...]:
    try:
        return tuple(checkpoint.getName() for checkpoint in domain.listAllCheckpoints())
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:  # drivers without checkpoints
            return ()
        raise


def names(connection: libvirt.virConnect) -> dict[str, str]:
    """Every domain's UUID by its name, running or not. Raises libvirt.libvirtError."""
    return {domain.name(): domain.UUIDString() for domain in connection.listAllDomains()}


def pools(connection: libvirt.virConnect) -> tuple[Pool, ...]:
    """Every storage pool. Raises libvirt.libvirtError."""
    found = []
    for pool in connection.listAllStoragePools():
        root = Document(pool.XMLDesc()).root
        path = root.find_text("target", "path") or ""
        found.append(Pool(pool.name(), root.attributes.get("type", ""), path, bool(pool.isActive())))
    return tuple(found)


def refresh_pools(connection: libvirt.virConnect, directories: set[str]) -> None:
    """Let libvirt see new files in the active pools of these directories. Raises libvirt.libvirtError."""
    for pool in pools(connection):
        if pool.active and pool.path in directories:
            connection.storagePoolLookupByName(pool.name).refresh()


def define(connection: libvirt.virConnect, xml: str) -> None:
    """Define a domain. Raises libvirt.libvirtError."""
    connection.defineXML(xml)


def defined_by(connection: libvirt.virConnect, name: str, operation: str) -> bool:
    """Whether the domain of that name carries our mark of that operation. Raises libvirt.libvirtError."""
    domain = find(connection, name)
    mark = definition.read_provenance(domain.xml) if domain is not None else None
    return mark is not None and mark.operation == operation


def list_all(connection: libvirt.virConnect, host: str) -> list[Listed]:
    """Every domain with its disks, by name. Raises TransferError."""
    with failing_as(f"listing the VMs of {host}", host):
        rows = []
        for domain in connection.listAllDomains():
            with contextlib.suppress(_VanishedError):
                rows.append(_row(domain, host))
        return sorted(rows, key=lambda row: row.name)


class _VanishedError(KvmCloneError):
    """The domain was undefined while it was being listed."""


def _row(domain: libvirt.virDomain, host: str) -> Listed:
    try:
        state, _, memory, vcpus, _ = domain.info()
        facts = definition.read_domain(domain.XMLDesc())
        disks = tuple(_use(domain, disk) for disk in facts.disks if disk.device == "disk")
        return Listed(
            host,
            domain.name(),
            domain.UUIDString(),
            STATES.get(state, "unknown"),
            vcpus,
            memory * 1024,
            disks,
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise _VanishedError(domain.name()) from error
        raise


def _use(domain: libvirt.virDomain, disk: definition.DiskXml) -> DiskUse:
    try:
        virtual, allocated, _ = domain.blockInfo(disk.target)
    except libvirt.libvirtError:  # a missing file or an unreachable server: the row is worth showing all the same
        return DiskUse(disk.target, disk.path, None, None)
    return DiskUse(disk.target, disk.path, virtual, allocated)
