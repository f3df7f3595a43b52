"""Disks that a definition names by pool and volume: where they are, where their copies land, how these are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import libvirt
import pytest
from cases import IMAGES, Case, domain_xml, images, options

from kvm_clone.definition.domain_xml import read_domain, unsupported
from kvm_clone.definition.marks import Provenance
from kvm_clone.definition.rewrite import Change, merge_down, rewrite
from kvm_clone.definition.volumes import Located, Volume, volumes_of
from kvm_clone.errors import RefusedError
from kvm_clone.hosts import inventory
from kvm_clone.hosts import volumes as located
from kvm_clone.image import Image
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.domain_facts import Pool

MARK = Provenance("0f", "u", "kc-a", "s", "web", "f", "1", "t", True)
DISK = (
    "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
    "<source pool='ssd' volume='web.qcow2' startupPolicy='mandatory'{mode}>"
    "<seclabel model='dac' relabel='no'/></source>"
    "{below}<target dev='vda' bus='virtio'/></disk>"
)
SSD = Volume("ssd", "web.qcow2")
FOUND = {SSD: Located("/ssd/web.qcow2", "file"), Volume("ssd", "base"): Located("/ssd/base", "file")}
BELOW = "<backingStore type='volume'><format type='raw'/><source pool='ssd' volume='base'/></backingStore>"


def xml_of(mode: str = "", below: str = "") -> str:
    return domain_xml(DISK.format(mode=mode, below=below)).replace("NAME", "web")


def test_a_volume_is_read_as_what_it_is_on_the_host() -> None:
    xml = xml_of(below=BELOW)
    assert set(volumes_of(xml)) == set(FOUND)
    (disk,) = read_domain(xml, FOUND).disks
    assert (disk.type, disk.path, disk.volume) == ("file", "/ssd/web.qcow2", SSD)
    assert disk.backing == (Image("/ssd/base", "raw"),)
    assert unsupported(read_domain(xml, FOUND)) == ()
    (device,) = read_domain(xml, {SSD: Located("/dev/vg/web", "block")}).disks
    assert (device.type, device.path) == ("block", "/dev/vg/web")


def test_a_volume_that_is_nowhere_is_refused() -> None:
    (disk,) = read_domain(xml_of()).disks
    assert (disk.type, disk.path, disk.volume) == ("volume", "ssd/web.qcow2", SSD)
    (found,) = unsupported(read_domain(xml_of()))
    assert (found.code, found.subject) == ("disk-volume", "vda")
    assert "ssd/web.qcow2" in found.text


@pytest.mark.parametrize("source", ["<source file='/a'/>", "<source pool='p'/>", "<source volume='v'/>", ""])
def test_what_is_no_volume(source: str) -> None:
    xml = domain_xml(f"<disk type='volume'>{source}<target dev='vda'/></disk>")
    assert list(volumes_of(xml)) == []
    assert read_domain(xml).disks[0].volume is None


def test_a_file_is_no_volume_whatever_its_source_says() -> None:
    xml = domain_xml("<disk><source file='/a' pool='p' volume='v'/><target dev='vda'/></disk>")
    assert list(volumes_of(xml)) == []
    assert read_domain(xml).disks[0].path == "/a"


WRITTEN = {
    "another volume": (
        {"vda": Volume("fast & new", "a'b.qcow2")},
        "",
        "type='volume'",
        "<source pool='fast &amp; new' volume='a&apos;b.qcow2' startupPolicy='mandatory'>",
    ),
    "a file": ({}, "", "type='file'", '<source file="/new/&quot;x&quot;" startupPolicy="mandatory">'),
    "a file, and no mode": ({}, " mode='host'", "type='file'", '<source file="/new/&quot;x&quot;" startupPolicy='),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_what_a_disk_is_written_as(what: str) -> None:
    volumes, mode, kind, source = WRITTEN[what]
    change = Change("web", MARK, disk_paths={"vda": '/new/"x"'}, disk_volumes=volumes)
    written = rewrite(xml_of(mode), change)
    assert f"<disk {kind} device='disk'>" in written
    assert source in written
    assert "<seclabel model='dac' relabel='no'/></source>" in written
    again = {volume: Located('/new/"x"', "file") for volume in volumes.values()}
    (disk,) = read_domain(written, again).disks
    assert (disk.type, disk.path, disk.volume) == ("file", '/new/"x"', volumes.get("vda"))
    assert rewrite(written, change) == written


def test_a_disk_by_its_path_stays_one() -> None:
    xml = domain_xml("<disk type='file'><source file='/a'/><target dev='vda'/></disk>")
    change = Change("web", MARK, disk_paths={"vda": "/b"}, disk_volumes={"vda": Volume("p", "b")})
    assert "<disk type='file'><source file='/b'/>" in rewrite(xml, change)


def test_onto_an_overlay_and_back() -> None:
    base, overlay = Image("/ssd/web.qcow2", "qcow2"), Volume("ssd", "kvm-clone-0f-vda.qcow2")
    change = Change(
        "web",
        MARK,
        disk_paths={"vda": f"/ssd/{overlay.name}"},
        disk_bases={"vda": base},
        disk_volumes={"vda": overlay},
    )
    onto = rewrite(xml_of(), change)
    where = {overlay: Located(f"/ssd/{overlay.name}", "file")}
    (disk,) = read_domain(onto, where).disks
    assert (disk.path, disk.backing, disk.ends) == (f"/ssd/{overlay.name}", (base,), True)
    down = merge_down(onto, {f"/ssd/{overlay.name}": base}, where)
    (disk,) = read_domain(down, FOUND).disks
    assert (disk.volume, disk.path, disk.backing) == (SSD, "/ssd/web.qcow2", ())
    assert "kvm-clone-0f-vda" not in down
    assert merge_down(onto, {f"/ssd/{overlay.name}": base}) == onto  # nobody says what that volume is


def case(**changes: Any) -> Case:
    """A VM whose disk is a volume of the source's pool `ssd`."""
    usual = Case(
        DISK.format(mode="", below=""),
        domain={"volumes": FOUND},
        directories=(*images(), *images(path="/ssd"), *images(path="/fast")),
        pools=(Pool("default", "dir", IMAGES, True), Pool("ssd", "dir", "/fast", True)),
    )
    return replace(usual, **changes)


DEFAULT = Pool("default", "dir", IMAGES, True)
LANDING: dict[str, tuple[Case, str, Volume | None]] = {
    "in the pool of its name": (case(), "/fast/web.qcow2", SSD),
    "in the pool that was asked for": (
        case(options=options(pool="default")),
        f"{IMAGES}/web.qcow2",
        Volume("default", "web.qcow2"),
    ),
    "in its directory, which is no pool's": (case(pools=(DEFAULT,)), "/ssd/web.qcow2", None),
    "in its directory, another pool's": (
        case(pools=(DEFAULT, Pool("nvme", "fs", "/ssd", True))),
        "/ssd/web.qcow2",
        Volume("nvme", "web.qcow2"),
    ),
    "not in a pool that is off": (case(pools=(DEFAULT, Pool("ssd", "dir", "/fast", False))), "/ssd/web.qcow2", None),
    "not in a pool of devices": (
        case(pools=(DEFAULT, Pool("ssd", "logical", "/dev/ssd", True))),
        "/ssd/web.qcow2",
        None,
    ),
    "in one of two pools of a directory": (
        case(pools=(Pool("a", "dir", "/fast", True), Pool("ssd", "dir", "/fast", True))),
        "/fast/web.qcow2",
        SSD,
    ),
    "nowhere else": (
        case(pools=(DEFAULT,), directories=images()),
        f"{IMAGES}/web.qcow2",
        Volume("default", "web.qcow2"),
    ),
}


@pytest.mark.parametrize("what", LANDING)
def test_where_the_copy_of_a_volume_lands(what: str) -> None:
    given, path, volume = LANDING[what]
    plan = given.plan()
    assert plan.refusal() is None
    assert [disk.final for disk in plan.disks] == [path]
    assert plan.volumes == ({"vda": volume} if volume else {})
    (disk,) = read_domain(clone_xml(plan, planned_mark(plan)), {v: Located(path, "file") for v in [volume] if v}).disks
    assert (disk.path, disk.volume) == (path, volume)


@pytest.fixture
def connection() -> Iterator[Any]:
    """libvirt's own driver for tests, with a pool of files that has one volume."""
    opened = libvirt.open("test:///default")
    pool = opened.storagePoolLookupByName("default-pool")
    yield opened
    opened.close()
    del pool


def test_volumes_are_located_by_their_pools(connection: Any) -> None:
    pool = connection.storagePoolLookupByName("default-pool")
    here = domain_xml(DISK.format(mode="", below="")).replace("'ssd'", "'default-pool'")
    volume = Volume("default-pool", "web.qcow2")
    assert located.locations(connection, here) == {volume: Located("/default-pool/web.qcow2", "file")}
    assert located.read(connection, here).disks[0].path == "/default-pool/web.qcow2"
    pool.destroy()
    assert located.locate(connection, volume) == Located("/default-pool/web.qcow2", "file")
    pool.create()
    assert located.locations(connection, here.replace("default-pool", "none")) == {}
    assert located.locations(connection, here.replace("web.qcow2", "../web.qcow2")) == {}


def test_a_daemon_that_is_gone_is_no_missing_volume() -> None:
    with pytest.raises(libvirt.libvirtError):
        located.locations(Gone(), xml_of())


class Gone:
    """A connection on which every call fails as one does whose daemon is gone."""

    def storagePoolLookupByName(self, _: str) -> Any:  # noqa: N802
        libvirt.open("nowhere:///")


def test_what_nobody_can_locate_is_in_doubt(connection: Any) -> None:
    xml = connection.listAllDomains()[0].XMLDesc()
    devices = DISK.format(mode="", below="").replace("web.qcow2", "../web").replace("ssd", "default-pool")
    devices = devices.replace("vda", "vdz")
    connection.defineXML(xml.replace("<devices>", f"<devices>{devices}"))
    kinds = {claim.kind for claim in inventory.claims(connection) if "web" in claim.path}
    assert kinds == {"doubt"}


def test_a_volume_without_a_name_in_the_change_is_an_error() -> None:
    xml = domain_xml("<disk type='volume'><source pool='p'/><target dev='vda'/></disk>")
    with pytest.raises(RefusedError, match="vda"):
        rewrite(xml, Change("web", MARK, disk_paths={"vda": "/b"}))
