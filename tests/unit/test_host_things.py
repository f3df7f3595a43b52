"""host_things.py with libvirt's own test driver: lookups, missing drivers, and objects that vanish meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from kvm_clone.definition.references import Reference, Role
from kvm_clone.hosts import host_things
from kvm_clone.planning.things import Objects

DOMAIN = """<domain type='test'><name>%s</name><memory>1024</memory><os><type>hvm</type></os><devices>
<serial type='file'><source path='/log/%s.log'/></serial><vsock><cid auto='no' address='7'/></vsock>
</devices></domain>"""
NETWORK = "<network><name>%s</name><forward mode='bridge'/><bridge name='b'/><portgroup name='fast'/></network>"


@pytest.fixture
def connection() -> Iterator[Any]:
    opened = libvirt.open("test:///default")
    before = {domain.name() for domain in opened.listAllDomains()}
    yield opened
    for domain in opened.listAllDomains():
        if domain.name() not in before:
            domain.undefine()
    opened.close()


def wanted(role: Role, value: str = "x", kind: str = "k", *, made: bool = False) -> Reference:
    return Reference(kind, "where", value, role, made)


def test_nothing_is_asked_for_nothing() -> None:
    assert host_things.objects(None, []) == Objects()


def test_a_driver_that_is_missing_says_nothing(connection: Any) -> None:
    """The test driver has neither filters nor secrets."""
    found = host_things.objects(connection, [wanted(Role.NWFILTER), wanted(Role.SECRET)])
    assert (found.filters, found.secrets) == (None, None)


def test_a_daemon_that_is_gone_is_an_error() -> None:
    with pytest.raises(libvirt.libvirtError):
        host_things.objects(Failing(), [wanted(Role.NWFILTER)])
    with pytest.raises(libvirt.libvirtError):
        host_things.objects(Failing(), [wanted(Role.VOLUME, "a/b")])


class Failing:
    """A connection on which every call fails as one does whose daemon is gone."""

    def _fail(self, *_: Any) -> Any:
        libvirt.open("nowhere:///")

    listAllNWFilters = storagePoolLookupByName = _fail  # noqa: N815


def test_volumes(connection: Any) -> None:
    pool = connection.storagePoolLookupByName("default-pool")
    volume = pool.createXML("<volume><name>here</name><capacity>1</capacity></volume>", 0)
    names = ["default-pool/here", "default-pool/gone", "no-pool/x"]
    found = host_things.objects(connection, [wanted(Role.VOLUME, name) for name in names]).volumes
    pool.destroy()
    inactive = host_things.objects(connection, [wanted(Role.VOLUME, "default-pool/here")]).volumes
    pool.create()
    assert volume.name() == "here"
    assert found["default-pool/here"] == ""
    assert "gone" in found["default-pool/gone"]
    assert "no-pool" in found["no-pool/x"]
    assert "not active" in inactive["default-pool/here"]


def test_port_groups(connection: Any) -> None:
    network = connection.networkDefineXML(NETWORK % "lan")
    assert host_things.objects(connection, [wanted(Role.PORTGROUP)]).portgroups == frozenset({"lan/fast"})
    network.undefine()


def test_security_drivers(connection: Any) -> None:
    assert host_things.objects(connection, [wanted(Role.SECLABEL)]).secmodels == frozenset({"testSecurity"})


@pytest.mark.parametrize(
    "claim", [wanted(Role.OUTPUT, "/a", made=True), wanted(Role.EXCLUSIVE, "7"), wanted(Role.PIPE, "/p")]
)
def test_what_other_vms_claim(connection: Any, claim: Reference) -> None:
    for name in ("one", "two"):
        connection.defineXML(DOMAIN % (name, name))
    used = host_things.objects(connection, [claim]).used
    assert {claim: names for claim, names in used.items() if names != {"test"}} == {
        "/log/one.log": frozenset({"one"}),
        "/log/two.log": frozenset({"two"}),
        "vsock CID 7": frozenset({"one", "two"}),
    }


def test_a_vm_that_runs_otherwise_than_it_is_defined_claims_both(connection: Any) -> None:
    domain = connection.defineXML(DOMAIN % ("one", "old"))
    domain.create()
    connection.defineXML((DOMAIN % ("one", "new")).replace("</name>", f"</name><uuid>{domain.UUIDString()}</uuid>"))
    used = host_things.objects(connection, [wanted(Role.PIPE, "/p")]).used
    domain.destroy()
    assert {"/log/old.log", "/log/new.log"} <= used.keys()


class Listing:
    """A connection's lists as they were before what is in them vanished."""

    def __init__(self, things: list[Any]) -> None:
        self._things = things

    def listAllDomains(self) -> list[Any]:  # noqa: N802
        return self._things

    listAllNetworks = listAllDomains  # noqa: N815


def test_what_vanishes_is_passed_over(connection: Any) -> None:
    gone, stays = connection.defineXML(DOMAIN % ("gone", "gone")), connection.defineXML(DOMAIN % ("stays", "stays"))
    network, other = connection.networkDefineXML(NETWORK % "gone"), connection.networkDefineXML(NETWORK % "stays")
    gone.undefine()
    network.undefine()
    used = host_things.objects(Listing([gone, stays]), [wanted(Role.EXCLUSIVE, "7")]).used
    groups = host_things.objects(Listing([network, other]), [wanted(Role.PORTGROUP)]).portgroups
    other.undefine()
    assert used["vsock CID 7"] == frozenset({"stays"})
    assert groups == frozenset({"stays/fast"})


def test_another_error_is_no_vanishing() -> None:
    with pytest.raises(libvirt.libvirtError):
        host_things.objects(Listing([Broken()]), [wanted(Role.EXCLUSIVE, "7")])


class Broken:
    """A domain whose definition cannot be had."""

    def isActive(self) -> int:  # noqa: N802
        return 1

    def XMLDesc(self, _: int) -> str:  # noqa: N802
        libvirt.open("nowhere:///")
        return ""
