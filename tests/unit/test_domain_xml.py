"""definition.py: golden pairs, properties of rewriting, and what is refused.

KVM_CLONE_REGENERATE=1 writes the golden outputs anew; read their diff before keeping them.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.definition.domain_xml import DiskXml, DomainXml, read_domain, unsupported, warnings
from kvm_clone.definition.marks import NAMESPACE, Provenance, read_provenance
from kvm_clone.definition.references import references
from kvm_clone.definition.rewrite import Change, new_mac, rewrite
from kvm_clone.errors import RefusedError
from kvm_clone.image import Image

DATA = Path(__file__).parent.parent / "data" / "xml"
CASES = sorted(path.name.removesuffix(".in.xml") for path in DATA.glob("*.in.xml"))

OLD_UUID = "6695eb01-f6a4-4304-b9aa-97f2502e193f"
NEW_UUID = "12345678-9abc-4def-8123-456789abcdef"
NEW_GENID = "fedcba98-7654-4321-8123-456789abcdef"
PROVENANCE = Provenance(
    operation="20250102T030405-ab12",
    uuid=NEW_UUID,
    source_host="root@alpha.example.org",
    source_uuid=OLD_UUID,
    source_name='the "old" & <first>',
    fingerprint="sha256:0123456789abcdef",
    version="1.0.0",
    created="2025-01-02T03:04:05Z",
    verified=True,
)
OURS = re.compile(r"\s*<kvm-clone:clone [^>]*/>")
OUR_METADATA = re.compile(r"\s*<metadata>\s*<kvm-clone:clone [^>]*/>\s*</metadata>")


def read(name: str) -> str:
    return (DATA / name).read_bytes().decode()


def golden_change(case: str, domain: DomainXml) -> Change:
    """What is asked for in the golden pairs: everything, except for the cases that say otherwise."""
    if case == "keep":
        return Change(new_name=domain.name, provenance=PROVENANCE)
    source = random.Random(case)
    name = """o'neil "two" & <co>""" if case == "awkward-name" else f"{domain.name}-2"
    return Change(
        new_name=name,
        provenance=PROVENANCE,
        new_uuid=NEW_UUID,
        new_macs=tuple(new_mac(source) for _ in domain.macs),
        disk_paths={disk.target: f"/new/{name}-{disk.target}.{disk.format}" for disk in domain.own_disks},
        new_genid=NEW_GENID,
        host_paths={one.value: f"{one.value}-2" for one in references(read(f"{case}.in.xml")) if one.is_renamed},
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_pair(case: str) -> None:
    xml = read(f"{case}.in.xml")
    result = rewrite(xml, golden_change(case, read_domain(xml)))
    if os.environ.get("KVM_CLONE_REGENERATE"):
        (DATA / f"{case}.out.xml").write_bytes(result.encode())
    assert result == read(f"{case}.out.xml")


def flat(disk: DiskXml, paths: Mapping[str, str]) -> DiskXml:
    """The disk in the clone: with its new path, and without the images that the old one rested on."""
    if disk.target not in paths:
        return disk
    alone = replace(disk, path=paths[disk.target])
    return replace(alone, backing=(), ends=False) if disk.backing else alone


@pytest.mark.parametrize("case", CASES)
def test_result_reads_back_as_the_change_said(case: str) -> None:
    xml = read(f"{case}.in.xml")
    before = read_domain(xml)
    change = golden_change(case, before)
    after = read_domain(rewrite(xml, change))
    expected = replace(
        before,
        name=change.new_name,
        uuid=change.new_uuid or before.uuid,
        macs=before.macs if change.new_macs is None else change.new_macs,
        disks=tuple(flat(disk, change.disk_paths) for disk in before.disks),
    )
    assert after == expected
    assert read_provenance(rewrite(xml, change)) == PROVENANCE


@pytest.mark.parametrize("case", CASES)
def test_rewriting_twice_changes_nothing_more(case: str) -> None:
    xml = read(f"{case}.in.xml")
    change = golden_change(case, read_domain(xml))
    once = rewrite(xml, change)
    assert rewrite(once, change) == once


@pytest.mark.parametrize("case", sorted({*CASES} - {"clone-of-clone", "double-quotes"}))
def test_without_the_mark_the_original_is_left(case: str) -> None:
    """The two cases left out replace a mark, and open a self-closed element."""
    xml = read(f"{case}.in.xml")
    marked = rewrite(xml, Change(new_name=read_domain(xml).name, provenance=PROVENANCE))
    pattern = OURS if "<metadata>" in xml else OUR_METADATA
    assert pattern.sub("", marked, count=1) == xml


def test_one_mark_is_left_of_several() -> None:
    """An element of our namespace is ours whatever its prefix."""
    marks = f"<a:clone xmlns:a='{NAMESPACE}'/><!-- x --><clone xmlns='{NAMESPACE}'>text</clone>"
    xml = f"<domain><name>a</name><metadata>{marks}</metadata></domain>"
    result = rewrite(xml, Change(new_name="a", provenance=PROVENANCE))
    assert result.count(NAMESPACE) == 1
    assert "<!-- x -->" in result
    assert read_provenance(result) == PROVENANCE


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("<metadata/>", "<metadata>\n    MARK\n  </metadata>"),
        ("<metadata />", "<metadata >\n    MARK\n  </metadata>"),
        ("<metadata></metadata>", "<metadata>\n    MARK\n  </metadata>"),
        ("<metadata>\n  </metadata>", "<metadata>\n    MARK\n  </metadata>"),
        ("<metadata><x xmlns='x:'/></metadata>", "<metadata><x xmlns='x:'/>MARK</metadata>"),
    ],
)
def test_mark_fits_into_what_metadata_there_is(metadata: str, expected: str) -> None:
    xml = f"<domain>\n  <name>a</name>\n  {metadata}\n</domain>"
    result = rewrite(xml, Change(new_name="a", provenance=PROVENANCE))
    assert re.sub(r"<kvm-clone:[^>]*>", "MARK", result) == xml.replace(metadata, expected)


def test_line_ends_of_the_document_are_taken_up() -> None:
    xml = "<domain>\r\n  <name>a</name>\r\n</domain>"
    result = rewrite(xml, Change(new_name="b", provenance=PROVENANCE, new_uuid=NEW_UUID))
    assert "\n" not in result.replace("\r\n", "")


def test_unverified_mark() -> None:
    unverified = replace(PROVENANCE, verified=False)
    assert read_provenance(rewrite(SIMPLE, Change("a", unverified))) == unverified


def test_no_mark_and_half_a_mark() -> None:
    assert read_provenance(SIMPLE) is None
    half = rewrite(SIMPLE, Change("a", PROVENANCE)).replace(' operation="', ' operatio="')
    assert read_provenance(half) is None


@pytest.mark.parametrize(
    ("printed", "follows"),
    [(OLD_UUID, True), (OLD_UUID.upper().replace("-", ""), True), (OLD_UUID.replace("6", "7"), False)],
)
def test_smbios_uuid_follows_only_if_it_was_the_domains(printed: str, follows: bool) -> None:
    entry = f"<sysinfo type='smbios'><system><entry name='uuid'>{printed}</entry></system></sysinfo>"
    result = rewrite(SIMPLE.replace("</uuid>", f"</uuid>{entry}"), Change("a", PROVENANCE, new_uuid=NEW_UUID))
    assert f"<entry name='uuid'>{NEW_UUID if follows else printed}</entry>" in result


@pytest.mark.parametrize("first", ["\ufeff", "<?xml version='1.0' encoding='utf-16'?>\n", "<!-- é -->"])
def test_what_precedes_the_domain_is_kept(first: str) -> None:
    result = rewrite(first + SIMPLE, Change("neu-é", PROVENANCE))
    assert OUR_METADATA.sub("", result) == first + SIMPLE.replace("<name>vm<", "<name>neu-é<")


def test_a_value_that_stays_keeps_its_spelling() -> None:
    xml = SIMPLE.replace("/srv/a", "/srv/&#97;").replace("<name>vm", "<name>&#118;m")
    change = Change("vm", PROVENANCE, new_uuid=OLD_UUID.upper(), disk_paths={"vda": "/srv/a.qcow2"})
    assert OUR_METADATA.sub("", rewrite(xml, change)) == xml


def test_uuid_fills_an_empty_element() -> None:
    result = rewrite(SIMPLE.replace(f"<uuid>{OLD_UUID}</uuid>", "<uuid />"), Change("a", PROVENANCE, NEW_UUID))
    assert f"<uuid >{NEW_UUID}</uuid>" in result


def test_new_mac() -> None:
    made = [new_mac(random.Random(seed)) for seed in range(50)]
    assert all(re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac) for mac in made)
    assert len(set(made)) == 50
    assert new_mac(random.Random(1)) == new_mac(random.Random(1))


SIMPLE = f"""<domain type='kvm'>
  <name>vm</name>
  <uuid>{OLD_UUID}</uuid>
  <memory unit='KiB'>1024</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/a.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def with_devices(*devices: str) -> str:
    return SIMPLE.replace("</devices>", "".join(devices) + "</devices>")


def disk(inside: str = "", *, opening: str = "type='file' device='disk'", source: str | None = None) -> str:
    source = "<source file='/srv/b.img'/>" if source is None else source
    return f"<disk {opening}>{source}<target dev='vdb' bus='virtio'/>{inside}</disk>"


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain>",
        "<domain><name>a</name></domain><domain/>",
        "<domain><name>a</name><x:y/></domain>",
        "<domain><name>\ud800</name></domain>",
        "<network><name>a</name></network>",
        "<domain xmlns='urn:x'><name>a</name></domain>",
        "<domain/>",
        "<domain><name/></domain>",
        "<!DOCTYPE domain [<!ENTITY a '<name>b</name>'>]><domain><name>a</name>&a;</domain>",
    ],
)
def test_what_is_no_domain_is_refused(xml: str) -> None:
    for call in (read_domain, read_provenance, lambda text: rewrite(text, Change("b", PROVENANCE))):
        with pytest.raises(RefusedError):
            call(xml)


@pytest.mark.parametrize(
    "change",
    [
        Change("a\x00b", PROVENANCE),
        Change("a", PROVENANCE, disk_paths={"vda": "/srv/\x1b.img"}),
        Change("a", PROVENANCE, disk_paths={"vda": "/srv/\udc80.img"}),
        Change("a", PROVENANCE, disk_paths={"vdz": "/srv/z.img"}),
        Change("a", PROVENANCE, new_macs=("52:54:00:00:00:01",)),
        Change("a", replace(PROVENANCE, source_name="\x01")),
    ],
)
def test_change_that_cannot_be_made_is_refused(change: Change) -> None:
    with pytest.raises(RefusedError):
        rewrite(SIMPLE, change)


def test_disk_that_has_no_file_cannot_get_another() -> None:
    xml = with_devices(disk(opening="type='network' device='disk'", source="<source protocol='rbd' name='p/b'/>"))
    with pytest.raises(RefusedError, match="vdb"):
        rewrite(xml, Change("a", PROVENANCE, disk_paths={"vdb": "/srv/b.img"}))


def test_facts_of_a_domain() -> None:
    domain = read_domain(read("media.in.xml"))
    assert (domain.name, domain.type, domain.vcpus, domain.memory) == ("media", "kvm", 4, 2 << 30)
    assert (domain.arch, domain.machine) == ("x86_64", "pc-q35-7.2")
    assert domain.emulator == "/usr/bin/qemu-system-x86_64"
    assert [(file.role, file.path) for file in domain.os_files] == [("loader", "/usr/share/seabios/bios.bin")]
    assert domain.loader_type == "rom"
    assert domain.macs == ("52:54:00:aa:bb:01",)
    assert [disk.target for disk in domain.own_disks] == ["vda", "vdb"]
    assert [disk.target for disk in domain.referenced_disks] == ["vdc"]
    assert [(disk.target, disk.path) for disk in domain.media] == [
        ("sda", "/srv/iso/debian-12.iso"),
        ("sdb", None),
        ("sdc", "http:/iso/virtio-win.iso"),
        ("fda", "/srv/iso/drivers.vfd"),
    ]
    assert domain.disks[0] == DiskXml(
        "vda", "virtio", "disk", "file", "qcow2", "/var/lib/libvirt/images/media.qcow2", direct=True
    )


CHAINS: dict[str, tuple[str, tuple[Image, ...], bool]] = {
    "unsaid": ("", (), False),
    "none": ("<backingStore/>", (), True),
    "its beginning": (
        "<backingStore type='file'><format type='raw'/><source file='/b'/></backingStore>",
        (Image("/b", "raw"),),
        False,
    ),
    "without a format": ("<backingStore type='file'><source file='/b'/></backingStore>", (Image("/b", ""),), False),
    "two, and the end": (
        "<backingStore type='file'><source file='/b'/><backingStore type='block'><source dev='/dev/c'/>"
        "<backingStore/></backingStore></backingStore>",
        (Image("/b", ""), Image("/dev/c", "")),
        True,
    ),
    "a volume": (
        "<backingStore type='volume'><source pool='p' volume='v'/></backingStore>",
        (Image("p/v", ""),),
        False,
    ),
}


@pytest.mark.parametrize("what", CHAINS)
def test_what_a_definition_says_of_a_chain(what: str) -> None:
    written, images, ends = CHAINS[what]
    vdb = next(one for one in read_domain(with_devices(disk(written))).disks if one.target == "vdb")
    assert (vdb.backing, vdb.ends) == (images, ends)


def test_direct_kernel_boot() -> None:
    boot = "<kernel>/boot/k</kernel><initrd>/boot/i</initrd><cmdline>quiet</cmdline><dtb>/boot/d</dtb></os>"
    domain = read_domain(SIMPLE.replace("</os>", boot))
    assert [(file.role, file.path) for file in domain.os_files] == [
        ("kernel", "/boot/k"),
        ("initrd", "/boot/i"),
        ("dtb", "/boot/d"),
    ]
    assert domain.loader_type is None
    assert unsupported(domain) == ()


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("<memory>3</memory>", 3 << 10),
        ("<memory unit=''>3</memory>", 3 << 10),
        ("<memory unit='b'>3</memory>", 3),
        ("<memory unit='bytes'>3</memory>", 3),
        ("<memory unit='KB'>3</memory>", 3000),
        ("<memory unit='k'>3</memory>", 3 << 10),
        ("<memory unit='MiB'> 3 </memory>", 3 << 20),
        ("<memory unit='MB'>3</memory>", 3_000_000),
        ("<memory unit='G'>3</memory>", 3 << 30),
        ("<memory unit='TiB'>3</memory>", 3 << 40),
        ("<memory unit='eib'>3</memory>", 3 << 60),
    ],
)
def test_memory_units(memory: str, size: int) -> None:
    assert read_domain(re.sub(r"<memory.*</memory>", memory, SIMPLE)).memory == size


@pytest.mark.parametrize(
    "memory", ["<memory unit='XiB'>3</memory>", "<memory unit='Kx'>3</memory>", "<memory>3.5</memory>"]
)
def test_memory_that_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(RefusedError):
        read_domain(re.sub(r"<memory.*</memory>", memory, SIMPLE))


OS = "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
NVRAM = "<nvram template='/usr/share/OVMF/VARS.fd'>/var/lib/libvirt/qemu/nvram/vm_VARS.fd</nvram>"
PFLASH = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/CODE.fd</loader>"
UNSUPPORTED = [
    # (id, XML, code, subject, what the text must name)
    (
        "nvram",
        SIMPLE.replace("</os>", NVRAM + "</os>"),
        "nvram",
        "vm",
        "nvram /var/lib/libvirt/qemu/nvram/vm_VARS.fd",
    ),
    (
        "nvram-source",
        SIMPLE.replace("</os>", "<nvram type='file'><source file='/srv/vars.fd'/></nvram></os>"),
        "nvram",
        "vm",
        "/srv/vars.fd",
    ),
    (
        "varstore",
        SIMPLE.replace("</os>", "<varstore path='/srv/v.json'/></os>"),
        "nvram",
        "vm",
        "varstore /srv/v.json",
    ),
    (
        "pflash",
        SIMPLE.replace("</os>", PFLASH.replace(" readonly='yes'", "") + "</os>"),
        "nvram",
        "vm",
        "kept in the loader itself, /usr/share/OVMF/CODE.fd",
    ),
    (
        "nvram on a server",
        SIMPLE.replace("</os>", PFLASH + "<nvram type='network'><source protocol='nbd'/></nvram></os>"),
        "nvram",
        "vm",
        "type network",
    ),
    (
        "nvram of another format",
        SIMPLE.replace("</os>", PFLASH + "<nvram format='vmdk'>/v</nvram></os>"),
        "nvram",
        "vm",
        "format vmdk",
    ),
    (
        "tpm",
        with_devices("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"),
        "tpm",
        "vm",
        "tpm-crb",
    ),
    (
        "nvdimm",
        with_devices("<memory model='nvdimm'><source><path>/srv/nv</path></source><target/></memory>"),
        "memory",
        "vm",
        "nvdimm /srv/nv",
    ),
    (
        "virtio-pmem",
        with_devices("<memory model='virtio-pmem'><source><path>/srv/pm</path></source></memory>"),
        "memory",
        "vm",
        "virtio-pmem /srv/pm",
    ),
    (
        "network",
        with_devices(disk(opening="type='network'", source="<source protocol='rbd' name='pool/b'/>")),
        "disk-type",
        "vdb",
        "rbd:pool/b",
    ),
    (
        "volume",
        with_devices(disk(opening="type='volume'", source="<source pool='default' volume='b.img'/>")),
        "disk-volume",
        "vdb",
        "default/b.img",
    ),
    (
        "nvme",
        with_devices(
            disk(
                opening="type='nvme'",
                source="<source type='pci' namespace='1'><address domain='0x0000' bus='0x01'/></source>",
            )
        ),
        "disk-type",
        "vdb",
        "namespace=1 domain=0x0000 bus=0x01",
    ),
    (
        "vhostuser",
        with_devices(disk(opening="type='vhostuser'", source="<source type='unix' path='/run/b.sock'/>")),
        "disk-type",
        "vdb",
        "/run/b.sock",
    ),
    (
        "dir",
        with_devices(disk(opening="type='dir'", source="<source dir='/srv/d'/>")),
        "disk-type",
        "vdb",
        "/srv/d",
    ),
    (
        "lun",
        with_devices(disk("<readonly/>", opening="type='block' device='lun'", source="<source dev='/dev/sdx'/>")),
        "disk-device",
        "vdb",
        "lun",
    ),
    (
        "encryption",
        with_devices(disk(source="<source file='/srv/b.img'><encryption format='luks'/></source>")),
        "disk-encryption",
        "vdb",
        "/srv/b.img",
    ),
    (
        "encryption-old",
        with_devices(disk("<encryption format='luks'/>")),
        "disk-encryption",
        "vdb",
        "/srv/b.img",
    ),
    ("format", with_devices(disk("<driver name='qemu' type='vmdk'/>")), "disk-format", "vdb", "vmdk"),
    (
        "slices",
        with_devices(disk(source="<source file='/srv/b.img'><slices><slice type='storage'/></slices></source>")),
        "disk-slices",
        "vdb",
        "/srv/b.img",
    ),
    ("mirror", with_devices(disk("<mirror type='file'/>")), "disk-mirror", "vdb", "/srv/b.img"),
    (
        "reservations",
        with_devices(disk(source="<source file='/srv/b.img'><reservations managed='yes'/></source>")),
        "disk-reservations",
        "vdb",
        "/srv/b.img",
    ),
    (
        "data-store",
        with_devices(disk(source="<source file='/srv/b.img'><dataStore type='file'/></source>")),
        "disk-datastore",
        "vdb",
        "/srv/b.img",
    ),
    (
        "fdgroup",
        with_devices(disk(source="<source file='/srv/b.img' fdgroup='f'/>")),
        "disk-fdgroup",
        "vdb",
        "/srv/b.img",
    ),
    (
        "no-source",
        with_devices(disk(source="<source startupPolicy='optional'/>")),
        "disk-source",
        "vdb",
        "no file",
    ),
    (
        "duplicate",
        with_devices(disk("<shareable/>", source="<source file='/srv/a.qcow2'/>")),
        "disk-duplicate",
        "vda",
        "vdb",
    ),
]


@pytest.mark.parametrize(
    ("xml", "code", "subject", "named"), [pytest.param(*case[1:], id=case[0]) for case in UNSUPPORTED]
)
def test_unsupported_is_refused_by_name(xml: str, code: str, subject: str, named: str) -> None:
    (found,) = unsupported(read_domain(xml))
    assert (found.code, found.subject) == (code, subject)
    assert named in found.text
    assert "vm" in found.text
    assert found.text.endswith(".")


def test_two_disks_on_one_file_are_both_refused() -> None:
    found = unsupported(read_domain(with_devices(disk(source="<source file='/srv/a.qcow2'/>"))))
    assert [(one.code, one.subject) for one in found] == [
        ("disk-duplicate", "vda"),
        ("disk-duplicate", "vdb"),
    ]


def test_disks_without_a_file_do_not_share_one() -> None:
    empty = disk(source="<source file=''/>")
    found = unsupported(read_domain(with_devices(empty, empty.replace("vdb", "vdc"))))
    assert [(one.code, one.subject) for one in found] == [("disk-source", "vdb"), ("disk-source", "vdc")]


def test_every_reason_is_given_at_once() -> None:
    opening = "type='network' device='disk'"
    source = "<source protocol='rbd' name='p/b'><encryption format='luks'/></source>"
    xml = with_devices(disk("<driver type='vdi'/>", opening=opening, source=source)).replace("</os>", NVRAM + "</os>")
    assert [one.code for one in unsupported(read_domain(xml))] == [
        "nvram",
        "disk-type",
        "disk-format",
        "disk-encryption",
    ]


@pytest.mark.parametrize(
    "xml",
    [
        SIMPLE,
        SIMPLE.replace("<os>", "<os firmware='bios'>"),
        SIMPLE.replace("</os>", "<loader type='rom'>/usr/share/seabios/bios.bin</loader></os>"),
        SIMPLE.replace("</os>", "<loader>/usr/lib/xen/boot/hvmloader</loader></os>"),
        SIMPLE.replace("<driver name='qemu' type='qcow2'/>", ""),
        SIMPLE.replace("</domain>", "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity></domain>"),
        with_devices(disk("<backingStore/><transient/><iotune/><serial>1</serial>")),
        with_devices(disk("<readonly/>", opening="type='block'", source="<source dev='/dev/vg/b'/>")),
        with_devices(disk("<shareable/><driver type='vmdk'/>")),
        with_devices(disk(opening="type='file' device='cdrom'", source="")),
        with_devices(disk(opening="type='block' device='cdrom'", source="<source dev='/dev/sr0'/>")),
        with_devices(disk(opening="type='dir' device='floppy'", source="<source dir='/srv/f'/>")),
        with_devices(
            disk("<readonly/>", opening="type='file' device='cdrom'"),
            disk("<readonly/>", opening="type='file' device='cdrom'"),
        ),
        with_devices("<memory model='dimm'><target><size unit='KiB'>1024</size></target></memory>"),
        with_devices("<nvram><address type='spapr-vio' reg='0x3000'/></nvram>"),
        read("media.in.xml"),
        read("foreign.in.xml"),
    ],
)
def test_harmless_features_are_not_refused(xml: str) -> None:
    domain = read_domain(xml)
    assert unsupported(domain) == ()
    assert warnings(domain) == ()


HOST_TIED = [
    (
        "<hostdev mode='subsystem'><source><address domain='0x0000' bus='0x06'/></source></hostdev>",
        "hostdev",
        "bus=0x06",
    ),
    (
        "<filesystem type='mount'><source dir='/srv/share'/><target dir='s'/></filesystem>",
        "filesystem",
        "/srv/share",
    ),
    ("<shmem name='ivshmem0'><model type='ivshmem-plain'/></shmem>", "shmem", "ivshmem0"),
    (
        "<interface type='direct'><source dev='eth0' mode='bridge'/></interface>",
        "interface-direct",
        "dev=eth0",
    ),
    (
        "<interface type='hostdev'><source><address type='pci' bus='0x07'/></source></interface>",
        "interface-hostdev",
        "bus=0x07",
    ),
]


@pytest.mark.parametrize(("device", "code", "named"), HOST_TIED)
def test_host_tied_devices_are_warned_of_by_name(device: str, code: str, named: str) -> None:
    domain = read_domain(with_devices(device))
    (found,) = warnings(domain)
    assert (found.code, found.subject) == (code, "vm")
    assert named in found.text
    assert unsupported(domain) == ()


# A generated document is a template: noise that must stay, and slots whose values the change replaces.
# Filling it with the old and with the new values gives the input, and the output to expect.

CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")
VALUES = st.text(CHARACTERS, min_size=1, max_size=12)
PATHS = VALUES.map(lambda text: f"/{text}")
MACS = st.integers(0, 2**32).map(lambda seed: new_mac(random.Random(seed)))
NOISE = st.sampled_from(
    [
        "",
        "\n  ",
        "\n\t",
        "<!-- <name>x</name><source file='/old'/> é -->",
        "<?pi <uuid>x</uuid> > ?>",
        "<title><![CDATA[</title><name>x</name>]]></title>",
        "<x:name xmlns:x='urn:x'>東<source file='/old'/><disk><target dev='d0'/></disk></x:name>",
        "<name xmlns='urn:x' file='>'/>",
        '<description a = "&apos;\'&gt;>" >&lt;name&gt;&#233;</description >',
    ]
)


@st.composite
def rewrites(draw: st.DrawFn) -> tuple[str, str, Change]:
    """An input, the output expected of it but for our mark, and the change."""
    sides: tuple[list[str], list[str]] = ([], [])

    def fixed(markup: str) -> None:
        for side in sides:
            side.append(markup)

    def slot(old: str, new: str) -> None:
        sides[0].append(old)
        sides[1].append(new)

    old_name, new_name = draw(VALUES), draw(VALUES)
    fixed("<domain>" + draw(NOISE) + "<name>")
    slot(escape(old_name), escape(new_name))
    fixed("</name>" + draw(NOISE) + "<uuid>")
    slot(OLD_UUID, NEW_UUID)
    fixed("</uuid>" + draw(NOISE) + "<devices>")
    disk_paths = {}
    for index in range(draw(st.integers(0, 3))):
        old, new, change = draw(PATHS), draw(PATHS), draw(st.booleans())
        old_quoted = quoteattr(old)
        fixed(f"<disk>{draw(NOISE)}<source index='1' file = ")
        if change:
            disk_paths[f"d{index}"] = new
            quote = old_quoted[0]
            escaped = escape(new, {quote: "&quot;" if quote == '"' else "&apos;"})
            slot(old_quoted, f"{quote}{escaped}{quote}")
        else:
            fixed(old_quoted)
        fixed(f" >{draw(NOISE)}</source>{draw(NOISE)}<target dev='d{index}'/></disk>")
    macs = draw(st.lists(MACS, max_size=3))
    for mac in macs:
        fixed(f"{draw(NOISE)}<interface><mac address='")
        slot("52:54:00:00:00:00", mac)
        fixed("'/></interface>")
    fixed("</devices></domain>" + draw(st.sampled_from(["", "\n", "<!-- end -->\n"])))
    change_all = Change(new_name, PROVENANCE, NEW_UUID, tuple(macs), disk_paths)
    return "".join(sides[0]), "".join(sides[1]), change_all


@given(rewrites())
def test_only_the_named_values_change(case: tuple[str, str, Change]) -> None:
    xml, expected, change = case
    result = rewrite(xml, change)
    assert OUR_METADATA.sub("", result, count=1) == expected
    root = ElementTree.fromstring(result)
    assert root.findtext("name") == change.new_name
    assert read_provenance(result) == PROVENANCE
    after = read_domain(result)
    assert (after.name, after.uuid, after.macs) == (change.new_name, NEW_UUID, change.new_macs)
    assert {d.target: d.path for d in after.disks if d.target in change.disk_paths} == change.disk_paths


@given(rewrites())
def test_change_of_nothing_adds_the_mark_alone(case: tuple[str, str, Change]) -> None:
    xml, _, _ = case
    marked = rewrite(xml, Change(read_domain(xml).name, PROVENANCE))
    assert OUR_METADATA.sub("", marked, count=1) == xml


@given(st.text(CHARACTERS), st.text(CHARACTERS))
def test_any_provenance_reads_back(name: str, host: str) -> None:
    provenance = replace(PROVENANCE, source_name=name, source_host=host)
    assert read_provenance(rewrite(SIMPLE, Change("a", provenance))) == provenance


def test_large_document_keeps_its_offsets() -> None:
    """Expat is fed in pieces of a megabyte."""
    filling = "<!-- é -->" * 250_000
    xml = SIMPLE.replace("<devices>", f"<devices>{filling}")
    result = rewrite(xml, Change("vm", PROVENANCE, disk_paths={"vda": "/srv/new.qcow2"}))
    assert OUR_METADATA.sub("", result, count=1) == xml.replace("/srv/a.qcow2", "/srv/new.qcow2")
