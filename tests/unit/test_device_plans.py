"""Disks that are block devices: where their copies land, how these are named, and what is said of space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import IMAGES, Case, domain_xml, images, options
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.definition.domain_xml import read_domain, unsupported
from kvm_clone.definition.marks import Provenance
from kvm_clone.definition.rewrite import Change, rewrite
from kvm_clone.definition.volumes import Located, Volume
from kvm_clone.findings import Severity
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.domain_facts import Pool
from kvm_clone.planning.facts import Directory
from kvm_clone.planning.file_names import home_of

MARK = Provenance("0f", "u", "kc-a", "s", "web", "f", "1", "t", True)
DEVICE = (
    "<disk type='block' device='disk'><driver name='qemu' type='{format}' cache='none'/>"
    "<source dev='{path}'/>{below}<target dev='{target}' bus='virtio'/></disk>"
)
ROOMY = 1 << 40


def device_xml(path: str = "/dev/vg/web", target: str = "vda", format_: str = "raw", below: str = "") -> str:
    return DEVICE.format(path=path, target=target, format=format_, below=below)


def case(devices: str = "", **changes: Any) -> Case:
    """A VM whose disks are devices; the destination has a /dev too."""
    there = (*images(), Directory("/dev/vg", exists=True, writable=True, free=ROOMY))
    return replace(Case(devices or device_xml(), image={"device": True}, directories=there), **changes)


NAMED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "raw": (device_xml(), {}, ("web-vda.raw",)),
    "qcow2": (device_xml(format_="qcow2"), {}, ("web-vda.qcow2",)),
    "by a name of udev": (device_xml("/dev/disk/by-id/dm-uuid-LVM-x"), {}, ("web-vda.raw",)),
    "two of one name": (device_xml("/dev/a/d") + device_xml("/dev/b/d", "vdb"), {}, ("web-vda.raw", "web-vdb.raw")),
    "a name that is taken": (device_xml(), {"directories": images("web-vda.raw")}, ("web-vda-vda.raw",)),
    "a VM of another name": (device_xml(), {"options": options(new_name="shop")}, ("shop-vda.raw",)),
}


@pytest.mark.parametrize("what", NAMED)
def test_where_a_copy_lands(what: str) -> None:
    """In a file of the default pool: nothing that is below /dev at the destination is touched."""
    devices, changes, names = NAMED[what]
    plan = case(devices, **changes).plan()
    assert plan.findings == ()
    assert [disk.final for disk in plan.disks] == [f"{IMAGES}/{name}" for name in names]


def test_a_volume_that_is_a_device_lands_in_a_file_of_its_own_name() -> None:
    """In the pool of that name, if that one has files; the definition names the volume."""
    volume = Volume("vg", "web")
    xml = "<disk type='volume'><driver type='raw'/><source pool='vg' volume='web'/><target dev='vda'/></disk>"
    default = Pool("default", "dir", IMAGES, True)
    usual = case(xml, domain={"volumes": {volume: Located("/dev/vg/web", "block")}})
    for pools, final, named in (
        ((default, Pool("vg", "logical", "/dev/vg", True)), f"{IMAGES}/web-vda.raw", Volume("default", "web-vda.raw")),
        ((default, Pool("vg", "dir", "/fast", True)), "/fast/web-vda.raw", Volume("vg", "web-vda.raw")),
    ):
        it = replace(usual, pools=pools, directories=(*images(), *images(path="/fast")))
        plan = it.plan()
        assert plan.refusal() is None
        assert [disk.final for disk in plan.disks] == [final]
        (disk,) = read_domain(clone_xml(plan, planned_mark(plan))).disks
        assert disk.volume == named


def test_a_directory_of_devices_is_nobodys_home() -> None:
    assert (home_of("/dev/vg/web"), home_of("/device/web"), home_of("/srv//web")) == ("", "/device", "/srv")


WRITTEN = """<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
<source file="/new/web.raw"/><target dev='vda' bus='virtio'/></disk>"""


def test_a_device_becomes_a_file() -> None:
    xml = domain_xml(device_xml()).replace("NAME", "web")
    assert unsupported(read_domain(xml)) == ()
    change = Change("web", MARK, disk_paths={"vda": "/new/web.raw"})
    written = rewrite(xml, change)
    assert WRITTEN in written
    assert rewrite(written, change) == written


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_path_of_a_device_is_read_back(name: str) -> None:
    quoted = name.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&apos;")
    (disk,) = read_domain(domain_xml(device_xml(f"/dev/{quoted}"))).disks
    assert (disk.type, disk.path) == ("block", f"/dev/{name}")


@pytest.mark.parametrize(
    ("device", "format_", "free", "code"),
    [
        (True, "raw", ROOMY, ""),
        (True, "raw", 1 << 20, "space-unknown"),
        (True, "qcow2", 1 << 20, "space"),
        (False, "raw", 1 << 20, "space"),
    ],
)
def test_room_for_what_nobody_has_read(device: bool, format_: str, free: int, code: str) -> None:
    """A device's copy may be as large as the device, and as small as what is not zero in it."""
    it = case(
        device_xml(format_=format_),
        image={"device": device, "data": 1 << 30},
        directories=(Directory(IMAGES, exists=True, writable=True, free=free),),
    )
    plan = it.plan()
    assert [finding.code for finding in plan.findings] == ([code] if code else [])
    assert plan.blocking == (() if code == "space-unknown" else plan.findings)
    assert all(
        one.severity is (Severity.WARNING if code == "space-unknown" else Severity.BLOCKING) for one in plan.findings
    )
