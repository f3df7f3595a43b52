"""Findings about the source and the destination host. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator

from kvm_clone.agent.disks.image import RAW
from kvm_clone.definition import domain_xml, variables
from kvm_clone.definition.spans import is_xml
from kvm_clone.findings import Finding, Severity, block
from kvm_clone.image import Image
from kvm_clone.options import CloneOptions, Options, Route
from kvm_clone.planning import domain_facts
from kvm_clone.planning.cpu_checks import cpu_findings
from kvm_clone.planning.decide import Decision
from kvm_clone.planning.facts import DestinationFacts, Facts, ImageFacts, SourceFacts
from kvm_clone.planning.identity_checks import kept_findings
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.reference_checks import reference_findings
from kvm_clone.units import format_bytes, format_duration, format_rate

_OLDEST_QEMU = (4, 2)
"""The first release whose qemu-nbd has socket activation and the compress filter, and whose map has what we read."""

_SUBCLUSTERS_QEMU = (5, 2)
"""The first release whose qcow2 images can hold less than a cluster: extended_l2."""

_CLOCK_SECONDS = 5.0

_LONGEST_NAME = 255 - len(".xml.new")
"""Bytes of a VM's name: libvirt writes a file NAME.xml.new."""


def source_findings(source: SourceFacts, options: Options) -> Iterator[Finding]:
    """Yield the findings about the source."""
    domain = source.domain
    if domain.state not in (domain_facts.SHUT_OFF, *domain_facts.RUNNING):
        yield block(
            "source-state",
            domain.name,
            f"VM {domain.name} is {domain.state} on {source.host.name}; it can be copied when it runs, is paused or is "
            "shut off.",
            "wait until it is",
        )
    yield from _left_behind(domain, options)
    for reason in domain_xml.unsupported(source.xml):
        yield block(reason.code, reason.subject, reason.text, "")
    for warning in domain_xml.warnings(source.xml):
        yield Finding(warning.code, Severity.WARNING, warning.subject, warning.text)
    if domain.state in (domain_facts.SHUT_OFF, *domain_facts.RUNNING):
        refused = {reason.subject for reason in domain_xml.unsupported(source.xml)}
        for image in source.images:
            if image.target not in refused:
                yield from _image_findings(image, domain.snapshots)
                yield from _chain_findings(source.xml, image)
    yield from _variables_findings(source)
    yield from _tool_findings(source.host.name, source.host.qemu_img, source.host.qemu_nbd)


def _left_behind(domain: domain_facts.Domain, options: Options) -> Iterator[Finding]:
    """Yield the findings about states of the VM that are not copied: only its current disks are."""
    if domain.managed_save and options.without_saved_state:
        text = (
            f"VM {domain.name} has a saved memory image (managed save), which is not copied: the copy of its disks is "
        )
        yield Finding("managed-save", Severity.WARNING, domain.name, f"{text}crash-consistent, as after a power cut.")
    elif domain.managed_save:
        yield block(
            "managed-save",
            domain.name,
            f"VM {domain.name} has a saved memory image (managed save), which cannot be copied.",
            "start it and shut it down, or copy its disks alone with --without-saved-state",
        )
    if domain.snapshots:
        listed = ", ".join(domain.snapshots)
        text = f"VM {domain.name} has snapshots ({listed}): its current state is copied, without them."
        yield Finding("snapshots", Severity.WARNING, domain.name, text)


def _image_findings(image: ImageFacts, listed: Collection[str]) -> Iterator[Finding]:
    """Yield the findings about a disk's image. `listed`: the snapshots that libvirt knows, of which is said already."""
    what = f"{'File of UEFI variables' if image.target == variables.KEY else f'Disk {image.target}'} ({image.path})"
    reasons = (
        ("disk-in-use", image.in_use, f"is in use by another process ({image.error})", "shut down whatever uses it"),
        ("disk-unreadable", image.error and not image.in_use, f"cannot be read: {image.error}", ""),
        (
            "disk-block-device",
            not (image.regular or image.device),
            "is neither a regular file nor a block device",
            "",
        ),
        (
            "disk-data-file",
            image.data_file,
            f"keeps its data in {image.data_file}, which cannot be cloned yet",
            "",
        ),
        ("disk-encrypted", image.encrypted, "is encrypted, which cannot be cloned yet", ""),
        ("disk-corrupt", image.corrupt, "is marked as corrupt", "repair it: qemu-img check -r all"),
    )
    for code, applies, text, remedy in reasons:
        if applies:
            yield block(code, image.target, f"{what} {text}.", remedy)
    unlisted = [name for name in image.snapshots if name not in listed]
    if unlisted:
        text = f"{what} has internal snapshots ({', '.join(unlisted)}), which are not copied."
        yield Finding("disk-snapshots", Severity.WARNING, image.target, text)


def _chain_findings(xml: domain_xml.DomainXml, image: ImageFacts) -> Iterator[Finding]:
    """Yield a finding where the definition has libvirt open another chain than the one that the image names."""
    disk = next((one for one in xml.own_disks if one.target == image.target), None)
    if disk is None:
        return
    there = image.layers
    agree = (
        len(disk.backing) <= len(there)
        and all(map(_is_same_layer, disk.backing, there))
        and not (disk.ends and len(disk.backing) < len(there))
    )
    if not (image.error or image.data_file or image.encrypted or agree):
        said, found = (", ".join(layer.path for layer in layers) or "nothing" for layers in (disk.backing, there))
        text = f"Disk {image.target} ({image.path}) rests on {said} by the definition, and on {found} by its image."
        yield block("disk-backing", image.target, text, "let both name the same: virsh edit, or qemu-img rebase -u")


def _variables_findings(source: SourceFacts) -> Iterator[Finding]:
    """Yield why the UEFI variables of a running VM cannot be copied: they are read from the file that it has open."""
    image = next((one for one in source.images if one.target == variables.KEY), None)
    if source.live is None or source.xml.variables is None:
        return
    name, remedy = source.domain.name, f"shut it down: virsh shutdown {source.domain.name}"
    if image is not None and image.format != RAW:
        text = f"The UEFI variables of VM {name} ({image.path}) can be copied only while it is shut off."
        yield block("variables-format", name, text, remedy)
    if source.live.variables != (image.path if image is not None else ""):
        there = image.path if image is not None else "no file"
        text = f"The UEFI variables of VM {name} are {source.live.variables or 'no file'} while it runs, {there} after."
        yield block("variables-live", name, text, remedy)


def _is_same_layer(said: Image, found: Image) -> bool:
    return posixpath.normpath(said.path) == posixpath.normpath(found.path) and said.format in ("", found.format)


def _tool_findings(host: str, qemu_img: str | None, qemu_nbd: str | None) -> Iterator[Finding]:
    for program, found in (("qemu-img", qemu_img), ("qemu-nbd", qemu_nbd)):
        remedy = f"install qemu-utils (or qemu-img) on {host}"
        if found is None:
            yield block("tool-missing", host, f"{host} has no {program}.", remedy)
        elif found != "unknown" and version(found) < _OLDEST_QEMU:
            oldest = ".".join(map(str, _OLDEST_QEMU))
            yield block("tool-old", host, f"{program} on {host} is {found}, {oldest} is needed.", remedy)


def destination_findings(facts: Facts, options: CloneOptions, name: str, decision: Decision) -> Iterator[Finding]:
    """Yield the findings about the destination, for a clone."""
    destination, xml = facts.destination, facts.source.xml
    host = destination.host.name
    if not _is_name(name):
        remedy = f"choose another --new-name, of {_LONGEST_NAME} bytes at most"
        yield block("name", name, f"{name!r} cannot be a VM's name.", remedy)
    owner = next((one for one, uuid in destination.domains.items() if uuid == xml.uuid and one != name), None)
    if options.preserve_uuid and owner is not None:
        yield block("uuid-in-use", name, f"VM {owner} on {host} has the UUID {xml.uuid}.", "leave out --preserve-uuid")
    yield from _replace_findings(facts, options, name, decision)
    yield from host_findings(facts, name)


def host_findings(facts: Facts, name: str) -> Iterator[Finding]:
    """Yield the findings about the destination host, whether or not it has the VM."""
    destination, xml = facts.destination, facts.source.xml
    host = destination.host.name
    yield from _ability_findings(destination, xml)
    yield from _clock_findings(facts)
    if destination.host.locks:
        text = f"Operations on {host} cannot be locked: {destination.host.locks}."
        yield block("locks", host, text, "remove what is there, or connect as a user who may make files there")
    if destination.staged_error:
        yield block(
            "journal-damaged",
            name,
            f"The journal of an earlier attempt on {host} cannot be read: {destination.staged_error}.",
            "look at it, and remove it and its .part files by hand",
        )
    yield from _tool_findings(host, destination.host.qemu_img, destination.host.qemu_nbd)
    for file in xml.os_files:
        if not destination.present.get(file.path, False):
            yield block(
                "boot-file-missing",
                file.path,
                f"{host} lacks {file.path}, the {file.role} that VM {name} boots with.",
                f"copy it to {host} at the same path",
            )
    yield from reference_findings(facts, name)


def _ability_findings(destination: DestinationFacts, xml: domain_xml.DomainXml) -> Iterator[Finding]:
    """Yield the findings about the destination's hardware, emulator and networks."""
    host, can = destination.host.name, destination.abilities
    if can.refusal:
        what = f"emulator {xml.emulator}, machine type {xml.machine}, architecture {xml.arch}"
        yield block(
            "machine", host, f"{host} cannot run this VM ({what}): {can.refusal}.", f"install what {host} lacks"
        )
    if xml.variables is not None and xml.variables.chosen and not can.uefi:
        text = f"The VM boots by UEFI, and libvirt on {host} has no firmware to choose from."
        yield block("firmware", host, text, f"install OVMF (ovmf, edk2-ovmf) on {host}")
    if xml.memory > can.memory:
        text = f"The VM has {format_bytes(xml.memory)} of memory, {host} has {format_bytes(can.memory)}."
        yield block("memory", host, text, "give the VM less memory, or choose another host")
    if xml.vcpus > can.cpus:
        text = f"The VM has {xml.vcpus} vCPUs, {host} has {can.cpus} CPUs."
        yield Finding("vcpus", Severity.WARNING, host, text, "it will run, but slower")
    if xml.cpu is not None and not can.refusal:
        yield from cpu_findings(host, xml.cpu, can.cpu)
    yield from _network_findings(destination, xml)


def _network_findings(destination: DestinationFacts, xml: domain_xml.DomainXml) -> Iterator[Finding]:
    host, can = destination.host.name, destination.abilities
    for network in xml.networks:
        if network not in can.networks:
            remedy = f"define it on {host}: virsh net-define"
            yield block("network-missing", network, f"{host} has no libvirt network named {network}.", remedy)
        elif not can.networks[network]:
            text = f"The libvirt network {network} on {host} is not active; the VM will not start."
            yield Finding("network-inactive", Severity.WARNING, network, text, f"virsh net-start {network}")
    for bridge in xml.bridges:
        if not destination.present.get(f"/sys/class/net/{bridge}", False):
            yield block("bridge-missing", bridge, f"{host} has no bridge named {bridge}.", f"make it on {host}")


def _clock_findings(facts: Facts) -> Iterator[Finding]:
    for host in (facts.source.host, facts.destination.host):
        if abs(host.clock) > _CLOCK_SECONDS:
            text = f"The clock of {host.name} differs from this machine's by {host.clock:+.0f} s."
            yield Finding("clock", Severity.INFO, host.name, text, "set it by NTP")
    source, destination = facts.source.host, facts.destination.host
    if source.qemu_img and destination.qemu_img and version(destination.qemu_img) < version(source.qemu_img):
        text = (
            f"QEMU on {destination.name} ({destination.qemu_img}) is older than on {source.name} ({source.qemu_img})."
        )
        yield Finding("qemu-older", Severity.INFO, destination.name, text)


def estimate(facts: Facts, options: Options, route: Route, disks: tuple[PlannedDisk, ...]) -> Iterator[Finding]:
    """Yield how long the copy should take, by the measured rate of the route and the user's limit."""
    rates = [rate for rate in (facts.route.rate, options.bandwidth_limit) if rate]
    if rates and disks and not any(disk.base for disk in disks):
        left = sum(max(0, disk.image.data - (disk.staged.durable if disk.staged else 0)) for disk in disks)
        seconds = left / min(rates)
        measured = f"measured {format_rate(facts.route.rate)}, " if facts.route.rate else ""
        text = (
            f"{route} route: {measured}the copy of {format_bytes(left)} should take about {format_duration(seconds)}."
        )
        yield Finding("estimate", Severity.INFO, facts.destination.host.name, text)


def version(text: str) -> tuple[int, ...]:
    """Return a version as numbers that compare."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def has_subclusters(qemu_img: str | None) -> bool:
    """Whether that version of QEMU makes overlays that hold less than a cluster: see _SUBCLUSTERS_QEMU."""
    return version(qemu_img or "") >= _SUBCLUSTERS_QEMU


def _replace_findings(facts: Facts, options: CloneOptions, name: str, decision: Decision) -> Iterator[Finding]:
    existing = facts.destination.existing
    host = facts.destination.host.name
    if existing is None or not (decision.replace or decision.remove_first):
        return
    if not existing.domain.persistent:
        text = f"VM {name} on {host} is transient: it cannot be replaced by a definition."
        yield block("existing-transient", name, text, "destroy it, or choose another --new-name")
    if decision.replace and options.preserve_uuid and existing.domain.uuid != facts.source.xml.uuid:
        text = f"VM {name} on {host} has another UUID, and a VM can be replaced only under its own."
        yield block("existing-uuid", name, text, "leave out --preserve-uuid, or use --cleanup-existing")
    first = "before the copy begins" if decision.remove_first else "once the clone is complete"
    files = f", with {', '.join(existing.removable)}" if existing.removable else ""
    kind = "an earlier clone" if existing.mark else "a VM that kvm-clone did not make"
    stopping = " and stopped" if decision.stop else ""
    used = existing.mark is not None and not existing.disks_untouched
    since = ", which was used or changed since it was made," if used else ","
    text = f"VM {name} on {host}, {kind}{since} is removed{stopping} {first}{files}."
    yield Finding("replace", Severity.WARNING, name, text)
    yield from kept_findings(facts)


def _is_name(name: str) -> bool:
    """Whether libvirt, XML and a file can have the name unchanged.

    libvirt writes the definition to NAME.xml.new, and reads a carriage return in it back as a line break.
    """
    fits = len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME
    return bool(name.strip()) and name not in (".", "..") and fits and not re.search("[/\r\n]", name) and is_xml(name)
