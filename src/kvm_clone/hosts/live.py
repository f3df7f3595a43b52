"""libvirt calls on a running domain: its backup job, its guest agent, its checkpoints. They block; none decides."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import libvirt
import libvirt_qemu

from kvm_clone.agent.staging.scratch import SOCKETS, is_ours
from kvm_clone.definition.spans import Document, Node, escape
from kvm_clone.hosts import volumes
from kvm_clone.planning.domain_facts import OURS, BackupJob, Live

_NO_JOB = (
    libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_NO_DOMAIN,
    libvirt.VIR_ERR_OPERATION_INVALID,
)
"""What libvirt says of a domain without a backup job: none, a driver without any, gone, or shut off meanwhile."""


_AGENT_SECONDS = 10
"""How long a guest agent may take for one answer; fsfreeze can block for much longer."""

_END_SECONDS = 30.0
_AGENT_CHANNEL = "org.qemu.guest_agent.0"


def look(connection: libvirt.virConnect, name: str) -> Live:
    """Look at a running domain. Raises libvirt.libvirtError."""
    domain = connection.lookupByName(name)
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    read = volumes.read(connection, xml)
    disks = read.own_disks
    jobs = [disk.target for disk in disks if disk.path and domain.blockJobInfo(disk.target)]
    root = Document(xml).root
    channels = [channel.find_attributes("target") for channel in root.find_all("devices", "channel")]
    return Live(
        {disk.target: disk.path or "" for disk in disks},
        tuple(jobs),
        _backup_server(domain),
        any(one.get("name") == _AGENT_CHANNEL and one.get("state") == "connected" for one in channels),
        read.variables.path if read.variables is not None else "",
    )


@dataclass(frozen=True)
class OurJob:
    """A backup job of ours that is under way: of which domain, and its socket and scratch files."""

    uuid: str
    name: str
    files: tuple[str, ...]


def our_jobs(connection: libvirt.virConnect) -> list[OurJob]:
    """The backup jobs of ours, of all domains. Raises libvirt.libvirtError."""
    found = []
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        job = _backup(domain)
        if job is not None and _server(job).startswith(f"{SOCKETS}/{OURS}"):
            scratch = [one.find_attributes("scratch").get("file", "") for one in job.find_all("disks", "disk")]
            files = tuple(path for path in (_server(job), *scratch) if is_ours(path))
            found.append(OurJob(domain.UUIDString(), domain.name(), files))
    return found


def _backup_server(domain: libvirt.virDomain) -> str:
    job = _backup(domain)
    return "" if job is None else _server(job)


def _backup(domain: libvirt.virDomain) -> Node | None:
    """The backup job as libvirt describes it, if there is one."""
    try:
        return Document(domain.backupGetXMLDesc()).root
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NO_JOB:
            return None
        raise


def _server(job: Node) -> str:
    server = job.find_attributes("server")
    return server.get("socket") or server.get("name") or "a push-mode job"


def begin(connection: libvirt.virConnect, name: str, job: BackupJob) -> None:
    """Begin the job: from here on the socket offers each disk as it is now. Raises libvirt.libvirtError."""
    checkpoint = checkpoint_xml(job) if job.checkpoint else None
    connection.lookupByName(name).backupBegin(backup_xml(job), checkpoint, 0)


def backup_xml(job: BackupJob) -> str:
    """The job as libvirt takes it (https://libvirt.org/formatbackup.html)."""
    disks = []
    for disk in job.disks:
        mode = (
            f' backupmode="incremental" incremental="{job.incremental}"' if job.incremental and disk.trackable else ""
        )
        disks.append(
            f'<disk name="{disk.target}" backup="yes" type="file" exportname="{disk.target}"{mode}>'
            f'<scratch file="{escape(disk.scratch, quote=chr(34))}"/></disk>'
        )
    server = f'<server transport="unix" socket="{escape(job.socket, quote=chr(34))}"/>'
    return f'<domainbackup mode="pull">{server}<disks>{"".join(disks)}</disks></domainbackup>'


def checkpoint_xml(job: BackupJob) -> str:
    """The checkpoint that begins with the job (https://libvirt.org/formatcheckpoint.html)."""
    disks = [f'<disk name="{one.target}" checkpoint="{"bitmap" if one.trackable else "no"}"/>' for one in job.disks]
    return f"<domaincheckpoint><name>{job.checkpoint}</name><disks>{''.join(disks)}</disks></domaincheckpoint>"


def end(connection: libvirt.virConnect, name: str) -> int:
    """End our backup job, and no other; the bytes of scratch that it took. Raises libvirt.libvirtError."""
    domain = connection.lookupByName(name)
    if not domain.isActive() or not _backup_server(domain).startswith(f"{SOCKETS}/{OURS}"):
        return 0
    used = int(domain.jobStats().get("disk_temp_used", 0))
    domain.abortJob()
    deadline = time.monotonic() + _END_SECONDS
    while domain.isActive() and _backup_server(domain):
        if time.monotonic() > deadline:
            raise libvirt.libvirtError("the backup job does not end")
        time.sleep(0.05)
    return used


def freeze(connection: libvirt.virConnect, name: str) -> int:
    """Freeze the guest's filesystems; how many. Raises libvirt.libvirtError, also when the guest takes too long."""
    domain = connection.lookupByName(name)
    with _impatient(domain):
        return int(domain.fsFreeze())


def may_be_frozen(error: libvirt.libvirtError, seconds: float) -> bool:
    """Whether the guest may freeze although `freeze` failed so, after so many seconds.

    It may when it has taken too long, or the connection broke. It does not when it said no, or could not be asked, as
    libvirt finds out sooner; then it is perhaps frozen by somebody else, who wants it to stay so.
    """
    return error.get_error_domain() != libvirt.VIR_FROM_QEMU or seconds >= _AGENT_SECONDS


def thaw(connection: libvirt.virConnect, name: str, count: int | None) -> bool:
    """Thaw the guest's filesystems and see that it says so; whether all were frozen until now.

    Raises libvirt.libvirtError.

    `count`: how many were frozen, None if that is not known. Where it thaws another number, it is asked for its state;
    always asking would be simpler, but libvirt calls a domain tainted whose agent was sent a command of one's own.
    """
    domain = connection.lookupByName(name)
    with _impatient(domain):
        if domain.fsThaw() == count or count is None:
            return True
        answer = libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-fsfreeze-status"}', _AGENT_SECONDS, 0)
    status = json.loads(answer).get("return")
    if status != "thawed":
        raise libvirt.libvirtError(f"the guest agent says that the filesystems are {status}")
    return False


@contextlib.contextmanager
def _impatient(domain: libvirt.virDomain) -> Iterator[None]:
    """With a limit to what libvirt waits for the guest agent, which it keeps for a domain until it gets another."""
    domain.agentSetResponseTimeout(_AGENT_SECONDS, 0)
    try:
        yield
    finally:
        with contextlib.suppress(libvirt.libvirtError):  # the domain may be off by now, and the limit with it
            domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, 0)


def delete_checkpoints(connection: libvirt.virConnect, name: str, wanted: tuple[str, ...]) -> list[str]:
    """Delete these checkpoints, whose bitmaps go into the one before each; those that were there.

    Raises libvirt.libvirtError.
    """
    domain = connection.lookupByName(name)
    done = []
    for checkpoint in wanted:
        with contextlib.suppress(_NoSuchCheckpointError):
            _delete(_find(domain, checkpoint))
            done.append(checkpoint)
    return done


def _delete(checkpoint: libvirt.virDomainCheckpoint) -> None:
    """Delete one; of one whose bitmap is lost, as after a power cut, what libvirt still knows of it."""
    try:
        checkpoint.delete(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT):
            raise
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def changed_since(connection: libvirt.virConnect, name: str, checkpoint: str) -> dict[str, int]:
    """How many bytes of each disk have changed since the checkpoint, by its target. Raises libvirt.libvirtError."""
    found = connection.lookupByName(name).checkpointLookupByName(checkpoint)
    root = Document(found.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE)).root
    disks = [disk.attributes for disk in root.find_all("disks", "disk")]
    return {disk["name"]: int(disk["size"]) for disk in disks if "size" in disk}


class _NoSuchCheckpointError(Exception):
    """It is gone already."""


def _find(domain: libvirt.virDomain, checkpoint: str) -> libvirt.virDomainCheckpoint:
    try:
        return domain.checkpointLookupByName(checkpoint)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            raise _NoSuchCheckpointError from error
        raise
