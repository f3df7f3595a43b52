"""References that several attributes make up together. Each function returns nothing where the element has none."""

from __future__ import annotations

from kvm_clone.definition.spans import Node
from kvm_clone.units import scaled

Trail = tuple[Node, ...]
"""An element with all that it lies in, the domain first."""


def _joined(trail: Trail, *names: str) -> str:
    said = trail[-1].attributes
    return "/".join(said[name] for name in names) if all(said.get(name) for name in names) else ""


def volume(trail: Trail) -> str:
    """Return POOL/VOLUME."""
    return _joined(trail, "pool", "volume")


def portgroup(trail: Trail) -> str:
    """Return NETWORK/PORTGROUP."""
    return _joined(trail, "network", "portgroup")


def secret(trail: Trail) -> str:
    """Return the secret's UUID, or USAGE-TYPE/USAGE."""
    return trail[-1].attributes.get("uuid") or _joined(trail, "type", "usage")


def tpm_secret(trail: Trail) -> str:
    """Return the secret's UUID."""
    return trail[-1].attributes.get("secret", "")


def _number(text: str | None) -> int | None:
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def pci(trail: Trail) -> str:
    """Return pci:DOMAIN:BUS:SLOT.FUNCTION in the kernel's spelling."""
    said = trail[-1].attributes
    found = [_number(said.get(name, "0")) for name in ("domain", "bus", "slot", "function")]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or "bus" not in said:
        return ""
    return "pci:{:04x}:{:02x}:{:02x}.{:x}".format(*parts)


def usb(trail: Trail) -> str:
    """Return usb:VENDOR:PRODUCT, or usb:BUS/DEVICE where only the address is said."""
    source = trail[-1]
    found = [_number(source.find_attributes(name).get("id")) for name in ("vendor", "product")]
    ids = [one for one in found if one is not None]
    if len(ids) == len(found):
        return "usb:{:04x}:{:04x}".format(*ids)
    address = source.find_attributes("address")
    return f"usb:{address['bus']}/{address['device']}" if {"bus", "device"} <= set(address) else ""


def scsi(trail: Trail) -> str:
    """Return scsi:HOST:BUS:TARGET:UNIT."""
    host = trail[-1].attributes.get("name", "").removeprefix("scsi_host")
    address = trail[-2].find_attributes("address")
    parts = [host, *(address.get(name, "0") for name in ("bus", "target", "unit"))]
    return f"scsi:{':'.join(parts)}" if host else ""


def mdev(trail: Trail) -> str:
    """Return mdev:UUID."""
    uuid = trail[-1].attributes.get("uuid", "")
    return f"mdev:{uuid}" if uuid else ""


def service(trail: Trail) -> str:
    """Return a character device's port."""
    return trail[-1].attributes.get("service", "")


def port(trail: Trail) -> str:
    """Return a network interface's port."""
    return trail[-1].attributes.get("port", "")


def dbus_address(trail: Trail) -> str:
    """Return the socket of a D-Bus address, such as unix:path=/run/bus."""
    found = [part for part in trail[-1].attributes.get("address", "").split(",") if "path=/" in part]
    return found[0].partition("path=")[2] if found else ""


def page_size(trail: Trail) -> str:
    """Return the size in KiB of one kind of huge pages."""
    node = trail[-1]
    said = _number(node.attributes.get("size") or node.text.strip())
    size = scaled(said, node.attributes.get("unit", "KiB")) if said is not None else None
    return str(size // 1024) if size else ""


def default_page(trail: Trail) -> str:
    """Return 0, for the host's default page size, where the definition names no other."""
    return "0" if trail[-1].find("page") is None else ""


def numad(_trail: Trail) -> str:
    """Return the program that places VMs automatically."""
    return "/usr/bin/numad"


def cache_allocation(_trail: Trail) -> str:
    """Return the file that a host has which can allocate its caches."""
    return "/sys/fs/resctrl/schemata"


def guest_owner(trail: Trail) -> str:
    """Return the kind of launch security, if its session is bound to a host's key."""
    bound = trail[-1].find("session") or trail[-1].find("dhCert")
    return trail[-1].attributes.get("type", "launchSecurity") if bound else ""
