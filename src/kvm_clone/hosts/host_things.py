"""libvirt calls that look up what a definition names: filters, secrets, volumes, and what other VMs claim.

They block, like those of domains.py. Whatever vanishes while it is looked at is passed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import libvirt

from kvm_clone.definition.references import Reference, Role, references
from kvm_clone.definition.spans import Document
from kvm_clone.errors import RefusedError
from kvm_clone.hosts.libvirt_errors import message_of
from kvm_clone.planning import things
from kvm_clone.planning.things import Objects

_VANISHED = frozenset(
    {
        libvirt.VIR_ERR_NO_DOMAIN,
        libvirt.VIR_ERR_NO_NETWORK,
        libvirt.VIR_ERR_NO_NWFILTER,
        libvirt.VIR_ERR_NO_SECRET,
        libvirt.VIR_ERR_NO_STORAGE_POOL,
        libvirt.VIR_ERR_NO_STORAGE_VOL,
    }
)

_USAGES = {
    libvirt.VIR_SECRET_USAGE_TYPE_VOLUME: "volume",
    libvirt.VIR_SECRET_USAGE_TYPE_CEPH: "ceph",
    libvirt.VIR_SECRET_USAGE_TYPE_ISCSI: "iscsi",
    libvirt.VIR_SECRET_USAGE_TYPE_TLS: "tls",
    libvirt.VIR_SECRET_USAGE_TYPE_VTPM: "vtpm",
}


def objects(connection: libvirt.virConnect, wanted: Collection[Reference]) -> Objects:
    """Return what the host's libvirt has of what the references name; nothing else is asked for.

    Raises libvirt.libvirtError.
    """
    roles = {reference.role for reference in wanted}
    volumes = {reference.value for reference in wanted if reference.role is Role.VOLUME}
    groups = {reference.value for reference in wanted if reference.role is Role.PORTGROUP}
    claims = any(things.is_claim(reference) for reference in wanted)
    return Objects(
        _asked(_filters, connection) if Role.NWFILTER in roles else None,
        _asked(_secrets, connection) if Role.SECRET in roles else None,
        {name: _volume(connection, name) for name in sorted(volumes)},
        _asked(_portgroups, connection) if groups else None,
        _secmodels(connection) if Role.SECLABEL in roles else None,
        _used(connection) if claims else {},
    )


def _asked(ask: Callable[[Any], Iterator[str]], connection: libvirt.virConnect) -> frozenset[str] | None:
    """Return the answers, None where the host has no driver for such things."""
    try:
        return frozenset(ask(connection))
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_NO_CONNECT):
            return None
        raise


@contextlib.contextmanager
def _passing_over() -> Iterator[None]:
    """Go on where an object has vanished since it was listed."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() not in _VANISHED:
            raise


def _filters(connection: libvirt.virConnect) -> Iterator[str]:
    for one in connection.listAllNWFilters():
        yield one.name()


def _secrets(connection: libvirt.virConnect) -> Iterator[str]:
    for one in connection.listAllSecrets():
        yield one.UUIDString()
        yield f"{_USAGES.get(one.usageType(), '')}/{one.usageID()}"


def _portgroups(connection: libvirt.virConnect) -> Iterator[str]:
    for network in connection.listAllNetworks():
        with _passing_over():
            groups = Document(network.XMLDesc()).root.find_all("portgroup")
            yield from (f"{network.name()}/{group.attributes.get('name', '')}" for group in groups)


def _secmodels(connection: libvirt.virConnect) -> frozenset[str]:
    host = Document(connection.getCapabilities()).root.find("host")
    assert host is not None
    return frozenset(model for one in host.find_all("secmodel") if (model := one.find_text("model")))


def _volume(connection: libvirt.virConnect, name: str) -> str:
    """Return why a volume cannot be used, nothing for one that can."""
    pool_name, _, volume = name.partition("/")
    try:
        pool = connection.storagePoolLookupByName(pool_name)
        if not pool.isActive():
            return f"the storage pool {pool_name} is not active"
        pool.storageVolLookupByName(volume)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL):
            return message_of(error)
        raise
    return ""


def _used(connection: libvirt.virConnect) -> dict[str, frozenset[str]]:
    """Return the VMs that have each path or number which two cannot share: as defined, and as they run."""
    found: dict[str, set[str]] = {}
    for domain in connection.listAllDomains():
        with _passing_over(), contextlib.suppress(RefusedError):  # another hypervisor's definition
            for flags in {0, libvirt.VIR_DOMAIN_XML_INACTIVE * domain.isActive()}:
                for reference in filter(things.is_claim, references(domain.XMLDesc(flags))):
                    found.setdefault(things.claim(reference), set()).add(domain.name())
    return {claim: frozenset(names) for claim, names in found.items()}
