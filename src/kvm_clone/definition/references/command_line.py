"""What a definition passes to QEMU directly: the elements of the qemu namespace.

QEMU has many options and gets more: a table has the common ones, and any other path is unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvm_clone.definition.references.model import Reference, Role
from kvm_clone.definition.spans import Node

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"

_PATH = re.compile(r"(?:[a-z0-9_+-]+:)*(/(?!/).*)", re.DOTALL)
"""A path, perhaps after what QEMU takes for a protocol: file:/a, unix:/a."""

_SOCKET_OF_URI = re.compile(r"[?&]socket=(/[^&]*)")
_YES = ("on", "yes", "true", "True")
_READONLY = ("readonly", "read-only", "snapshot")


@dataclass(frozen=True)
class _Known:
    """Paths of some options, by their key ("" for a value without one); a star stands for any."""

    options: str
    keys: str
    role: Role
    readonly: bool = False
    made: bool = False
    first: str = ""
    """What the option's value has to begin with, such as a chardev's backend."""


_TABLE = (
    _Known("drive", "file.server.path file.path server.path", Role.SOCKET),
    _Known("drive", "*", Role.DATA),
    _Known("blockdev", "server.path socket path", Role.SOCKET, first="nbd"),
    _Known("blockdev", "*", Role.DATA),
    _Known("hda hdb hdc hdd fda fdb sd mtdblock pflash", "", Role.DATA),
    _Known("cdrom", "", Role.DATA, readonly=True),
    _Known("kernel initrd dtb bios", "", Role.FIRMWARE),
    _Known("acpitable smbios fw_cfg option-rom readconfig set trace", "*", Role.FILE),
    _Known("object", "mem-path", Role.DATA),
    _Known("object", "dir", Role.DIRECTORY),
    _Known("object", "*", Role.FILE),
    _Known("device", "romfile", Role.FILE),
    _Known("device", "sysfsdev evdev path", Role.DEVICE),
    _Known("chardev", "path", Role.SOCKET, first="socket"),
    _Known("chardev", "path", Role.OUTPUT, made=True, first="file"),
    _Known("chardev", "path", Role.PIPE, first="pipe"),
    _Known("chardev", "path", Role.DEVICE, first="serial"),
    _Known("chardev", "logfile", Role.OUTPUT, made=True),
    _Known("serial parallel monitor qmp qmp-pretty debugcon gdb", "", Role.SOCKET, made=True, first="unix:"),
    _Known("serial parallel monitor debugcon gdb", "", Role.OUTPUT, made=True, first="file:"),
    _Known("serial parallel monitor debugcon gdb", "", Role.PIPE, first="pipe:"),
    _Known("serial parallel monitor debugcon gdb", "", Role.DEVICE),
    _Known("D pidfile", "", Role.OUTPUT, made=True),
    _Known("fsdev virtfs", "path", Role.DIRECTORY),
    _Known("fsdev virtfs", "socket", Role.SOCKET),
    _Known("L chroot", "", Role.DIRECTORY),
    _Known("netdev nic net", "script downscript", Role.PROGRAM),
    _Known("netdev nic net", "smb tftp", Role.DIRECTORY),
    _Known("netdev nic net", "vhostdev", Role.DEVICE),
    _Known("vnc spice display", "", Role.SOCKET, made=True, first="unix:"),
    _Known("display spice", "rendernode", Role.DEVICE),
    _Known("append name", "*", Role.INERT),
)


def printed(tag: str) -> str:
    """Return an element's name as people write it: qemu:arg, or {URI}name for a namespace that is not known."""
    uri, _, name = tag.rpartition(" ")
    if not uri:
        return name
    return f"qemu:{name}" if uri == NAMESPACE else f"{{{uri}}}{name}"


def is_known(tag: str) -> bool:
    """Whether the element is one of those by which libvirt passes something to QEMU."""
    return tag.startswith(f"{NAMESPACE} ")


def references(node: Node, where: str) -> Iterator[Reference]:
    """Yield what a top element of the qemu namespace refers to, after one reference for the element itself."""
    name = node.tag.partition(" ")[2]
    if name == "deprecation":
        return
    yield Reference(printed(node.tag), where, _summary(node), Role.COMMAND_LINE)
    if name == "commandline":
        yield from _of_arguments(node, where)
        yield from _of_environment(node, where)


def _summary(node: Node) -> str:
    """Name what is passed, without the values: those may hold secrets."""
    names = []
    for child in node.walk():
        said = child.attributes
        text = said.get("value", "") if child.tag.endswith(" arg") else said.get("name", said.get("capability", ""))
        if text and (not child.tag.endswith(" arg") or text.startswith("-")):
            names.append(text.partition("=")[0])
    return " ".join(names)


def _of_arguments(node: Node, where: str) -> Iterator[Reference]:
    option = ""
    numbered = list(node.find_all(f"{NAMESPACE} arg"))
    for number, argument in enumerate(numbered):
        text = argument.attributes.get("value", "")
        place = f"{where}/qemu:arg" + (f"[{number}]" if len(numbered) > 1 else "") + "@value"
        if text.startswith("-"):
            option = text.lstrip("-")
            continue
        yield from _of_option(option, text, place)


def _of_environment(node: Node, where: str) -> Iterator[Reference]:
    numbered = list(node.find_all(f"{NAMESPACE} env"))
    for number, variable in enumerate(numbered):
        value = variable.attributes.get("value", "")
        if value.startswith("/"):
            place = f"{where}/qemu:env" + (f"[{number}]" if len(numbered) > 1 else "") + "@value"
            yield Reference("qemu:env", place, value, Role.FILE)


def _of_option(option: str, text: str, where: str) -> Iterator[Reference]:
    parts = list(_parts(text))
    first = parts[0][1] if parts and parts[0][0] in ("", "driver", "qom-type", "backend") else ""
    readonly = any(value in (_YES if key in _READONLY else _READONLY if not key else ()) for key, value in parts)
    readonly = readonly or ("media", "cdrom") in parts
    listening = any(key == "server" and value not in ("off", "no", "false") for key, value in parts)
    listening = listening or any(value == "server" for key, value in parts if not key)
    for key, value in parts:
        if option == "device" and key == "host" and first.startswith("vfio-pci"):
            yield Reference("qemu:commandline", where, _pci(value), Role.HOST_DEVICE)
        known = _known(option, key, first or value)
        for path in _paths(value) or _relative(known, key, value):
            made = known.made or (known.role is Role.SOCKET and listening)
            quiet = known.readonly or readonly
            yield Reference("qemu:commandline", where, path, known.role, made, quiet and known.role is Role.DATA)


def _known(option: str, key: str, first: str) -> _Known:
    for row in _TABLE:
        if option in row.options.split() and _is_key(key, row.keys) and first.startswith(row.first):
            return row
    return _Known(option, key, Role.UNKNOWN)


def _is_key(key: str, keys: str) -> bool:
    return keys == "*" or key == keys or key in keys.split()


def _pci(address: str) -> str:
    return f"pci:{address}" if address.count(":") > 1 else f"pci:0000:{address}"


def _paths(value: str) -> list[str]:
    """Return the absolute path that a value is, or holds as a URI's socket."""
    whole = _PATH.fullmatch(value)
    return [whole[1]] if whole is not None else _SOCKET_OF_URI.findall(value)


_RELATIVE = {"drive": ("file", "filename"), "blockdev": ("filename",), "object": ("mem-path",)}
"""Keys whose value is a file's name, by option; of other options with content it is the value without a key."""


def _relative(known: _Known, key: str, value: str) -> list[str]:
    """Return the path of content that is named by a relative one: libvirt starts QEMU in the root directory."""
    keys = _RELATIVE.get(known.options, ("",))
    named = known.role is Role.DATA and key.rpartition(".")[2] in keys
    return [f"/{value}"] if named and re.fullmatch("[^:=]+", value) else []


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of an option's argument: JSON's leaves, or what stands between single commas."""
    document = text.removeprefix("json:")
    if document.lstrip().startswith("{"):
        try:
            yield from _leaves("", json.loads(document))
        except (ValueError, RecursionError):
            yield "", text
        return
    for part in text.replace(",,", "\0").split(","):  # a comma of a value is doubled
        value = part.replace("\0", ",")
        key, equals, rest = value.partition("=")
        if equals and re.fullmatch(r"[\w.-]+", key):
            if rest.startswith("json:{"):
                yield from _parts(rest)
            yield key, rest
        else:
            yield "", value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), below)
    elif isinstance(value, list):
        for below in value:
            yield from _leaves(key, below)
    else:
        yield key, str(value)
