"""Where volumes are that definitions name, asked of a host's libvirt. The calls block."""

from __future__ import annotations

import posixpath

import libvirt

from kvm_clone.definition.domain_xml import DomainXml, read_domain
from kvm_clone.definition.spans import Document
from kvm_clone.definition.volumes import Located, Locations, Volume, volumes_of
from kvm_clone.planning.domain_facts import FILE_POOLS

_TYPES = {
    libvirt.VIR_STORAGE_VOL_FILE: "file",
    libvirt.VIR_STORAGE_VOL_BLOCK: "block",
    libvirt.VIR_STORAGE_VOL_DIR: "dir",
    libvirt.VIR_STORAGE_VOL_NETWORK: "network",
    libvirt.VIR_STORAGE_VOL_NETDIR: "dir",
    libvirt.VIR_STORAGE_VOL_PLOOP: "dir",
}
"""The type of disk that each kind of volume makes."""

_GONE = (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_OPERATION_INVALID)
"""What libvirt says of a pool or volume that is not there, and of a pool that is not active."""


def read(connection: libvirt.virConnect, xml: str) -> DomainXml:
    """Read a definition of this host, with the paths of the volumes that it names.

    Raises libvirt.libvirtError; RefusedError as read_domain does.
    """
    return read_domain(xml, locations(connection, xml))


def locations(connection: libvirt.virConnect, xml: str) -> Locations:
    """Return where the volumes are that a definition names; those that are not there are left out.

    Raises libvirt.libvirtError.
    """
    found = {}
    for volume in volumes_of(xml):
        try:
            found[volume] = locate(connection, volume)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in _GONE:
                raise
    return found


def locate(connection: libvirt.virConnect, volume: Volume) -> Located:
    """Return where a volume is. Raises libvirt.libvirtError.

    A file's is known by its pool's directory too, active and refreshed or not.
    """
    pool = connection.storagePoolLookupByName(volume.pool)
    root = Document(pool.XMLDesc()).root
    if root.attributes.get("type") in FILE_POOLS and "/" not in volume.name:
        return Located(posixpath.join(root.find_text("target", "path") or "", volume.name), "file")
    found = pool.storageVolLookupByName(volume.name)
    return Located(found.path(), _TYPES.get(found.info()[0], "volume"))
