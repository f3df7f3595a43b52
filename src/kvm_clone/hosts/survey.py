"""Looking at both hosts, without changing anything on either."""

from __future__ import annotations

import asyncio
import os
import posixpath
import time
from collections.abc import Iterable
from dataclasses import replace

from kvm_clone.agent.host import peer, uses
from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.protocol.wire import ProtocolError
from kvm_clone.definition import domain_xml, variables
from kvm_clone.definition.references import Role, references
from kvm_clone.errors import RefusedError
from kvm_clone.gather import together
from kvm_clone.hosts import ssh, vms
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.answers import Journalled
from kvm_clone.hosts.children import kill_process, spawn
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.hosts.outputs import read_past_noise
from kvm_clone.image import Image
from kvm_clone.options import Options, Route, SyncOptions
from kvm_clone.planning import domain_facts, things
from kvm_clone.planning.facts import (
    DestinationFacts,
    Existing,
    Facts,
    HostFacts,
    ImageFacts,
    RouteFacts,
    SourceFacts,
    Staged,
)
from kvm_clone.planning.file_names import file_like, home_of, scratch_prefix, stems

_LOOKS = 3
"""How often the destination's VM is looked at when it changes meanwhile; after that the plan may rest on a mixture, and
is refused for it when the lock is taken, or before the define."""


async def inspect(
    source: Host,
    source_libvirt: LibvirtHost,
    destination: Host,
    destination_libvirt: LibvirtHost,
    vm: str,
    options: Options,
    *,
    known_route: RouteFacts | None = None,
) -> Facts:
    """Everything a plan needs. From here on the source agent keeps every QEMU from writing the disks of a VM at rest.

    For a sync the destination's agent does the same for the replica's. `known_route`: is not to be measured again.

    Raises RefusedError when the source has no such VM, ConnectError, TransferError.
    """

    async def both_hosts() -> tuple[SourceFacts, DestinationFacts]:
        facts = await _source(source, source_libvirt, vm)
        name = options.name_for(facts.domain.name)
        replica = isinstance(options, SyncOptions)
        return facts, await _settled(destination, destination_libvirt, facts, name, replica=replica)

    async def route() -> RouteFacts:
        if known_route is not None:
            return known_route
        # How long a sync takes does not depend on the rate alone: it is neither reported nor measured.
        return await find_route(source, destination, options.route, measured=not isinstance(options, SyncOptions))

    (source_facts, destination_facts), reach = await together(both_hosts(), route())
    return Facts(source_facts, destination_facts, reach)


async def _source(host: Host, libvirt: LibvirtHost, vm: str) -> SourceFacts:
    domain, uuid = await together(libvirt.find(vm), libvirt.host_uuid())
    if domain is None:
        raise RefusedError(
            f"{host.name} has no VM named {vm!r}",
            subject=vm,
            remedy=f"see what it has: kvm-clone list {host.name}",
        )
    xml = domain_xml.read_domain(domain.xml, domain.volumes)
    running = domain.state in domain_facts.RUNNING
    kept = things.kept(references(domain.xml), xml)
    about, disks, uefi, paths = await together(
        host.agent.host(),
        _images(host, xml, domain.state),
        _variables(host, xml, domain.state),
        host.agent.look(paths=things.paths_of(kept)),
    )
    images = (*disks, *uefi)
    facts = SourceFacts(
        _identified(about, uuid),
        domain,
        xml,
        images,
        files=await fingerprints(host, xml, images),
        references=kept,
        things=things.Things(paths),
    )
    return await _running(host, libvirt, facts) if running else facts


async def fingerprints(host: Host, xml: domain_xml.DomainXml, images: Iterable[ImageFacts]) -> dict[str, str]:
    """The fingerprints of all files and devices that a VM has as disks or media, of those that are there.

    `images`: those of its own, which may rest on more files, and be no disks.
    """
    named = {disk.path for disk in xml.disks if disk.path and disk.type in ("file", "block")}
    paths = sorted(named | {layer.path for image in images for layer in (image, *image.layers)})
    answers = await host.agent.fingerprints(paths=paths)
    return {path: answer for path, answer in zip(paths, answers, strict=True) if answer}


async def _running(host: Host, libvirt: LibvirtHost, facts: SourceFacts) -> SourceFacts:
    """The facts with what is to be known of a running VM."""
    vm, images = facts.domain.name, facts.images
    now, version, pools = await together(libvirt.look(vm), libvirt.version(), libvirt.pools())
    paths = {posixpath.dirname(image.path) for image in images if image.path and not image.device}
    paths |= {pool.path for pool in pools if pool.active and pool.type in domain_facts.FILE_POOLS}
    reader, *directories = await together(
        host.agent.reader(domain=facts.domain.uuid),
        *(
            host.agent.directory(path=path, stems=[scratch_prefix(facts.domain.uuid)], tried=False)
            for path in sorted(paths)
        ),
    )
    found = {directory.path: directory for directory in directories}
    return replace(facts, live=now, directories=found, reader=reader, libvirt=version)


def _identified(host: HostFacts, uuid: str) -> HostFacts:
    """The host with its UUID by its libvirt."""
    return replace(host, identity=replace(host.identity, uuid=uuid))


async def _images(host: Host, xml: domain_xml.DomainXml, state: str) -> tuple[ImageFacts, ...]:
    """The VM's own disks' images."""
    return tuple(await together(*(_disk(host, disk, state) for disk in xml.own_disks)))


async def _disk(host: Host, disk: domain_xml.DiskXml, state: str) -> ImageFacts:
    """A disk's image. Nothing is asked of one that the plan refuses by its definition."""
    if disk.type not in domain_xml.COPIED_TYPES or disk.format not in domain_xml.FORMATS:
        return ImageFacts(disk.path or "", disk.format, target=disk.target, error="not looked at")
    return await _image(host, disk.target, Image(disk.path or "", disk.format), state)


async def _variables(host: Host, xml: domain_xml.DomainXml, state: str) -> tuple[ImageFacts, ...]:
    """The file of the VM's UEFI variables, if there is one: libvirt makes it when the VM first starts."""
    if xml.variables is None:
        return ()
    kinds = await host.agent.look(paths=xml.variables.paths(xml.name))
    there = [Image(path, xml.variables.format_of(path)) for path, kind in kinds.items() if kind != things.MISSING]
    if len(there) > 1:
        why = f"{there[1].path} is there as well, and which of them the VM has is not known"
        return (ImageFacts(there[0].path, there[0].format, target=variables.KEY, error=why),)
    return tuple([await _image(host, variables.KEY, one, state) for one in there])


async def _image(host: Host, target: str, image: Image, state: str) -> ImageFacts:
    """An image, locked if its VM is at rest."""
    path, format_ = image.path, image.format
    running = state in domain_facts.RUNNING
    if not (running or state == domain_facts.SHUT_OFF):
        return ImageFacts(path, format_, target=target, error="not looked at")
    try:
        if not running:
            await host.agent.lock_image(path=path, image_format=format_)
    except AgentCallError as error:
        in_use = error.kind == kinds.IN_USE
        return ImageFacts(path, format_, target=target, error=str(error), in_use=in_use)
    return replace(await host.agent.disk(path=path, image_format=format_, live=running), target=target)


async def _settled(
    host: Host, libvirt: LibvirtHost, source: SourceFacts, name: str, *, replica: bool
) -> DestinationFacts:
    """The destination's facts, of one moment as to the VM of that name.

    An operation that ends between the look at the VM and the look at journals would leave a VM that is not sealed yet,
    and no operation under way: a replica that somebody seems to have used.
    """
    for _ in range(_LOOKS):
        facts = await _destination(host, libvirt, source, name, replica=replica)
        now = await libvirt.find(name)
        if now == (facts.existing.domain if facts.existing is not None else None):
            break
    return facts


async def _destination(
    host: Host, libvirt: LibvirtHost, source: SourceFacts, name: str, *, replica: bool
) -> DestinationFacts:
    xml = source.xml
    known = await vms.users(libvirt, source.files.values())
    names, pools, abilities, objects, existing = await together(
        libvirt.names(),
        libvirt.pools(),
        libvirt.abilities(xml),
        libvirt.objects(source.references),
        _existing(host, libvirt, name, known, replica=replica),
    )
    own = (*xml.own_disks, *(existing.xml.own_disks if existing is not None else ()))
    wanted = {pool.path for pool in pools if pool.path and pool.type in domain_facts.FILE_POOLS}
    files = [disk.path for disk in own if disk.path and disk.type == "file"]
    files += [image.path for image in source.images if image.target == variables.KEY]
    files += existing.variables if existing is not None else ()
    wanted.add(variables.DIRECTORY)  # an interrupted attempt may have staged something there
    wanted |= {where for path in files if (home := home_of(path)) for where in (posixpath.dirname(path), home)}
    referred = {*(file.path for file in xml.os_files), *things.paths_of(source.references)}
    kept = (*xml.media, *xml.referenced_disks)
    referred |= {disk.path for disk in kept if disk.path and disk.type == "file" and disk.volume is None}
    addresses = {one.value for one in source.references if one.role is Role.ADDRESS}
    paths = sorted(wanted)
    lands = wanted if xml.variables is not None else wanted - {variables.DIRECTORY}
    named = (file_like(image, image.target, xml.name) for image in source.disk_images if image.path)
    files_like = list(stems(named, xml.name, name))
    if xml.variables is not None:
        files_like.append(f"{name}_VARS")
    about, staged, directories, found, resources = await together(
        host.agent.host(),
        host.agent.staged(directories=paths, name=name),
        together(*(host.agent.directory(path=path, stems=files_like, tried=path in lands) for path in paths)),
        host.agent.look(paths=sorted(referred)),
        host.agent.resources(addresses=sorted(addresses)),
    )
    attempt = next((_attempt(one) for one in staged if not one.error), None)
    if attempt is not None:
        used = await vms.judge(host, known, attempt.published)
        attempt = replace(attempt, in_use=tuple(use.path for use in used if use.state == uses.USED))
    return DestinationFacts(
        _identified(about, abilities.uuid),
        names,
        pools,
        dict(zip(paths, directories, strict=True)),
        {path: kind != things.MISSING for path, kind in found.items()},
        existing,
        attempt,
        "; ".join(_error(one) for one in staged if one.error),
        abilities,
        _names_by_path(known),
        things.Things(found, resources, objects),
    )


def _names_by_path(known: vms.Users) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for claim in known.claims:
        found.setdefault(claim.path, set()).add(claim.by.name)
    return {path: frozenset(names) for path, names in found.items()}


def _attempt(one: Journalled) -> Staged:
    return Staged(
        one.directory,
        one.operation,
        one.source.uuid,
        one.source.name,
        one.defining,
        one.committed,
        one.remove,
        one.forget,
        one.disks,
        one.holder,
        one.kind,
        one.published,
        one.foreign,
    )


def _error(one: Journalled) -> str:
    """Why a journal does not count, with its path."""
    return one.error if one.path in one.error else f"{one.path}: {one.error}"


async def _existing(host: Host, libvirt: LibvirtHost, name: str, known: vms.Users, *, replica: bool) -> Existing | None:
    """The VM of that name; as a replica, with its images, which nobody can write from here on."""
    found = await vms.existing(host, libvirt, name, known)
    if found is None or not replica:
        return found
    return replace(found, images=await _images(host, found.xml, found.domain.state))


async def find_route(source: Host, destination: Host, wanted: Route, *, measured: bool) -> RouteFacts:
    """Whether the source can send to the destination itself, and how fast the route that is taken is, if measured."""

    async def relay(reason: str) -> RouteFacts:
        return RouteFacts(False, reason, await _measure_relay(source, destination) if measured else 0.0)

    if wanted is Route.RELAY:
        return await relay("asked for")
    if source.address.local or destination.address.local:
        return await relay("this machine is one of the two hosts")
    argv, known_hosts = await direct_ssh(destination)
    answer = await source.agent.probe(ssh=argv, known_hosts=known_hosts, measured=measured)
    if answer.error:
        return await relay(f"{source.name} cannot connect to {destination.name}: {answer.error}")
    return RouteFacts(True, f"{source.name} can connect to {destination.name}", answer.rate if measured else 0.0)


async def _measure_relay(source: Host, destination: Host) -> float:
    """Bytes a second from one host through this machine to the other; 0 when it cannot be measured."""
    out, into = os.pipe()
    devnull = asyncio.subprocess.DEVNULL
    children: list[asyncio.subprocess.Process] = []
    try:
        argv = destination.ssh.session_argv(peer.MEASURE)
        reader = await spawn(*argv, stdin=out, stdout=asyncio.subprocess.PIPE, stderr=devnull)
        children.append(reader)
        assert reader.stdout is not None
        await read_past_noise(reader.stdout, peer.READY, peer.PROBE_SECONDS)
        began = time.monotonic()
        argv = source.ssh.session_argv(f"timeout {peer.MEASURED_SECONDS} head -c {peer.MEASURED_BYTES} /dev/zero")
        children.append(await spawn(*argv, stdin=devnull, stdout=into, stderr=devnull))
        os.close(into)
        into = -1
        arrived = await read_past_noise(reader.stdout, b"", peer.PROBE_SECONDS)
        return int(arrived) / max(time.monotonic() - began, 1e-6)
    except (EOFError, OSError, ValueError, ProtocolError):  # a rate is a hint: what is wrong, others say
        return 0.0
    finally:
        for descriptor in (out, into):
            if descriptor >= 0:
                os.close(descriptor)
        await kill_process(*children)


async def direct_ssh(destination: Host) -> tuple[list[str], str]:
    """The ssh command by which another host reaches this one, and the keys it shall know it by.

    The other host has a configuration of its own: it gets the plain address that ours comes to, and the host keys that
    this machine knows, under a name that only they have.
    """
    known = destination.ssh.known
    keys = await ssh.known_host_lines(known)
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "LogLevel": "ERROR",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "StrictHostKeyChecking": "yes",
        "ControlPath": "none",
    }
    if keys:
        options["HostKeyAlias"] = _ALIAS
    argv = ["ssh", "-T", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    argv += ["-p", known.get("port") or "22", "-l", known.get("user"), "--", known.get("hostname")]
    lines = [" ".join([*words[:-2], _ALIAS, *words[-2:]]) for words in (key.split() for key in keys)]
    return argv, "".join(f"{line}\n" for line in lines)


_ALIAS = "kvm-clone-destination"
