"""rewrite.py's way onto overlays and back: the definition that a sync commits, and the one that its merge ends with."""

from __future__ import annotations

import pytest
from cases import OTHER_UUID, UUID, domain_xml

from kvm_clone.definition.domain_xml import read_domain, unsupported
from kvm_clone.definition.marks import NAMESPACE, SEAL_NAMESPACE, Provenance, read_provenance, read_seal
from kvm_clone.definition.rewrite import Change, merge_down, rewrite
from kvm_clone.definition.spans import Document, Node
from kvm_clone.errors import RefusedError
from kvm_clone.image import Image

MARK = Provenance("0f", OTHER_UUID, "kc-a", UUID, "web", "f", "1", "t", True)
AWKWARD = '/pool\'s "own" & <other>/a b.qcow2'
ESCAPED = "/pool&apos;s &quot;own&quot; &amp; &lt;other&gt;/a b.qcow2"


def disk(inside: str, target: str = "vda") -> str:
    return f"<disk type='file' device='disk'>{inside}<target dev='{target}' bus='virtio'/></disk>"


def xml_of(*disks: str) -> str:
    return domain_xml("\n    ".join(disks)).replace("NAME", "web")


def onto_overlay(xml: str, base: Image, overlay: str = "/o.qcow2", target: str = "vda") -> str:
    change = Change(
        "web", MARK, disk_paths={target: overlay}, disk_formats={target: "qcow2"}, disk_bases={target: base}
    )
    return rewrite(xml, change)


def disks_of(xml: str) -> list[Node]:
    return list(Document(xml).root.find_all("devices", "disk"))


def chain_of(node: Node) -> list[tuple[str | None, str]]:
    """Format and file of the image and of what it is said to rest on, down to the end that is said; None unsaid."""
    found = [(node.find_attributes("driver").get("type"), node.find_attributes("source")["file"])]
    while True:
        stores = [child for child in node.children if child.tag == "backingStore"]
        assert len(stores) <= 1
        if not stores or stores[0].find("source") is None:
            return found
        node = stores[0]
        assert node.attributes["type"] == "file"
        found.append((node.find_attributes("format").get("type"), node.find_attributes("source")["file"]))


SOURCE = "<source file='/a.img'/>"
DRIVERS = {
    "qcow2": "<driver name='qemu' type='qcow2' cache='none'/>",
    "raw": "<driver name='qemu' type='raw' discard='unmap'/>",
    "no type, which is raw": "<driver name='qemu' queues='4' iommu=\"on\"/>",
    "nothing, which is raw": "",
}
STORES = {
    "unsaid": "",
    "the end": "<backingStore/>",
    "an index": "<backingStore/>\n      <alias name='virtio-disk0'/>",
    "an image": "<backingStore type='file'><format type='qcow2'/><source file='/old'/><backingStore/></backingStore>",
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_onto_an_overlay_and_back(driver: str, store: str, base_format: str) -> None:
    source = xml_of(disk(DRIVERS[driver] + SOURCE + STORES[store]), disk("<source file='/b.img'/>", "vdb"))
    overlaid = onto_overlay(source, Image(AWKWARD, base_format))
    vda, vdb = disks_of(overlaid)
    assert chain_of(vda) == [("qcow2", "/o.qcow2"), (base_format, AWKWARD)]
    assert chain_of(vdb) == [(None, "/b.img")]
    assert read_domain(overlaid).disks[0].format == "qcow2"
    onto = read_domain(overlaid).disks[0]
    assert (onto.backing, onto.ends) == ((Image(AWKWARD, base_format),), True)

    merged = merge_down(overlaid, {"/o.qcow2": Image(AWKWARD, base_format)})
    vda, vdb = disks_of(merged)
    assert chain_of(vda) == [(base_format, AWKWARD)]
    assert [child for child in vda.children if child.tag == "backingStore"] == []
    assert chain_of(vdb) == [(None, "/b.img")]
    down = read_domain(merged).disks[0]
    assert (down.format, down.backing, down.ends) == (base_format, (), False)
    assert unsupported(read_domain(merged)) == ()


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_else_the_driver_says_stays(driver: str) -> None:
    source = xml_of(disk(DRIVERS[driver] + SOURCE))
    said = {key: value for key, value in disks_of(source)[0].find_attributes("driver").items() if key != "type"}
    merged = merge_down(onto_overlay(source, Image("/b.raw", "raw")), {"/o.qcow2": Image("/b.raw", "raw")})
    assert {key: value for key, value in disks_of(merged)[0].find_attributes("driver").items() if key != "type"} == (
        said or {"name": "qemu"}
    )


def test_everything_else_stays_byte_for_byte() -> None:
    source = xml_of(
        "<!-- a comment -->",
        disk(DRIVERS["qcow2"] + SOURCE + "<address  type='pci'\tslot=\"0x04\" />"),
        "<x:y xmlns:x='urn:x'>&amp;<![CDATA[<disk>]]></x:y>",
    )
    overlaid = onto_overlay(source, Image("/a.img", "qcow2"), overlay="/a.img.overlay")
    merged = merge_down(overlaid, {"/a.img.overlay": Image("/a.img", "qcow2")})
    plain = rewrite(source, Change("web", MARK))
    assert merged == plain


def test_merge_down_without_overlays_changes_nothing() -> None:
    source = xml_of(disk(DRIVERS["qcow2"] + SOURCE + STORES["the end"]))
    assert merge_down(source, {}) == source
    assert merge_down(source, {"/elsewhere": Image("/b", "raw")}) == source


def test_merge_down_of_paths_that_xml_has_to_escape() -> None:
    source = xml_of(disk(f'{DRIVERS["qcow2"]}<source file="{ESCAPED}"/>{STORES["an image"]}'))
    merged = merge_down(source, {AWKWARD: Image("/new & old.raw", "raw")})
    assert chain_of(disks_of(merged)[0]) == [("raw", "/new & old.raw")]
    assert "/new &amp; old.raw" in merged


def test_merge_down_knows_each_disk_by_its_file() -> None:
    source = xml_of(
        disk("<source file='/o1'/>"),
        disk("<source file='/o2'/>", "vdb"),
        disk("<source file='/o3'/>", "vdc"),
        "<disk type='file' device='cdrom'><target dev='sda'/></disk>",
        "<disk type='block' device='disk'><source dev='/dev/x'/><target dev='vdd'/></disk>",
    )
    merged = merge_down(source, {"/o2": Image("/b2", "qcow2"), "/o1": Image("/b1", "raw")})
    assert [one.find_attributes("source").get("file") for one in disks_of(merged)] == ["/b1", "/b2", "/o3", None, None]
    assert [one.find_attributes("driver").get("type") for one in disks_of(merged)[:3]] == ["raw", "qcow2", None]


def test_merge_down_of_what_is_no_domain() -> None:
    with pytest.raises(RefusedError):
        merge_down("<network/>", {})


def test_new_disks_and_overlays_side_by_side() -> None:
    source = xml_of(disk(DRIVERS["raw"] + SOURCE), disk(DRIVERS["qcow2"] + "<source file='/b'/>", "vdb"))
    change = Change(
        "web",
        MARK,
        disk_paths={"vda": "/o", "vdb": "/new.qcow2"},
        disk_formats={"vda": "qcow2"},
        disk_bases={"vda": Image("/base.raw", "raw")},
    )
    vda, vdb = disks_of(rewrite(source, change))
    assert chain_of(vda) == [("qcow2", "/o"), ("raw", "/base.raw")]
    assert chain_of(vdb) == [("qcow2", "/new.qcow2")]


SEAL = f"<s:replica xmlns:s='{SEAL_NAMESPACE}' definition='0f'><s:image target='vda' fingerprint='1'/></s:replica>"
OLD = f"<k:clone xmlns:k='{NAMESPACE}' operation='older'/>"
TOOL = "<t:app xmlns:t='urn:t'>kept</t:app>"


@pytest.mark.parametrize(
    "metadata",
    [SEAL, OLD + SEAL, SEAL + OLD, TOOL + SEAL, SEAL + TOOL + OLD, f"\n    {OLD}\n    {SEAL}\n  "],
    ids=["a seal alone", "mark, seal", "seal, mark", "another tool's, seal", "all", "on lines of their own"],
)
def test_the_clone_of_a_replica_has_no_seal(metadata: str) -> None:
    """It says how the source was, not how the clone is."""
    source = xml_of(disk(SOURCE)).replace("<memory>", f"<metadata>{metadata}</metadata><memory>")
    clone = rewrite(source, Change("copy", MARK))
    assert read_seal(clone) is None
    assert read_provenance(clone) == MARK
    assert clone.count(NAMESPACE) == 1
    assert (TOOL in clone) == (TOOL in metadata)
