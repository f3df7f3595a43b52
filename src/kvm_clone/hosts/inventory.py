"""What the VMs of a host name, asked of its libvirt. The calls block; none of them decides anything.

Domains, volumes and pools come and go while they are listed. One that vanished names nothing; but what was undefined
may have been defined anew under another UUID, so that everything is then listed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import libvirt

from kvm_clone.agent.host import uses
from kvm_clone.definition.claims import Claim, Owner, VolumeClaim, claims_of
from kvm_clone.definition.volumes import Volume
from kvm_clone.errors import RefusedError
from kvm_clone.hosts.libvirt_errors import message_of
from kvm_clone.hosts.volumes import locate

_LISTINGS = 10
"""How often everything is listed until nothing vanishes meanwhile."""

_VANISHED = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT)
_NO_STATE = (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_INVALID)


class _VanishedError(Exception):
    """A domain or a snapshot was removed while it was being asked."""


def claims(connection: libvirt.virConnect) -> list[Claim]:
    """What every domain names: live, persistent, saved, and in its snapshots.

    What cannot be established is a claim of its own (uses.DOUBT). Raises libvirt.libvirtError.
    """
    for _ in range(_LISTINGS):
        try:
            found = [one for domain in connection.listAllDomains() for one in _of_domain(domain)]
        except _VanishedError:
            continue
        resolved = [_resolved(connection, one) if isinstance(one, VolumeClaim) else one for one in found]
        return list(dict.fromkeys(resolved))
    return [Claim(Owner("libvirt"), uses.DOUBT, "its domains come and go all the time")]


def _of_domain(domain: libvirt.virDomain) -> Iterator[Claim | VolumeClaim]:
    by = Owner(domain.name(), domain.UUIDString())
    try:
        for xml in _definitions(domain):
            yield from _named(xml, by)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _VANISHED:
            raise _VanishedError from error
        raise


def _named(xml: str, by: Owner) -> Iterator[Claim | VolumeClaim]:
    try:
        yield from claims_of(xml, by)
    except RefusedError as error:
        yield Claim(by, uses.DOUBT, str(error))


def _definitions(domain: libvirt.virDomain) -> Iterator[str]:
    """Everything that libvirt keeps of a domain and that may name files."""
    yield domain.XMLDesc(0)
    yield domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    for snapshot in domain.listAllSnapshots():
        yield snapshot.getXMLDesc()
    if domain.hasManagedSaveImage():
        try:
            yield domain.managedSaveGetXMLDesc()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in _NO_STATE:  # it was resumed or dropped meanwhile
                raise


def _resolved(connection: libvirt.virConnect, claim: VolumeClaim) -> Claim:
    try:
        path = locate(connection, Volume(claim.pool, claim.volume)).path
        return Claim(claim.by, uses.IMAGE, path, claim.format)
    except libvirt.libvirtError as error:
        why = message_of(error)
        return Claim(claim.by, uses.DOUBT, f"volume {claim.volume} of pool {claim.pool} cannot be found: {why}")
