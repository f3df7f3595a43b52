"""Findings about what a definition refers to on its host: whether the destination has it. Pure.

What the destination lacks is a warning that says what to do, since libvirt defines the VM all the same. Content that
would be left behind is refused. What cannot be found out is reported as such, and taken neither for present nor absent.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping

from kvm_clone.definition.domain_xml import DiskXml, DomainXml
from kvm_clone.definition.references import Reference, Role
from kvm_clone.findings import Finding, Severity, block
from kvm_clone.planning import things
from kvm_clone.planning.facts import DestinationFacts, Facts
from kvm_clone.planning.host_paths import renames
from kvm_clone.planning.things import MISSING, UNKNOWN
from kvm_clone.units import format_bytes

_SOFTWARE = ("/usr/", "/lib", "/bin/", "/sbin/", "/boot/", "/etc/", "/proc/", "/sys/", "/dev/")
"""Directories whose files come from packages and the kernel: none of them is a VM's own data."""

_REFUSED_ALREADY = ("nvram", "tpm", "memory", "mirror", "data file")
"""Kinds whose data definition.domain_xml.unsupported refuses."""

_BOOT_FILE = "boot file"
"""The kind whose absence checks.py refuses."""

Check = Callable[[Facts, str, Reference], Iterator[Finding]]


def reference_findings(facts: Facts, name: str) -> Iterator[Finding]:
    """Yield the findings about everything that the definition refers to. `name`: the clone's."""
    yield from disk_findings(facts.destination, facts.source.xml)
    seen: set[tuple[Role, str, bool]] = set()
    for reference in facts.source.references:
        key = (reference.role, reference.value, reference.readonly)
        if key not in seen and not reference.owner.startswith("devices/disk["):
            seen.add(key)
            yield from _CHECKS[reference.role](facts, name, reference)
    yield from _disk_parts(facts, name)
    yield from _unseen(facts)


def _warn(code: str, subject: str, text: str, remedy: str = "") -> Finding:
    return Finding(code, Severity.WARNING, subject, text, remedy)


def _missing(facts: Facts, reference: Reference, what: str, remedy: str, code: str = "") -> Finding:
    """Return the finding about a thing that the destination lacks, or has otherwise than the VM wants it."""
    host, vm = facts.destination.host.name, facts.source.domain.name
    text = f"{host} {what}, which VM {vm} refers to ({reference.where}); the VM may not start."
    return _warn(code or f"{reference.role}-missing", reference.value, text, remedy)


def _unclear(facts: Facts, reference: Reference, why: str) -> Finding:
    host, vm = facts.destination.host.name, facts.source.domain.name
    text = f"Whether {host} has {reference.value}, which VM {vm} refers to ({reference.where}), is not known: {why}."
    return _warn("not-checked", reference.value, text, f"look at it on {host}")


# Files.


def _path(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    """Yield the findings about a path that has to be there: nothing of it is copied."""
    if not reference.is_path or reference.kind == "emulator":
        return
    host = facts.destination.host.name
    here, there = facts.source.things.path(reference.value), facts.destination.things.path(reference.value)
    if there == MISSING and reference.kind != _BOOT_FILE:
        remedy = f"provide it on {host}, or take it out of the definition"
        yield _missing(facts, reference, f"lacks {reference.value}", remedy, _PATH_MISSING)
    elif there == UNKNOWN:
        yield _unclear(facts, reference, "it cannot be looked at")
    elif MISSING not in (here, there) and here not in (there, UNKNOWN):
        text = f"{reference.value} is a {here} on {facts.source.host.name} and a {there} on {host} ({reference.where})."
        yield _warn("path-differs", reference.value, text, "look at it: VM may not start, or use another thing")


_PATH_MISSING = "path-missing"


def _made(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    """Yield the findings about a file or socket that the VM's start makes: it needs a directory and no other owner."""
    if not reference.is_path:
        return
    destination, host = facts.destination, facts.destination.host.name
    directory = posixpath.dirname(reference.value)
    there = destination.things.path(directory)
    if there not in ("directory", UNKNOWN):
        what = f"has no directory {directory} for {reference.value}"
        yield _missing(facts, reference, what, f"make it on {host}", _PATH_MISSING)
    elif there == UNKNOWN:
        yield _unclear(facts, reference, f"{directory} cannot be looked at")
    new = renames(facts, name).get(reference.value)
    others = _others(facts, name, reference)
    if new is not None:
        users = others | destination.paths_in_use.get(reference.value, frozenset()) - {name}
        text = f"{reference.value} is used by {_listed(users)} on {host} already; {name} gets {new}."
        yield Finding("path-renamed", Severity.INFO, reference.value, text)
    elif others:
        yield _shared(facts, reference, others)
    elif _is_overwritten(facts, reference):
        text = f"{reference.value} is a file on {host} already; VM {name} will write to it ({reference.where})."
        yield _warn("path-exists", reference.value, text, "move it away, or name another in the definition")


def _is_overwritten(facts: Facts, reference: Reference) -> bool:
    there = facts.destination.things.path(reference.value)
    return reference.role is Role.OUTPUT and facts.destination.existing is None and there in ("file", "block")


def _data(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    """Yield the findings about content that is no disk: what the VM writes to is refused, since it is not copied."""
    here = facts.source.things.path(reference.value)
    source = facts.source.host.name
    if reference.kind in _REFUSED_ALREADY:
        return
    if reference.readonly or not reference.is_path:
        yield from _path(facts, name, reference)
    elif here in ("file", "block"):
        text = (
            f"VM {facts.source.domain.name} has data in {reference.value} ({reference.where}), which would not be "
            "copied."
        )
        remedy = "make it one of the VM's disks, or declare it read-only where it is named"
        yield block("data-not-copied", reference.value, text, remedy)
    elif here == MISSING and reference.made:
        yield from _made(facts, name, reference)
    elif here == MISSING:
        what = f"{source} lacks {reference.value} itself"
        text = f"{what}, which VM {facts.source.domain.name} refers to ({reference.where}); nothing of it is copied."
        yield _warn(_PATH_MISSING, reference.value, text, "take it out of the definition")
    elif here == UNKNOWN:
        text = f"Whether VM {facts.source.domain.name} has data in {reference.value} ({reference.where}) is not known."
        yield block("data-not-known", reference.value, text, f"look at it on {source}: it would not be copied")
    else:
        yield from _path(facts, name, reference)


def _unknown(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    """Yield the findings about what no rule names: a file is treated as data, the rest is a warning."""
    here = facts.source.things.path(reference.value) if reference.is_path else UNKNOWN
    if here == "file" and not reference.value.startswith(_SOFTWARE):
        yield from _data(facts, name, reference)
        return
    there = facts.destination.things.path(reference.value) if reference.is_path else UNKNOWN
    vm, host = facts.source.domain.name, facts.destination.host.name
    said = f" On {facts.source.host.name} it is {_article(here)}, on {host} {_article(there)}." * reference.is_path
    text = f"VM {vm} refers to {reference.value} ({reference.where}), which kvm-clone has no rule for.{said}"
    yield _warn("unknown-reference", reference.value, text, f"see that {host} has what the VM needs of it")


def _article(kind: str) -> str:
    return kind if kind in (MISSING, UNKNOWN) else f"a {kind}"


# What libvirt has, and the kernel shows.


def _kernel(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    """Yield a finding about a thing that the kernel shows at any of several paths."""
    paths = things.kernel_paths(reference)
    found = {facts.destination.things.path(path) for path in paths}
    host = facts.destination.host.name
    if found == {MISSING}:
        what = f"has no {reference.role.replace('-', ' ')} {reference.value}"
        yield _missing(facts, reference, what, f"provide it on {host}, or take it out of the definition")
    elif not found or found == {UNKNOWN, MISSING} or found == {UNKNOWN}:
        yield _unclear(facts, reference, "nothing there shows it")


def _host_device(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    bus, _, address = reference.value.partition(":")
    if bus != "usb":
        yield from _kernel(facts, name, reference)
    elif address not in facts.destination.things.resources.usb:
        what = f"has no USB device {address}"
        yield _missing(facts, reference, what, "plug it in there, or take it out of the definition")


def _partition(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    if reference.value.strip("/") != "machine":  # libvirt makes that partition itself
        yield from _kernel(facts, name, reference)


def _network(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    """Yield a finding about a network that no interface names: checks.py refuses those of interfaces."""
    if reference.kind != "interface" and reference.value not in facts.destination.abilities.networks:
        host = facts.destination.host.name
        yield _missing(facts, reference, f"has no libvirt network {reference.value}", f"virsh net-define on {host}")


def _listed_object(role: Role, remedy: str) -> Check:
    """Return the check of things that libvirt at the destination lists, or cannot list."""

    def check(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
        objects = facts.destination.things.objects
        known = {
            Role.NWFILTER: objects.filters,
            Role.SECRET: objects.secrets,
            Role.PORTGROUP: objects.portgroups,
            Role.SECLABEL: objects.secmodels,
        }[role]
        if known is None:
            yield _unclear(facts, reference, "libvirt there does not list such things")
        elif reference.value not in known:
            what = f"has no {_NAMES[role]} {reference.value}"
            yield _missing(facts, reference, what, remedy.format(host=facts.destination.host.name))

    return check


_NAMES: Mapping[Role, str] = {
    Role.NWFILTER: "network filter",
    Role.SECRET: "secret",
    Role.PORTGROUP: "port group",
    Role.SECLABEL: "security driver",
}


def _volume(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    why = facts.destination.things.objects.volumes.get(reference.value)
    if why is None:
        yield _unclear(facts, reference, "it was not looked up")
    elif why:
        yield _missing(facts, reference, f"cannot use the volume {reference.value} ({why})", "copy it there")


def _address(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    own = facts.destination.things.resources.addresses.get(reference.value)
    if own is None:
        yield _unclear(facts, reference, "it is no numeric address")
    elif not own:
        remedy = "let the definition listen on an address of that host, or on 0.0.0.0"
        yield _missing(facts, reference, f"does not have the address {reference.value}", remedy)


def _exclusive(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    others = _others(facts, name, reference)
    if others:
        yield _shared(facts, reference, others)


def _pipe(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    """Yield the findings about a pipe: QEMU opens PATH.in and PATH.out, or PATH itself, and makes none of them."""
    yield from _exclusive(facts, name, reference)
    yield from _path(facts, name, reference)


def _shared(facts: Facts, reference: Reference, others: frozenset[str]) -> Finding:
    host, vm = facts.destination.host.name, facts.source.domain.name
    text = (
        f"{_listed(others)} on {host} has the {reference.kind} {reference.value} that VM {vm} has ({reference.where}); "
        "both cannot run there at once."
    )
    return _warn("shared", reference.value, text, "give one of them another in its definition")


def _others(facts: Facts, name: str, reference: Reference) -> frozenset[str]:
    """Return the VMs of the destination that claim the same thing, but for the one that the clone becomes."""
    used = facts.destination.things.objects.used.get(things.claim(reference), frozenset())
    return used - {name}


def _listed(names: frozenset[str]) -> str:
    return f"VM {', '.join(sorted(names))}" if names else "another VM"


# CPUs and memory.


def _huge_pages(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    have = facts.destination.things.resources
    kinds = [one for one in facts.source.references if one.role is Role.HUGEPAGES]
    # Pages of one kind back all of the memory; of several kinds, each backs an unknown part.
    memory = facts.source.xml.memory if len(kinds) == 1 and reference.kind == "memoryBacking" else 1
    size = int(reference.value) or have.default_hugepage
    pages = have.hugepages.get(size)
    shown = format_bytes(size * 1024)
    remedy = f"reserve them on {facts.destination.host.name}: /sys/kernel/mm/hugepages, vm.nr_hugepages"
    if pages is None or not size:
        yield _missing(facts, reference, f"has no huge pages of {shown}", remedy)
    elif pages.total * size * 1024 < memory:
        what = f"has {pages.total} huge pages of {shown}, too few for the VM's {format_bytes(facts.source.xml.memory)}"
        yield _missing(facts, reference, what, remedy)
    elif not have.hugetlbfs:
        yield _missing(facts, reference, "has no hugetlbfs mounted", "mount -t hugetlbfs hugetlbfs /dev/hugepages")


def _numbered(what: str, online: Callable[[things.Resources], frozenset[int] | None]) -> Check:
    """Return the check of a set of the host's CPUs or NUMA nodes, all of which have to be online."""

    def check(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
        have, wanted = online(facts.destination.things.resources), things.parse_set(reference.value)
        if have is None or wanted is None:
            yield _unclear(facts, reference, f"its {what}s are not known")
        elif lacking := sorted(wanted - have):
            listed = ", ".join(map(str, lacking[:8])) + (", …" if len(lacking) > 8 else "")
            yield _missing(facts, reference, f"has no {what} {listed}", "name those that it has in the definition")

    return check


# What is only reported.


def _tied(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    text = f"VM {facts.source.domain.name} uses the {reference.kind} ({reference.where}), which differs on each host."
    yield _warn("host-tied", reference.value, text, "see that the destination's is right for it")


def _command_line(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    text = (
        f"VM {facts.source.domain.name} passes something of its own to QEMU ({reference.kind}: {reference.value}); it "
        "is kept as it is, and nothing that it names is copied."
    )
    yield _warn("command-line", reference.where, text, "see that the destination has what it names")


def _server(facts: Facts, _name: str, reference: Reference) -> Iterator[Finding]:
    host = facts.destination.host.name
    text = f"VM {facts.source.domain.name} uses {reference.value} over the network ({reference.where}); "
    yield Finding("server", Severity.INFO, reference.value, f"{text}whether {host} reaches it is not checked.")


def _nothing(_facts: Facts, _name: str, _reference: Reference) -> Iterator[Finding]:
    """Yield nothing: it is checked elsewhere, or names nothing of the host."""
    yield from ()


def _path_or_made(facts: Facts, name: str, reference: Reference) -> Iterator[Finding]:
    yield from (_made if reference.made else _path)(facts, name, reference)


_CHECKS: Mapping[Role, Check] = {
    Role.DATA: _data,
    Role.FIRMWARE: _path,
    Role.FILE: _path,
    Role.PROGRAM: _path,
    Role.OUTPUT: _made,
    Role.SOCKET: _path_or_made,
    Role.PIPE: _pipe,
    Role.DEVICE: _path,
    Role.DIRECTORY: _path,
    Role.NETWORK: _network,
    Role.PORTGROUP: _listed_object(Role.PORTGROUP, "define it in the network on {host}: virsh net-edit"),
    Role.BRIDGE: _nothing,
    Role.INTERFACE: _kernel,
    Role.NWFILTER: _listed_object(Role.NWFILTER, "define it on {host}: virsh nwfilter-define"),
    Role.ADDRESS: _address,
    Role.SERVER: _server,
    Role.EXCLUSIVE: _exclusive,
    Role.VOLUME: _volume,
    Role.SECRET: _listed_object(Role.SECRET, "define it on {host}: virsh secret-define, secret-set-value"),
    Role.HUGEPAGES: _huge_pages,
    Role.NUMA: _numbered("NUMA node", lambda have: have.nodes),
    Role.CPUSET: _numbered("CPU", lambda have: have.cpus),
    Role.HOST_DEVICE: _host_device,
    Role.SECLABEL: _listed_object(Role.SECLABEL, "use that security driver on {host}, or drop the label"),
    Role.CGROUP: _partition,
    Role.TIED: _tied,
    Role.COMMAND_LINE: _command_line,
    Role.INERT: _nothing,
    Role.UNKNOWN: _unknown,
}


# Disks that are kept: media, read-only and shareable ones.


def disk_findings(destination: DestinationFacts, xml: DomainXml) -> Iterator[Finding]:
    """Yield a warning for each medium that is missing, and a refusal for each missing disk that is not copied."""
    host = destination.host.name
    for disk in xml.media:
        if disk.path and (why := _absent(destination, disk)):
            text = f"{host} {why}, the medium in {disk.target}; the reference is kept, the VM may not start."
            yield _warn("medium-missing", disk.target, text, "copy it there, or eject it")
    for disk in xml.referenced_disks:
        kind = "shared" if disk.shareable else "read-only"
        if why := _absent(destination, disk):
            yield block(
                "referenced-disk-missing",
                disk.target,
                f"{host} {why}, the {kind} disk {disk.target}, which is not copied.",
                f"make it available on {host} at the same path",
            )
        else:
            text = f"The {kind} disk {disk.target} ({disk.path}) is not copied; {host} uses what it has there."
            yield _warn("referenced-disk", disk.target, text)


def _absent(destination: DestinationFacts, disk: DiskXml) -> str:
    """Return why the destination cannot use a disk that is not copied; nothing where it can or may."""
    path = disk.path or ""
    if disk.volume is not None:
        why = destination.things.objects.volumes.get(str(disk.volume), "")
        return f"cannot use the volume {disk.volume} ({why})" if why else ""
    if disk.type == "file":
        return "" if destination.present.get(path, False) else f"lacks {disk.path}"
    missing = path.startswith("/") and destination.things.path(path) == MISSING
    return f"lacks {path}" if missing else ""


def _disk_parts(facts: Facts, name: str) -> Iterator[Finding]:
    """Yield the findings about what kept disks need beside their file: backing images, secrets, sockets, servers."""
    disks = dict(enumerate(facts.source.xml.disks))
    for reference in facts.source.references:
        number = re.fullmatch(r"devices/disk\[(\d+)\]", reference.owner)
        disk = disks.get(int(number[1])) if number else None
        if disk is not None and not _is_said(disk, reference):
            check = _path if reference.role is Role.DATA else _CHECKS[reference.role]
            yield from check(facts, name, reference)


def _is_said(disk: DiskXml, reference: Reference) -> bool:
    """Whether other findings cover the reference: disk_findings the disk's own source, the refusal a network disk."""
    if reference.role is Role.SERVER:
        return disk.device == "disk"
    return reference.kind == "disk" and (reference.role is Role.VOLUME or reference.value == disk.path)


def _unseen(facts: Facts) -> Iterator[Finding]:
    """Yield a finding for each kept disk of which it is not known whether the destination has it."""
    for reference in facts.source.references:
        unseen = facts.destination.things.path(reference.value) == UNKNOWN
        if reference.kind == "disk" and reference.is_path and unseen:
            yield _unclear(facts, reference, "it cannot be looked at")
