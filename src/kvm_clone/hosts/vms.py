"""A VM that is there already: what it consists of, which of its files are its alone, and its removal."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.host import uses
from kvm_clone.definition import domain_xml, marks
from kvm_clone.definition.claims import Claim
from kvm_clone.definition.references import Role, references
from kvm_clone.errors import RefusedError, TransferError
from kvm_clone.gather import together
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import FencedLibvirt, LibvirtHost
from kvm_clone.planning import domain_facts
from kvm_clone.planning.facts import Existing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """What is known of a file's use; see agent.uses. `identity`: which file was looked at. `why`: why it may not go."""

    path: str
    state: str
    why: str
    identity: str

    @property
    def is_free(self) -> bool:
        """Whether it is known that nobody uses it."""
        return self.state == uses.FREE


@dataclass(frozen=True)
class Removal:
    """What was removed, in words or by its path, and what was left, each with the reason."""

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Users:
    """Everything that shows who uses a file of a host.

    `claims`: what its VMs name. `directories`: where images lie that no VM has, but that rest on others. `elsewhere`:
    fingerprints of files that are used on another host, which may see the same filesystem.
    """

    claims: tuple[Claim, ...]
    directories: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()


async def users(libvirt: LibvirtHost, elsewhere: Iterable[str] = ()) -> Users:
    """Ask a host's libvirt what its VMs use. Raises TransferError."""
    claims, pools = await together(libvirt.claims(), libvirt.pools())
    directories = (pool.path for pool in pools if pool.path and pool.type in domain_facts.FILE_POOLS)  # active or not
    return Users(tuple(claims), tuple(directories), tuple(elsewhere))


async def existing(host: Host, libvirt: LibvirtHost, name: str, known: Users) -> Existing | None:
    """The VM of that name, and which of its files nobody else uses, as far as that can be established."""
    domain = await libvirt.find(name)
    if domain is None:
        return None
    xml = domain_xml.read_domain(domain.xml, domain.volumes)
    mark = marks.read_provenance(domain.xml)
    disks = [disk.path for disk in xml.own_disks if disk.type == "file" and disk.path]
    own = (*disks, *(xml.variables.paths(name) if xml.variables is not None else ()))
    found, prints = await together(judge(host, known, own, but=domain.uuid), host.agent.fingerprints(paths=list(own)))
    return Existing(
        domain,
        xml,
        mark if mark is not None and mark.uuid == domain.uuid else None,
        whole=all(prints[: len(disks)]),
        removable=tuple(use.path for use in found if use.is_free),
        seal=marks.read_seal(domain.xml),
        kept=tuple((use.path, use.why) for use in found if use.state not in (uses.FREE, uses.ABSENT)),
        files={path: text for path, text in zip(own, prints, strict=True) if text},
    )


async def judge(host: Host, known: Users, paths: Sequence[str], but: str = "", *, processes: bool = False) -> list[Use]:
    """Who uses these files of the host, but the VM of the UUID `but`.

    `processes`: they are about to be removed, or written into, so that open files and locks count too.
    """
    if not paths:
        return []
    answers = await host.agent.uses(
        candidates=list(paths),
        claims=[claim.as_list() for claim in known.claims if not but or claim.by.uuid != but],
        directories=sorted({*known.directories, *map(posixpath.dirname, paths)}),
        elsewhere=list(known.elsewhere),
        processes=processes,
    )
    return [Use(one.path, one.state, one.why, one.identity) for one in answers]


async def _remove_files(
    host: Host,
    libvirt: LibvirtHost,
    paths: Sequence[str],
    elsewhere: Sequence[str],
    contents: Mapping[str, str],
) -> Removal:
    """Remove those of the files that nobody uses now. Raises TransferError for what cannot be removed.

    Others may have come to use them since they were looked at first. `contents`: inode, size and mtime of those that
    the replaced VM had; others may have put other files in their places since.
    """
    judged = await judge(host, await users(libvirt, elsewhere), paths, processes=True)
    found = await _if_unchanged(host, judged, contents)
    free = [{"path": use.path, "identity": use.identity} for use in found if use.is_free]
    answers = await host.agent.remove(files=free) if free else []
    removed = [one.path for one in answers if one.result == "removed"]
    for path in removed:
        log.info("removed %s on %s", path, host.name)
    failed = [f"{one.path}: {one.error}" for one in answers if one.result == "error"]
    if failed:
        raise TransferError(f"cannot remove {'; '.join(failed)}", subject=host.name)
    kept = tuple(f"{use.path} was left: {use.why}" for use in found if use.state not in (uses.FREE, uses.ABSENT))
    return Removal(tuple(removed), kept)


async def _if_unchanged(host: Host, found: Sequence[Use], contents: Mapping[str, str]) -> list[Use]:
    """The same, but unknown where the file is another one than the replaced VM had, or was written since."""
    answers = await host.agent.fingerprints(paths=[use.path for use in found]) if contents else [None] * len(found)
    return [
        replace(use, state=uses.UNKNOWN, why="it is another file than the replaced VM had, or was written since")
        if text and use.path in contents and ":".join(fingerprint.content(text)) != contents[use.path]
        else use
        for use, text in zip(found, answers, strict=True)
    ]


async def remove_replaced(
    host: Host,
    libvirt: FencedLibvirt,
    name: str,
    paths: Sequence[str],
    forget: Sequence[str],
    elsewhere: Sequence[str] = (),
    *,
    contents: Mapping[str, str],
) -> Removal:
    """Remove what only a VM that was replaced had: these files, snapshots and checkpoints. Raises TransferError."""
    forgotten = await libvirt.forget_state(name, tuple(forget), tuple(paths))
    done = await _remove_files(host, libvirt, paths, elsewhere, contents)
    return Removal((*forgotten, *done.removed), done.kept)


async def cleanup(
    host: Host, libvirt: FencedLibvirt, name: str, *, stop: bool, elsewhere: Sequence[str] = ()
) -> Removal:
    """Remove the VM with everything libvirt keeps about it, and its own disks. The operation's lock is held.

    Raises RefusedError when it runs and `stop` is not given, TransferError.
    """
    found = await existing(host, libvirt, name, await users(libvirt, elsewhere))
    if found is None:
        return Removal()
    if found.domain.state != domain_facts.SHUT_OFF and not stop:
        raise RefusedError(
            f"VM {name} on {host.name} is {found.domain.state}",
            subject=name,
            remedy="shut it down, or pass stop=True",
        )
    removed = []
    if await libvirt.stop(name):
        removed.append(f"running state of {name}")
    variables = await _variables_in_use(host, libvirt, found, elsewhere)
    if found.domain.persistent:
        await libvirt.undefine(name, keep_variables=bool(variables))
        removed.append(f"definition of {name}")
    for thing in removed:
        log.info("removed the %s on %s", thing, host.name)
    done = await _remove_files(host, libvirt, found.removable, elsewhere, {})
    kept = tuple(f"{path} was left: {why}" for path, why in (*found.kept, *variables))
    return Removal((*removed, *done.removed), (*kept, *done.kept))


async def _variables_in_use(
    host: Host, libvirt: LibvirtHost, found: Existing, elsewhere: Sequence[str]
) -> list[tuple[str, str]]:
    """The files of UEFI variables that libvirt would remove with the VM and others may use; each with the reason."""
    named = [one.value for one in references(found.domain.xml) if one.role is Role.DATA and one.kind == "nvram"]
    files = sorted({*named, *found.variables})
    known = await users(libvirt, elsewhere)
    judged = await judge(host, known, files, but=found.domain.uuid, processes=True)
    return [(use.path, use.why) for use in judged if use.state not in (uses.FREE, uses.ABSENT)]
