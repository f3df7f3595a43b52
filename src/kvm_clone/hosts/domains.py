"""libvirt calls. They block, so that callers put them on a thread; none of them decides anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import libvirt

from kvm_clone.definition import domain_xml, marks
from kvm_clone.definition.spans import Document
from kvm_clone.errors import ConnectError, KvmCloneError
from kvm_clone.hosts.cpu import compare_cpu
from kvm_clone.hosts.libvirt_errors import message_of
from kvm_clone.hosts.volumes import locations, read
from kvm_clone.planning.domain_facts import Abilities, CpuFacts, Domain, Pool

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


_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_NO_SUPPORT)

libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; libvirt would print them as well


@dataclass(frozen=True)
class Fenced:
    """A host's libvirt by way of the agent that holds an operation's lock: the one way to change anything there.

    The agent lets nothing through once the lock is not its own any more, and releases it only after the last answer.
    """

    connection: libvirt.virConnect


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
            f"cannot open libvirt on {host}: {message_of(error)}",
            subject=host,
            remedy="check that libvirt runs there and that this user may use it: virsh -c qemu:///system list",
        ) from error


def find(connection: libvirt.virConnect, name: str) -> Domain | None:
    """The domain of that name, None when there is none. Raises libvirt.libvirtError."""
    try:
        return _domain(connection.lookupByName(name))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:  # or it was removed while it was asked
            return None
        raise


def _domain(domain: libvirt.virDomain) -> Domain:
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    xml = domain.XMLDesc(flags)
    return Domain(
        name=domain.name(),
        uuid=domain.UUIDString(),
        state=STATES.get(domain.state()[0], "unknown"),
        persistent=bool(domain.isPersistent()),
        xml=xml,
        managed_save=bool(domain.hasManagedSaveImage()),
        snapshots=tuple(domain.snapshotListNames()),
        checkpoints=_checkpoints(domain),
        volumes=locations(domain.connect(), xml),
    )


def _checkpoints(domain: libvirt.virDomain) -> tuple[str, ...]:
    try:
        return tuple(checkpoint.getName() for checkpoint in domain.listAllCheckpoints())
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:  # drivers without checkpoints
            return ()
        raise


def abilities(connection: libvirt.virConnect, xml: domain_xml.DomainXml) -> Abilities:
    """What the host can give a VM of this definition. Raises libvirt.libvirtError."""
    memory, cpus = connection.getInfo()[1:3]
    cpu, refusal, uefi = CpuFacts(), "", True
    try:
        answer = connection.getDomainCapabilities(xml.emulator, xml.arch, xml.machine, xml.type)
        cpu = compare_cpu(connection, xml, answer)
        uefi = _has_uefi(answer)
    except libvirt.libvirtError as error:
        refusal = message_of(error)
    networks = {}
    for network in connection.listAllNetworks():
        with _passing_over(libvirt.VIR_ERR_NO_NETWORK):
            networks[network.name()] = bool(network.isActive())
    version = connection.getLibVersion()
    return Abilities(memory * 1024 * 1024, cpus, refusal, cpu, networks, version, host_uuid(connection), uefi)


def _has_uefi(capabilities: str) -> bool:
    """Whether libvirt can choose a loader of UEFI by the domain capabilities; one that says nothing of it may."""
    kinds = [
        one for one in Document(capabilities).root.find_all("os", "enum") if one.attributes.get("name") == "firmware"
    ]
    return not kinds or any(value.text.strip() == "efi" for kind in kinds for value in kind.find_all("value"))


def host_uuid(connection: libvirt.virConnect) -> str:
    """The host's UUID, empty where libvirt does not say. Raises libvirt.libvirtError."""
    return Document(connection.getCapabilities()).root.find_text("host", "uuid") or ""


def names(connection: libvirt.virConnect) -> dict[str, str]:
    """Every domain's UUID by its name, running or not. Raises libvirt.libvirtError."""
    found = {}
    for domain in connection.listAllDomains():
        with _passing_over(libvirt.VIR_ERR_NO_DOMAIN):
            found[domain.name()] = domain.UUIDString()
    return found


def with_uuid(connection: libvirt.virConnect, uuid: str) -> str:
    """The name of the domain of that UUID, empty when there is none. Raises libvirt.libvirtError."""
    try:
        return str(connection.lookupByUUIDString(uuid).name())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return ""
        raise


def stop(fenced: Fenced, name: str) -> bool:
    """Stop the domain at once if it runs; whether it did. Raises libvirt.libvirtError."""
    domain = fenced.connection.lookupByName(name)
    if not domain.isActive():
        return False
    domain.destroy()
    return True


def start(fenced: Fenced, name: str) -> None:
    """Start the domain. Raises libvirt.libvirtError."""
    fenced.connection.lookupByName(name).create()


def forget_state(fenced: Fenced, name: str, own: tuple[str, ...], disks: tuple[str, ...]) -> list[str]:
    """Remove what libvirt kept beside a definition that has been replaced; what was removed.

    `own`: the snapshots and checkpoints that it had, by name: the VM may have got others since. `disks`: its files, by
    which a managed save of it is known. Raises libvirt.libvirtError.
    """
    domain = fenced.connection.lookupByName(name)
    done = []
    if domain.hasManagedSaveImage() and _is_saved_with(domain, disks):
        domain.managedSaveRemove()
        done.append("managed save")
    for snapshot in domain.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)[::-1]:
        if snapshot.getName() in own:
            done.append(f"snapshot {snapshot.getName()}")
            snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    for checkpoint in domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)[::-1]:
        if checkpoint.getName() in own:
            done.append(f"checkpoint {checkpoint.getName()}")
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    return done


def is_saved_with(connection: libvirt.virConnect, name: str, disks: tuple[str, ...]) -> bool:
    """Whether libvirt keeps a managed save of the domain that has any of these disks. Raises libvirt.libvirtError."""
    domain = connection.lookupByName(name)
    return bool(domain.hasManagedSaveImage()) and _is_saved_with(domain, disks)


def _is_saved_with(domain: libvirt.virDomain, disks: tuple[str, ...]) -> bool:
    saved = read(domain.connect(), domain.managedSaveGetXMLDesc())
    return any(disk.path in disks for disk in saved.disks)


def undefine(fenced: Fenced, name: str, *, keep_variables: bool = False) -> None:
    """Undefine the domain with its TPM state and, unless they are kept, its UEFI variables.

    Raises libvirt.libvirtError.
    """
    flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    flags |= libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    flags |= libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM if keep_variables else libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    fenced.connection.lookupByName(name).undefineFlags(flags)


def pools(connection: libvirt.virConnect) -> tuple[Pool, ...]:
    """Every storage pool. Raises libvirt.libvirtError."""
    found = []
    for pool in connection.listAllStoragePools():
        with _passing_over(libvirt.VIR_ERR_NO_STORAGE_POOL):
            root = Document(pool.XMLDesc()).root
            path = root.find_text("target", "path") or ""
            found.append(Pool(pool.name(), root.attributes.get("type", ""), path, bool(pool.isActive())))
    return tuple(found)


@contextlib.contextmanager
def _passing_over(code: int) -> Iterator[None]:
    """Leave the block when what it asks about has been removed meanwhile."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != code:
            raise


def refresh_pools(fenced: Fenced, directories: set[str]) -> None:
    """Let libvirt see new files in the active pools of these directories. Raises libvirt.libvirtError."""
    for pool in pools(fenced.connection):
        if pool.active and pool.path in directories:
            with _passing_over(libvirt.VIR_ERR_NO_STORAGE_POOL):
                fenced.connection.storagePoolLookupByName(pool.name).refresh()


def define(fenced: Fenced, xml: str) -> None:
    """Define a domain. Raises libvirt.libvirtError."""
    fenced.connection.defineXML(xml)


def seal(fenced: Fenced, name: str, images: Mapping[str, str]) -> None:
    """Record in the definition how it and its images are now. Raises libvirt.libvirtError."""
    domain = fenced.connection.lookupByName(name)
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    markup = marks.seal_markup(marks.Seal(marks.definition_digest(xml), images))
    kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_CONFIG
    domain.setMetadata(kind, markup, "kvm-clone-replica", marks.SEAL_NAMESPACE, flags)


def settle_pending(fenced: Fenced, name: str) -> None:
    """Drop from the definition what its commit has left to be done. Raises libvirt.libvirtError."""
    domain = fenced.connection.lookupByName(name)
    if marks.read_pending(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)) is not None:
        kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_CONFIG
        domain.setMetadata(kind, None, None, marks.PENDING_NAMESPACE, flags)


def defined_by(connection: libvirt.virConnect, name: str, operation: str) -> bool:
    """Whether the domain of that name carries our mark of that operation. Raises libvirt.libvirtError."""
    domain = find(connection, name)
    mark = marks.read_provenance(domain.xml) if domain is not None else None
    return mark is not None and mark.operation == operation


def list_all(connection: libvirt.virConnect, host: str) -> list[Listed]:
    """Every domain with its disks, by name. Raises libvirt.libvirtError."""
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
        facts = domain_xml.read_domain(domain.XMLDesc())
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


def _use(domain: libvirt.virDomain, disk: domain_xml.DiskXml) -> DiskUse:
    try:
        virtual, allocated, _ = domain.blockInfo(disk.target)
    except libvirt.libvirtError:  # a missing file or an unreachable server: the row is worth showing all the same
        return DiskUse(disk.target, disk.path, None, None)
    return DiskUse(disk.target, disk.path, virtual, allocated)
