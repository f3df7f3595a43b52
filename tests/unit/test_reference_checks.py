"""reference_checks.py: what is said of each kind of reference, and that what is not known is said too."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cases import GIB, ONE_DISK, PLENTY, Case, existing, replica

from kvm_clone.definition.references.command_line import NAMESPACE
from kvm_clone.findings import Finding, Severity
from kvm_clone.planning import reference_checks
from kvm_clone.planning.things import HugePages, Objects

BLOCKING, WARNING, INFO = Severity.BLOCKING, Severity.WARNING, Severity.INFO
Expected = tuple[tuple[str, Severity, tuple[str, ...]], ...]
NOTHING: Expected = ()


@dataclass(frozen=True)
class Said:
    """A definition, what the hosts have of it, and the findings: code, severity, and words of the text."""

    devices: str
    findings: Expected = ()
    facts: dict[str, Any] = field(default_factory=dict)


def one(code: str, *words: str, severity: Severity = WARNING) -> Expected:
    return ((code, severity, words),)


def arguments(*values: str) -> str:
    """QEMU's own arguments; the domain of cases.py ends its devices before them."""
    inside = "".join(f"<q:arg value='{value}'/>" for value in values)
    return f"</devices><q:commandline xmlns:q='{NAMESPACE}'>{inside}</q:commandline><devices>"


def around(markup: str) -> str:
    """Elements that are no devices."""
    return f"</devices>{markup}<devices>"


SERIAL = "<serial type='%s'><source %s/></serial>"
UNIX = SERIAL % ("unix", "mode='connect' path='/run/u.sock'")
LOG = SERIAL % ("file", "path='/log/web.log'")
FILTERED = "<interface type='user'><filterref filter='f'/></interface>"
KEPT = "<disk type='%s' device='%s'><source %s/><target dev='sda'/>%s</disk>"
DRIVE = arguments("-drive", "file=/srv/b.raw")
COMMAND_LINE = ("command-line", WARNING, ("-drive",))

CASES: dict[str, Said] = {
    "nothing": Said(""),
    # paths that have to be there
    "a socket that is there": Said(UNIX),
    "no socket": Said(UNIX, one("path-missing", "kc-b", "/run/u.sock", "devices/serial[0]/source@path"),
                      {"there": {"/run/u.sock": "missing"}}),
    "a socket nobody can tell of": Said(UNIX, one("not-checked", "/run/u.sock"), {"there": {"/run/u.sock": "unknown"}}),
    "another kind of thing": Said(UNIX, one("path-differs", "socket on kc-a", "file on kc-b"),
                                  {"here": {"/run/u.sock": "socket"}, "there": {"/run/u.sock": "file"}}),
    "a socket that the source lacks": Said(UNIX, NOTHING, {"here": {"/run/u.sock": "missing"}}),
    "no directory to share": Said(
        "<filesystem><source dir='/srv/s'/><target dir='/mnt'/></filesystem>",
        (("filesystem", WARNING, ()), *one("path-missing", "/srv/s")), {"there": {"/srv/s": "missing"}}),
    "no ACPI table": Said("", one("path-missing", "/slic.bin"),
                          {"os": "<acpi><table>/slic.bin</table></acpi>", "there": {"/slic.bin": "missing"}}),
    "no kernel": Said("", one("boot-file-missing", "/vmlinuz", severity=BLOCKING),
                      {"os": "<kernel>/vmlinuz</kernel>", "there": {"/vmlinuz": "missing"}}),
    "no shim": Said("", one("boot-file-missing", "/shim", severity=BLOCKING),
                    {"os": "<shim>/shim</shim>", "there": {"/shim": "missing"}}),
    "a kernel nobody can tell of": Said(
        "", one("not-checked", "/vmlinuz"),
        {"os": "<kernel>/vmlinuz</kernel>", "there": {"/vmlinuz": "unknown"}, "present": ("/vmlinuz",)}),
    "the emulator is checked elsewhere": Said(
        "<emulator>/usr/bin/qemu</emulator>", NOTHING, {"there": {"/usr/bin/qemu": "missing"}}),
    "no numad": Said(around("<numatune><memory placement='auto'/></numatune>"), one("path-missing", "/usr/bin/numad"),
                     {"there": {"/usr/bin/numad": "missing"}}),
    # what comes with the start
    "a log": Said(LOG),
    "no directory for a log": Said(LOG, one("path-missing", "no directory /log"), {"there": {"/log": "missing"}}),
    "a file for a directory": Said(LOG, one("path-missing", "no directory /log"), {"there": {"/log": "file"}}),
    "a directory nobody can tell of": Said(LOG, one("not-checked", "/log"), {"there": {"/log": "unknown"}}),
    "a log that is there": Said(LOG, one("path-exists", "/log/web.log"), {"there": {"/log/web.log": "file"}}),
    "another VM's log": Said(
        LOG, one("path-renamed", "VM other", "gets /log/web-2.log", severity=INFO),
        {"objects": Objects(used={"/log/web.log": frozenset({"other"})})}),
    "another VM's disk for a log": Said(
        LOG, one("path-renamed", "VM other", "/log/web-2.log", severity=INFO),
        {"paths_in_use": {"/log/web.log": frozenset({"other", "web"})}}),
    "its own log, as the uses have it": Said(LOG, NOTHING, {"paths_in_use": {"/log/web.log": frozenset({"web"})}}),
    "its own log": Said(LOG, NOTHING, {"objects": Objects(used={"/log/web.log": frozenset({"web"})})}),
    "another VM's socket in QEMU's arguments": Said(
        arguments("-monitor", "unix:/run/m.sock,server"),
        (("command-line", WARNING, ()), *one("shared", "VM other", "/run/m.sock")),
        {"objects": Objects(used={"/run/m.sock": frozenset({"other"})})}),
    # content
    "a second disk": Said(DRIVE, (COMMAND_LINE, *one("data-not-copied", "/srv/b.raw", severity=BLOCKING)),
                          {"here": {"/srv/b.raw": "file"}}),
    "a second device": Said(DRIVE, (COMMAND_LINE, *one("data-not-copied", severity=BLOCKING)),
                            {"here": {"/srv/b.raw": "block"}}),
    "a second disk that is there": Said(
        DRIVE, (COMMAND_LINE, *one("data-not-copied", severity=BLOCKING)),
        {"here": {"/srv/b.raw": "file"}, "there": {"/srv/b.raw": "file"}}),
    "a second disk that the source lacks": Said(
        DRIVE, (COMMAND_LINE, *one("path-missing", "kc-a lacks /srv/b.raw")), {"here": {"/srv/b.raw": "missing"}}),
    "a second disk nobody can tell of": Said(
        DRIVE, (COMMAND_LINE, *one("data-not-known", "/srv/b.raw", severity=BLOCKING)),
        {"here": {"/srv/b.raw": "unknown"}}),
    "a read-only second disk": Said(
        arguments("-drive", "file=/srv/b.raw,readonly=on"), (COMMAND_LINE,), {"here": {"/srv/b.raw": "file"},
                                                                              "there": {"/srv/b.raw": "file"}}),
    "no read-only second disk": Said(
        arguments("-drive", "file=/srv/b.raw,readonly=on"), (COMMAND_LINE, *one("path-missing", "kc-b")),
        {"here": {"/srv/b.raw": "file"}, "there": {"/srv/b.raw": "missing"}}),
    "once read-only, once not": Said(
        arguments("-drive", "file=/srv/b.raw,readonly=on", "-drive", "file=/srv/b.raw"),
        (COMMAND_LINE, *one("data-not-copied", severity=BLOCKING)),
        {"here": {"/srv/b.raw": "file"}, "there": {"/srv/b.raw": "file"}}),
    "a directory as a disk": Said(
        arguments("-drive", "file=fat:/srv/d"), (COMMAND_LINE, *one("path-missing", "/srv/d")),
        {"here": {"/srv/d": "directory"}, "there": {"/srv/d": "missing"}}),
    "a pstore": Said("<pstore><path>/p</path></pstore>", one("data-not-copied", "/p", severity=BLOCKING),
                     {"here": {"/p": "file"}}),
    "a pstore that is yet to be made": Said("<pstore><path>/p/a</path></pstore>", one("path-missing", "directory /p"),
                                            {"here": {"/p/a": "missing"}, "there": {"/p": "missing"}}),
    "persistent memory": Said(
        "<memory model='nvdimm'><source><path>/nv</path></source></memory>", one("memory", severity=BLOCKING),
        {"here": {"/nv": "file"}}),
    # what no rule knows
    "an unknown file": Said(
        "<w path='/srv/w'/>", one("data-not-copied", "/srv/w", "devices/w[0]@path", severity=BLOCKING),
        {"here": {"/srv/w": "file"}}),
    "an unknown file of a package": Said("<w path='/usr/share/w'/>", one("unknown-reference", "/usr/share/w", "a file"),
                                         {"here": {"/usr/share/w": "file"}}),
    "an unknown path": Said("<w path='/srv/w'/>", one("unknown-reference", "/srv/w", "missing"),
                            {"here": {"/srv/w": "missing"}, "there": {"/srv/w": "missing"}}),
    "an unknown namespace": Said(around("<x:y xmlns:x='urn:x'/>"), one("unknown-reference", "urn:x")),
    "capabilities of QEMU": Said(
        around(f"<q:capabilities xmlns:q='{NAMESPACE}'><q:add capability='c'/></q:capabilities>"),
        one("command-line", "c")),
    # libvirt's objects
    "no filter": Said(FILTERED, one("nwfilter-missing", "f"),
                      {"objects": Objects(filters=frozenset({"g"}))}),
    "a filter": Said(FILTERED, NOTHING,
                     {"objects": Objects(filters=frozenset({"f"}))}),
    "no driver for filters": Said(FILTERED, one("not-checked", "f")),
    "no secret": Said(
        "<hostdev><source protocol='iscsi'><auth><secret type='iscsi' usage='u'/></auth></source></hostdev>",
        (("hostdev", WARNING, ()), *one("secret-missing", "iscsi/u")), {"objects": Objects(secrets=frozenset())}),
    "no port group": Said("<interface type='network'><source network='default' portgroup='p'/></interface>",
                          one("portgroup-missing", "default/p"), {"objects": Objects(portgroups=frozenset())}),
    "no network to listen in": Said("<graphics type='vnc'><listen type='network' network='n'/></graphics>",
                                    one("network-missing", "n")),
    "a network to listen in": Said("<graphics type='vnc'><listen type='network' network='default'/></graphics>"),
    "no security driver": Said(around("<seclabel model='selinux'/>"), one("seclabel-missing", "selinux"),
                               {"objects": Objects(secmodels=frozenset({"none"}))}),
    "no volume": Said("<filesystem><source pool='p' volume='v'/></filesystem>",
                      (("filesystem", WARNING, ()), *one("volume-missing", "p/v", "no such pool")),
                      {"objects": Objects(volumes={"p/v": "no such pool"})}),
    "a volume": Said("<filesystem><source pool='p' volume='v'/></filesystem>", one("filesystem"),
                     {"objects": Objects(volumes={"p/v": ""})}),
    "a volume nobody looked up": Said("<filesystem><source pool='p' volume='v'/></filesystem>",
                                      (("filesystem", WARNING, ()), *one("not-checked", "p/v"))),
    # the kernel's
    "no network device": Said("<interface type='direct'><source dev='e9'/></interface>",
                              (("interface-direct", WARNING, ()), *one("interface-missing", "e9")),
                              {"there": {"/sys/class/net/e9": "missing"}}),
    "no PCI device": Said(
        "<hostdev type='pci'><source><address domain='0' bus='6' slot='0' function='1'/></source></hostdev>",
        (("hostdev", WARNING, ()), *one("host-device-missing", "pci:0000:06:00.1")),
        {"there": {"/sys/bus/pci/devices/0000:06:00.1": "missing"}}),
    "a PCI device nobody can tell of": Said(
        "<hostdev type='pci'><source><address domain='0' bus='6' slot='0' function='1'/></source></hostdev>",
        (("hostdev", WARNING, ()), *one("not-checked", "pci:0000:06:00.1")),
        {"there": {"/sys/bus/pci/devices/0000:06:00.1": "unknown"}}),
    "no USB device": Said(
        "<hostdev type='usb'><source><vendor id='1'/><product id='2'/></source></hostdev>",
        (("hostdev", WARNING, ()), *one("host-device-missing", "0001:0002"))),
    "a USB device": Said("<hostdev type='usb'><source><vendor id='0x1234'/><product id='0x5678'/></source></hostdev>",
                         one("hostdev")),
    "no partition": Said(
        around("<resource><partition>/p</partition></resource>"), one("cgroup-missing", "/p"),
        {"there": {f"/sys/fs/cgroup{below}/{name}": "missing"
                   for below in ("", "/cpu", "/systemd") for name in ("p.slice", "p.partition", "p")}}),
    "the usual partition": Said(around("<resource><partition>/machine</partition></resource>")),
    "another address": Said("<graphics type='vnc' listen='10.0.0.1'/>", one("address-missing", "10.0.0.1")),
    "any address": Said("<graphics type='vnc' listen='0.0.0.0'/>"),
    "a name as an address": Said("<graphics type='vnc' listen='here'/>", one("not-checked", "here")),
    # CPUs and memory
    "huge pages": Said(around("<memoryBacking><hugepages/></memoryBacking>")),
    "too few huge pages": Said(around("<memoryBacking><hugepages/></memoryBacking>"),
                               one("hugepages-missing", "0 huge pages of 2.0 MiB", "1.0 MiB"),
                               {"resources": replace(PLENTY, hugepages={2048: HugePages(0, 0)})}),
    "no huge pages of a size": Said(
        around("<memoryBacking><hugepages><page size='1' unit='G'/></hugepages></memoryBacking>"),
        one("hugepages-missing", "1.0 GiB")),
    "huge pages of two sizes": Said(
        around("<memoryBacking><hugepages><page size='1' unit='G'/><page size='2048'/></hugepages></memoryBacking>"),
        NOTHING, {"resources": replace(PLENTY, hugepages={2048: HugePages(1, 0), GIB >> 10: HugePages(1, 0)})}),
    "no hugetlbfs": Said(around("<memoryBacking><hugepages/></memoryBacking>"), one("hugepages-missing", "hugetlbfs"),
                         {"resources": replace(PLENTY, hugetlbfs=False)}),
    "no NUMA node": Said(around("<numatune><memory nodeset='0-2,^0'/></numatune>"), one("numa-missing", "NUMA node 2")),
    "NUMA nodes": Said(around("<numatune><memory nodeset='0-1'/></numatune>")),
    "nodes nobody can tell of": Said(around("<numatune><memory nodeset='0'/></numatune>"), one("not-checked"),
                                     {"resources": replace(PLENTY, nodes=None)}),
    "a set that is none": Said(around("<numatune><memory nodeset='x'/></numatune>"), one("not-checked")),
    "no such CPUs": Said(around("<cputune><vcpupin cpuset='4-99'/></cputune>"),
                         one("cpuset-missing", "CPU 8, 9, 10, 11, 12, 13, 14, 15, …")),
    # what two cannot share
    "another VM's CID": Said("<vsock><cid auto='no' address='3'/></vsock>", one("shared", "VM other", "vsock CID 3"),
                             {"objects": Objects(used={"vsock CID 3": frozenset({"other", "web"})})}),
    "its own CID": Said("<vsock><cid auto='no' address='3'/></vsock>", NOTHING,
                        {"objects": Objects(used={"vsock CID 3": frozenset({"web"})})}),
    "another VM's pipe": Said(SERIAL % ("pipe", "path='/p'"), one("shared", "/p"),
                              {"objects": Objects(used={"/p": frozenset({"other"})})}),
    "no pipe": Said(SERIAL % ("pipe", "path='/p'"), one("path-missing", "/p"), {"there": {"/p": "missing"}}),
    # what is only told
    "SMBIOS": Said("", one("host-tied", "SMBIOS"), {"os": "<smbios mode='host'/>"}),
    "a server": Said("<redirdev type='tcp'><source mode='connect' host='h' service='1'/></redirdev>",
                     one("server", "h", severity=INFO)),
    "free text": Said(around("<title>/t</title>")),
    # disks that are kept
    "no block medium": Said(KEPT % ("block", "cdrom", "dev='/dev/sr9'", ""), one("medium-missing", "/dev/sr9", "sda"),
                            {"there": {"/dev/sr9": "missing"}}),
    "no volume medium": Said(KEPT % ("volume", "cdrom", "pool='p' volume='v'", ""),
                             one("medium-missing", "p/v", "no such volume"),
                             {"objects": Objects(volumes={"p/v": "no such volume"})}),
    "no directory medium": Said(KEPT % ("dir", "floppy", "dir='/d'", ""), one("medium-missing", "/d"),
                                {"there": {"/d": "missing"}}),
    "a medium nobody can tell of": Said(
        KEPT % ("file", "cdrom", "file='/a.iso'", ""), one("not-checked", "/a.iso"),
        {"there": {"/a.iso": "unknown"}, "present": ("/a.iso",)}),
    "a medium of a server": Said(
        KEPT % ("network", "cdrom", "protocol='http' name='i'", ""), one("server", "i", severity=INFO)),
    "no shared block disk": Said(
        KEPT % ("block", "disk", "dev='/dev/s'", "<shareable/>"),
        one("referenced-disk-missing", "/dev/s", "shared", severity=BLOCKING), {"there": {"/dev/s": "missing"}}),
    "no read-only volume": Said(
        KEPT % ("volume", "disk", "pool='p' volume='v'", "<readonly/>"),
        one("referenced-disk-missing", "p/v", severity=BLOCKING), {"objects": Objects(volumes={"p/v": "gone"})}),
    "no image below a read-only disk": Said(
        KEPT % ("file", "disk", "file='/a'", "<readonly/><backingStore><source file='/b'/></backingStore>"),
        (("referenced-disk", WARNING, ()), *one("path-missing", "/b")),
        {"present": ("/a",), "here": {"/b": "file"}, "there": {"/b": "missing"}}),
    "an image below a read-only disk": Said(
        KEPT % ("file", "disk", "file='/a'", "<readonly/><backingStore><source file='/b'/></backingStore>"),
        one("referenced-disk"), {"present": ("/a",), "here": {"/b": "file"}, "there": {"/b": "file"}}),
    "no secret of a read-only disk": Said(
        KEPT % ("file", "disk", "file='/a'", "<readonly/><encryption><secret uuid='s'/></encryption>"),
        (("referenced-disk", WARNING, ()), *one("secret-missing", "s")),
        {"present": ("/a",), "objects": Objects(secrets=frozenset())}),
    "a label of an own disk": Said(
        "<disk type='file'><source file='/a'><seclabel model='dac'/></source><target dev='vdb'/></disk>",
        one("seclabel-missing", "dac"), {"objects": Objects(secmodels=frozenset())}),
}  # fmt: skip


def findings(said: Said) -> tuple[Finding, ...]:
    return Case(devices=ONE_DISK + said.devices, **said.facts).plan().findings


@pytest.mark.parametrize("what", CASES)
def test_what_is_said(what: str) -> None:
    found = findings(CASES[what])
    assert sorted((one.code, one.severity) for one in found) == sorted((c, s) for c, s, _ in CASES[what].findings)
    for code, _, words in CASES[what].findings:
        (text,) = [one.text for one in found if one.code == code]
        for word in words:
            assert word in text
        assert text.endswith(".")
    assert all(one.remedy for one in found if one.severity is not INFO and one.code not in _WITHOUT_REMEDY)


_WITHOUT_REMEDY = ("hostdev", "filesystem", "interface-direct", "referenced-disk", "memory")


def test_every_code_is_in_the_table() -> None:
    written = set()
    for node in ast.walk(ast.parse(Path(str(reference_checks.__file__)).read_text())):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if called and node.func.id in ("block", "_warn", "Finding") and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
            written.add(node.args[0].value)  # type: ignore[attr-defined]
    assert len(written) > 8
    assert written <= {code for said in CASES.values() for code, _, _ in said.findings}


def test_what_a_finished_replica_writes_to_is_no_news() -> None:
    case = Case(devices=ONE_DISK + LOG, there={"/log/web.log": "file"}, existing=existing())
    assert "path-exists" not in [one.code for one in case.plan().findings]


def test_one_thing_is_said_once() -> None:
    case = Case(devices=ONE_DISK + UNIX + UNIX, there={"/run/u.sock": "missing"})
    assert [one.code for one in case.plan().findings] == ["path-missing"]


def test_a_sync_says_the_same() -> None:
    said = CASES["no socket"]
    case = Case(devices=ONE_DISK + said.devices, **said.facts)
    plan = replace(case, existing=replica(case.facts())).sync()
    assert [one.code for one in plan.findings] == ["path-missing"]
    assert plan.steps
