"""The table of what refers to the host in libvirt's domain format (formatdomain of libvirt 9 to 11)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from kvm_clone.definition.references import compose
from kvm_clone.definition.references.compose import Trail
from kvm_clone.definition.references.model import Role


@dataclass(frozen=True)
class Rule:
    """One row: an attribute (`a/b@c`), an element's text (`a/b`), or with `of` an element as a whole.

    `place` may have alternatives in braces. `when` is conditions such as "type=file|pty, mode=bind" on the nearest of
    the element and its ancestors that has the attribute. `kind`: what the reference is called, the device by default.
    """

    place: str
    role: Role
    when: str = ""
    kind: str = ""
    made: bool = False
    of: Callable[[Trail], str] | None = None

    def applies(self, trail: Trail) -> bool:
        """Whether the conditions hold."""
        for condition in filter(None, self.when.split(", ")):
            name, _, values = condition.partition("=")
            said = next((node.attributes[name] for node in reversed(trail) if name in node.attributes), "")
            if said not in values.split("|"):
                return False
        return True


_CHARACTER = "devices/{serial,parallel,console,channel,redirdev,smartcard,rng/backend,tpm/backend}"
_SOURCES = "{devices/disk,os/nvram}"
"""What has a storage source; the images of a chain count as the disk's own, see walk.py."""

_TABLE = (
    # Booting.
    Rule("os/{loader,kernel,initrd,dtb,shim}", Role.FIRMWARE, kind="boot file"),
    Rule("os/acpi/table", Role.FIRMWARE, kind="ACPI table"),
    Rule("os/nvram", Role.DATA, kind="nvram"),
    Rule("os/varstore@path", Role.DATA, kind="nvram"),
    Rule("os/{nvram,varstore}@template", Role.FIRMWARE, kind="nvram template"),
    Rule("os/smbios@mode", Role.TIED, "mode=host", kind="SMBIOS of the host"),
    Rule("sysinfo/entry@file", Role.FILE, kind="fw_cfg"),
    Rule("bootloader", Role.PROGRAM),
    # Storage sources: disks, the images they rest on, UEFI variables.
    Rule(f"{_SOURCES}/source@file", Role.DATA),
    Rule(f"{_SOURCES}/source@dev", Role.DEVICE),
    Rule(f"{_SOURCES}/source@dir", Role.DIRECTORY),
    Rule(f"{_SOURCES}/source@path", Role.SOCKET),
    Rule(f"{_SOURCES}/source", Role.VOLUME, of=compose.volume),
    Rule(f"{_SOURCES}/source@name", Role.SERVER),
    Rule(f"{_SOURCES}/source/host@name", Role.SERVER),
    Rule(f"{_SOURCES}/source/host@socket", Role.SOCKET),
    Rule(f"{_SOURCES}/source/config@file", Role.FILE),
    Rule(f"{_SOURCES}/source/identity@keyfile", Role.FILE),
    Rule(f"{_SOURCES}/source/identity@agentsock", Role.SOCKET),
    Rule(f"{_SOURCES}/source/knownHosts@path", Role.FILE),
    Rule(f"{_SOURCES}/source/reservations/source@path", Role.SOCKET),
    Rule(f"{_SOURCES}/source/address", Role.HOST_DEVICE, "type=nvme|pci", of=compose.pci),
    Rule(f"{_SOURCES}/{{,source/}}{{auth,encryption}}/secret", Role.SECRET, of=compose.secret),
    Rule("devices/disk/mirror@file", Role.DATA, kind="mirror"),
    # The TPM, before the character device that it may be.
    Rule("devices/tpm/backend/device@path", Role.DEVICE),
    Rule("devices/tpm/backend/source@path", Role.DATA, "type=file"),
    Rule("devices/tpm/backend/source@path", Role.DIRECTORY, "type=dir"),
    Rule("devices/tpm/backend/encryption", Role.SECRET, of=compose.tpm_secret),
    # Character devices.
    Rule(f"{_CHARACTER}/source@path", Role.OUTPUT, "type=file", made=True),
    Rule(f"{_CHARACTER}/source@path", Role.DEVICE, "type=dev"),
    Rule(f"{_CHARACTER}/source@path", Role.PIPE, "type=pipe"),
    Rule(f"{_CHARACTER}/source@path", Role.SOCKET, "type=unix, mode=bind", made=True),
    Rule(f"{_CHARACTER}/source@path", Role.SOCKET, "type=unix"),
    Rule(f"{_CHARACTER}/source@path", Role.INERT, "type=pty|vc|stdio|null|spicevmc|spiceport"),
    Rule(f"{_CHARACTER}/source@{{master,slave}}", Role.DEVICE),
    Rule(f"{_CHARACTER}/source@host", Role.ADDRESS, "mode=bind"),
    Rule(f"{_CHARACTER}/source@host", Role.SERVER, "mode=connect"),
    Rule(f"{_CHARACTER}/source", Role.EXCLUSIVE, "mode=bind", kind="port", of=compose.service),
    Rule(f"{_CHARACTER}/log@file", Role.OUTPUT, kind="log", made=True),
    Rule(f"{_CHARACTER}@tty", Role.INERT),
    Rule("devices/smartcard/database", Role.DIRECTORY),
    Rule("devices/smartcard@mode", Role.TIED, "mode=host|host-certificates", kind="smartcard of the host"),
    Rule("devices/rng/backend", Role.DEVICE, "model=random"),
    # Display and sound.
    Rule("devices/graphics@socket", Role.SOCKET, made=True),
    Rule("devices/graphics/listen@socket", Role.SOCKET, made=True),
    Rule("devices/graphics/listen@address", Role.ADDRESS),
    Rule("devices/graphics/listen@network", Role.NETWORK),
    Rule("devices/graphics@listen", Role.ADDRESS),
    Rule("devices/graphics@{port,tlsPort,websocket}", Role.EXCLUSIVE, "autoport=no", kind="port"),
    Rule("devices/graphics@{port,websocket}", Role.EXCLUSIVE, "autoport=", kind="port"),
    Rule("devices/graphics", Role.SOCKET, "type=dbus", of=compose.dbus_address),
    Rule("devices/graphics@xauth", Role.FILE),
    Rule("devices/graphics@{display,passwd,username,keymap}", Role.INERT),
    Rule("devices/graphics/gl@rendernode", Role.DEVICE),
    Rule("devices/video/model/acceleration@rendernode", Role.DEVICE),
    Rule("devices/audio@path", Role.OUTPUT, made=True),
    Rule("devices/audio@{serverName,runtimeDir}", Role.DIRECTORY),
    Rule("devices/audio/{input,output}@dev", Role.DEVICE),
    # Networks.
    Rule("devices/interface/source@network", Role.NETWORK),
    Rule("devices/interface/source", Role.PORTGROUP, of=compose.portgroup),
    Rule("devices/interface/source@bridge", Role.BRIDGE),
    Rule("devices/interface/source@dev", Role.DEVICE, "type=vdpa"),
    Rule("devices/interface/source@dev", Role.INTERFACE),
    Rule("devices/interface/source@path", Role.SOCKET, "mode=server", made=True),
    Rule("devices/interface/source@path", Role.SOCKET),
    Rule("devices/interface/source/address", Role.HOST_DEVICE, "type=pci", of=compose.pci),
    Rule("devices/interface/source@address", Role.ADDRESS, "type=server"),
    Rule("devices/interface/source@address", Role.SERVER),
    Rule("devices/interface/source", Role.EXCLUSIVE, "type=server", kind="port", of=compose.port),
    Rule("devices/interface/source/local@address", Role.ADDRESS),
    Rule("devices/interface/source/local", Role.EXCLUSIVE, kind="port", of=compose.port),
    Rule("devices/interface/target@dev", Role.INTERFACE, "type=ethernet, managed=no"),
    Rule("devices/interface/target@dev", Role.EXCLUSIVE, kind="network device"),
    Rule("devices/interface/virtualport/parameters@interfaceid", Role.EXCLUSIVE, kind="virtual port"),
    Rule("devices/interface/filterref@filter", Role.NWFILTER),
    Rule("devices/interface/{script,downscript}@path", Role.PROGRAM),
    Rule("devices/interface/backend@{tap,vhost}", Role.DEVICE),
    Rule("devices/interface/backend@logFile", Role.OUTPUT, kind="log", made=True),
    Rule("devices/interface/portForward@dev", Role.INTERFACE),
    Rule("devices/interface/portForward@address", Role.ADDRESS),
    Rule("devices/interface/{guest@dev,guest@actual,source@name,source@portgroup}", Role.INERT),
    Rule("devices/{interface,hostdev}/rom@file", Role.FILE, kind="ROM"),
    # Devices of the host, and what is shared with it.
    Rule("devices/hostdev/source/address", Role.HOST_DEVICE, "type=pci", of=compose.pci),
    Rule("devices/hostdev/source", Role.HOST_DEVICE, "type=usb", of=compose.usb),
    Rule("devices/hostdev/source/adapter", Role.HOST_DEVICE, "type=scsi", of=compose.scsi),
    Rule("devices/hostdev/source/address", Role.HOST_DEVICE, "type=mdev", of=compose.mdev),
    Rule("devices/hostdev/source@wwpn", Role.TIED, kind="vHBA"),
    Rule("devices/hostdev/source@name", Role.SERVER),
    Rule("devices/hostdev/source/host@name", Role.SERVER),
    Rule("devices/hostdev/source/auth/secret", Role.SECRET, of=compose.secret),
    Rule("devices/hostdev/source/{block,char}", Role.DEVICE),
    Rule("devices/hostdev/source/interface", Role.INTERFACE),
    Rule("devices/redirdev/source@host", Role.SERVER),
    Rule("devices/filesystem/source@dir", Role.DIRECTORY),
    Rule("devices/filesystem/source@file", Role.DATA),
    Rule("devices/filesystem/source@dev", Role.DEVICE),
    Rule("devices/filesystem/source@socket", Role.SOCKET),
    Rule("devices/filesystem/source", Role.VOLUME, of=compose.volume),
    Rule("devices/filesystem/binary@path", Role.PROGRAM),
    Rule("devices/filesystem/target@dir", Role.INERT),
    Rule("devices/shmem/server@path", Role.SOCKET),
    Rule("devices/input/source@{dev,evdev}", Role.DEVICE),
    Rule("devices/memory/source/path", Role.DATA),
    Rule("devices/memory/source/pagesize", Role.HUGEPAGES, of=compose.page_size),
    Rule("devices/memory/source/nodemask", Role.NUMA),
    Rule("devices/pstore/path", Role.DATA, made=True),
    Rule("devices/lease/target@path", Role.FILE),
    Rule("devices/vsock/cid@address", Role.EXCLUSIVE, "auto=no", kind="vsock CID"),
    Rule("devices/emulator", Role.PROGRAM),
    # CPUs, memory and cgroups of the host.
    Rule("memoryBacking/hugepages", Role.HUGEPAGES, of=compose.default_page),
    Rule("memoryBacking/hugepages/page", Role.HUGEPAGES, of=compose.page_size),
    Rule("numatune/{memory,memnode}@nodeset", Role.NUMA),
    Rule("numatune/memory", Role.PROGRAM, "placement=auto", of=compose.numad),
    Rule("vcpu@cpuset", Role.CPUSET),
    Rule("vcpu", Role.PROGRAM, "placement=auto", of=compose.numad),
    Rule("cputune/{vcpupin,emulatorpin,iothreadpin}@cpuset", Role.CPUSET),
    Rule("cputune/{cachetune,memorytune}", Role.FILE, of=compose.cache_allocation),
    Rule("blkiotune/device/path", Role.DEVICE),
    Rule("resource/partition", Role.CGROUP),
    Rule("{,devices/*/,devices/*/source/,devices/*/*/source/}seclabel@model", Role.SECLABEL),
    Rule("{,devices/*/,devices/*/source/,devices/*/*/source/}seclabel/{label,imagelabel,baselabel}", Role.INERT),
    Rule("launchSecurity", Role.TIED, kind="key of the host", of=compose.guest_owner),
    # What looks like a path but is none of the host's.
    Rule("{name,title,description,bootloader_args,os/cmdline,os/init,os/initarg,os/initdir,os/root}", Role.INERT),
    Rule("launchSecurity@{authorKey,vcek}", Role.INERT),
    Rule("launchSecurity/{session,dhCert,idBlock,idAuth,hostData}", Role.INERT),
    Rule("{sysinfo/*/entry,sysinfo/entry,devices/disk/serial,devices/disk/vendor,devices/disk/product}", Role.INERT),
    Rule(f"{_SOURCES}/source/cookies/cookie", Role.INERT),
    Rule(f"{_SOURCES}/source@query", Role.INERT),
)


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the places that a pattern with alternatives in braces stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for choice in found[1].split(","):
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _by_place() -> Mapping[str, tuple[Rule, ...]]:
    rules: dict[str, tuple[Rule, ...]] = {}
    for rule in _TABLE:
        for place in _expanded(rule.place):
            rules[place] = (*rules.get(place, ()), replace(rule, place=place))
    return rules


_RULES = _by_place()

_STARRED = tuple(
    (re.compile(re.escape(place).replace(r"\*", "[^/@]+")), rules) for place, rules in _RULES.items() if "*" in place
)
"""Places in which a star stands for any one element."""


@functools.lru_cache(maxsize=4096)
def rules_at(place: str) -> tuple[Rule, ...]:
    """Return the table's rows for a place, in its order."""
    starred = (rules for pattern, rules in _STARRED if pattern.fullmatch(place))
    return _RULES.get(place) or next(starred, ())
