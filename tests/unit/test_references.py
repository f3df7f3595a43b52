"""references/: what each kind of definition refers to, and that no absolute path goes unnamed.

KVM_CLONE_REGENERATE=1 writes the expected references anew; read their diff before keeping them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import pytest
from cases import domain_xml
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.definition.references import Reference, Role, references
from kvm_clone.definition.references.command_line import NAMESPACE
from kvm_clone.definition.references.rules import _RULES
from kvm_clone.errors import RefusedError

DATA = Path(__file__).parent.parent / "data"
CASES = sorted(path.name.removesuffix(".in.xml") for path in (DATA / "xml").glob("ref-*.in.xml"))


def read(case: str) -> str:
    return (DATA / "xml" / f"{case}.in.xml").read_text()


def printed(reference: Reference) -> str:
    flags = " made" * reference.made + " readonly" * reference.readonly
    return f"{reference.role}{flags} | {reference.kind} | {reference.where} | {reference.value}"


@pytest.mark.parametrize("case", CASES)
def test_the_references_of_each_kind(case: str) -> None:
    found = "".join(f"{printed(one)}\n" for one in references(read(case)))
    expected = DATA / "xml" / f"{case}.references"
    if os.environ.get("KVM_CLONE_REGENERATE"):
        expected.write_text(found)
    assert found == expected.read_text()


def test_the_corpus_has_every_role() -> None:
    found = {one.role for case in CASES for one in references(read(case))}
    assert found == set(Role)


def test_what_is_no_domain_is_refused() -> None:
    with pytest.raises(RefusedError):
        references("<network><name>x</name></network>")


# libvirt's own schema says where paths can be: each of those places has a rule.

PLACES = [line for line in (DATA / "libvirt-places.txt").read_text().splitlines() if not line.startswith("#")]

TYPES = {
    "devices/rng/backend": ' model="random"',
    "devices/tpm/backend/source": ' type="dir"',
    "devices/interface/source": ' type="direct"',
}
"""What an element has to say for its path to be one."""


def nested(place: str, value: str, at: dict[str, str]) -> str:
    """A domain with the value at the place, an attribute's or an element's text."""
    path, _, attribute = place.partition("@")
    tags = path.split("/")
    markup = "" if attribute else escape(value)
    for number, tag in reversed(list(enumerate(tags))):
        said = at.get("/".join(tags[: number + 1]), "")
        own = f" {attribute}={quoteattr(value)}" if attribute and number == len(tags) - 1 else ""
        markup = f"<{tag}{said}{own}>{markup}</{tag}>"
    return f"<domain><name>n</name>{markup}</domain>"


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_libvirts_schema_has_a_rule(place: str) -> None:
    found = [one for one in references(nested(place, "/some/where", TYPES)) if one.value == "/some/where"]
    assert len(found) == 1
    assert found[0].role is not Role.UNKNOWN


def test_no_row_hides_another() -> None:
    """Behind a row that always applies, one for the same attribute or text would never be taken."""
    for place, rules in _RULES.items():
        always = [not rule.when for rule in rules if rule.of is None]
        assert True not in always[:-1], place


# QEMU's own arguments.

ARGUMENTS = [
    # (option, value, what it refers to)
    ("-drive", "file=/a.raw,if=virtio", [("/a.raw", Role.DATA, "")]),
    ("--drive", "file=/a.raw,readonly=on", [("/a.raw", Role.DATA, "readonly")]),
    ("-drive", "file=/a.raw,snapshot=on", [("/a.raw", Role.DATA, "readonly")]),
    ("-drive", "media=cdrom,file=/a.iso", [("/a.iso", Role.DATA, "readonly")]),
    ("-drive", "file=/a,,b.raw,readonly", [("/a,b.raw", Role.DATA, "readonly")]),
    ("-drive", "file=/a=b.raw", [("/a=b.raw", Role.DATA, "")]),
    ("-drive", "file.filename=/a.raw,driver=qcow2", [("/a.raw", Role.DATA, "")]),
    ("-drive", "file=file:/a.raw", [("/a.raw", Role.DATA, "")]),
    ("-drive", 'file=json:{"driver":"file",,"filename":"/a.raw"}', [("/a.raw", Role.DATA, "")]),
    ("-drive", "file=a.raw", [("/a.raw", Role.DATA, "")]),
    ("-drive", "file=a,if=none", [("/a", Role.DATA, "")]),
    ("-drive", "file=fat:rw:dir", []),
    ("-hda", "disks/a", [("/disks/a", Role.DATA, "")]),
    ("-blockdev", '{"driver":"file","filename":"a"}', [("/a", Role.DATA, "")]),
    ("-blockdev", "driver=qcow2,node-name=a.b,file=c", []),
    ("-drive", "file=http://h/a.raw", []),
    ("-drive", "file=nbd+unix:///e?socket=/run/n.sock", [("/run/n.sock", Role.DATA, "")]),
    ("-blockdev", "driver=file,filename=/a.raw,node-name=/x", [("/a.raw", Role.DATA, ""), ("/x", Role.DATA, "")]),
    ("-blockdev", '{"driver":"file","filename":"/a.raw"}', [("/a.raw", Role.DATA, "")]),
    ("-blockdev", '{"driver":"nbd","server":{"type":"unix","path":"/n"}}', [("/n", Role.SOCKET, "")]),
    ("-blockdev", '{"driver":"quorum","children":[{"filename":"/a"},{"filename":"/b"}]}',
     [("/a", Role.DATA, ""), ("/b", Role.DATA, "")]),
    ("-blockdev", '{"driver":"file","filename":"/a.raw"', []),
    ("-blockdev", "{" * 100_000, []),
    ("-hdb", "/b.raw", [("/b.raw", Role.DATA, "")]),
    ("-cdrom", "/c.iso", [("/c.iso", Role.DATA, "readonly")]),
    ("-pflash", "/vars.fd", [("/vars.fd", Role.DATA, "")]),
    ("-kernel", "/vmlinuz", [("/vmlinuz", Role.FIRMWARE, "")]),
    ("-append", "/root", [("/root", Role.INERT, "")]),
    ("-fw_cfg", "name=opt/x,file=/x.json", [("/x.json", Role.FILE, "")]),
    ("-object", "memory-backend-file,id=m,mem-path=/dev/shm/m", [("/dev/shm/m", Role.DATA, "")]),
    ("-object", "secret,id=s,file=/key", [("/key", Role.FILE, "")]),
    ("-object", "tls-creds-x509,dir=/etc/pki/qemu", [("/etc/pki/qemu", Role.DIRECTORY, "")]),
    ("-device", "vfio-pci,host=0000:01:00.1", [("pci:0000:01:00.1", Role.HOST_DEVICE, "")]),
    ("-device", '{"driver":"vfio-pci","host":"01:00.1"}', [("pci:0000:01:00.1", Role.HOST_DEVICE, "")]),
    ("-device", "virtio-net,romfile=/r.rom,odd=/o", [("/r.rom", Role.FILE, ""), ("/o", Role.UNKNOWN, "")]),
    ("-chardev", "socket,id=c,path=/c.sock", [("/c.sock", Role.SOCKET, "")]),
    ("-chardev", "socket,id=c,path=/c.sock,server", [("/c.sock", Role.SOCKET, "made")]),
    ("-chardev", "file,id=c,path=/c.log,logfile=/l.log",
     [("/c.log", Role.OUTPUT, "made"), ("/l.log", Role.OUTPUT, "made")]),
    ("-chardev", "pipe,id=c,path=/c", [("/c", Role.PIPE, "")]),
    ("-serial", "/dev/ttyS0", [("/dev/ttyS0", Role.DEVICE, "")]),
    ("-serial", "file:/s.log", [("/s.log", Role.OUTPUT, "made")]),
    ("-monitor", "unix:/m.sock,server,nowait", [("/m.sock", Role.SOCKET, "made")]),
    ("-D", "/qemu.log", [("/qemu.log", Role.OUTPUT, "made")]),
    ("-virtfs", "local,path=/share,mount_tag=t", [("/share", Role.DIRECTORY, "")]),
    ("-netdev", "tap,id=n,script=/up,downscript=no", [("/up", Role.PROGRAM, "")]),
    ("-vnc", "unix:/v.sock", [("/v.sock", Role.SOCKET, "made")]),
    ("-odd", "/odd", [("/odd", Role.UNKNOWN, "")]),
    ("-no-reboot", "", []),
]  # fmt: skip


def command_line(*arguments: str) -> str:
    written = "".join(f"<qemu:arg value={quoteattr(one)}/>" for one in arguments)
    return f"<domain xmlns:qemu='{NAMESPACE}'><name>n</name><qemu:commandline>{written}</qemu:commandline></domain>"


@pytest.mark.parametrize(("option", "value", "expected"), ARGUMENTS)
def test_an_argument_of_qemu(option: str, value: str, expected: list[tuple[str, Role, str]]) -> None:
    whole, *found = references(command_line("-S", option, value))
    assert (whole.role, whole.value) == (Role.COMMAND_LINE, f"-S {option}")
    assert [(one.value, one.role, "made" * one.made + "readonly" * one.readonly) for one in found] == expected


def test_secrets_of_the_command_line_are_in_no_reference() -> None:
    xml = command_line("-object", "secret,id=s,data=hunter2", "-iscsi", "password=hunter2")
    assert "hunter2" not in repr(references(xml))


# The property: no absolute path goes unnamed.

WORDS = st.sampled_from(["a", "disk", "é", "b c", "x&y", "'q'", '"d"', "<z>", "dev", "images"])
PATHS = st.lists(WORDS, min_size=1, max_size=3).map(lambda words: "/" + "/".join(words))
NAMES = st.sampled_from(
    [
        "source",
        "disk",
        "serial",
        "widget",
        "path",
        "file",
        "dev",
        "log",
        "backingStore",
        "mirror",
        "dataStore",
        "metadata",
    ]
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["file", "dev", "path", "type", "mode", "odd", "name", "pool", "volume", "socket", "listen"]),
    st.one_of(PATHS, st.sampled_from(["file", "unix", "bind", "dev", "pipe", "block", "3"])),
    max_size=3,
)
PREFIXES = st.sampled_from(["", "", "", "qemu:", "x:"])


def _element(inside: st.SearchStrategy[list[str]]) -> st.SearchStrategy[str]:
    return st.builds(
        lambda prefix, name, attributes, text, below: (
            f"<{prefix}{name}{''.join(f' {key}={quoteattr(value)}' for key, value in attributes.items())}>"
            f"{escape(text)}{''.join(below)}</{prefix}{name}>"
        ),
        PREFIXES,
        NAMES,
        ATTRIBUTES,
        st.one_of(st.just(""), PATHS),
        inside,
    )


ELEMENTS = st.recursive(_element(st.just([])), lambda inner: _element(st.lists(inner, max_size=3)), max_leaves=8)
KNOWN = st.sampled_from(CASES).map(lambda case: re.sub(r"(?s).*?</os>\s*|</domain>\s*", "", read(case)))


@given(st.lists(st.one_of(ELEMENTS, KNOWN), max_size=4), st.lists(ELEMENTS, max_size=3))
def test_every_absolute_path_is_named(top: list[str], devices: list[str]) -> None:
    xml = (
        f"<domain odd='/odd' xmlns:qemu='{NAMESPACE}' xmlns:x='urn:x'><name>n</name>{''.join(top)}"
        f"<devices>{''.join(devices)}</devices><metadata><x:y path='/never'>/never</x:y></metadata></domain>"
    )
    named = {one.value for one in references(xml)}
    assert "/never" not in named
    wanted = set(absolute_paths(xml))
    assert wanted <= named, wanted - named


def absolute_paths(xml: str) -> list[str]:
    """Every attribute and text that is an absolute path, found by another parser than the one under test."""
    root = ElementTree.fromstring(xml)
    found = list(root.attrib.values())
    for top in root:
        for element in top.iter() if top.tag != "metadata" else ():
            texts = [element.text or "", *(child.tail or "" for child in element)]
            found += [value for value in (*element.attrib.values(), "".join(texts).strip()) if value.startswith("/")]
    return found


def test_places_are_told_apart() -> None:
    xml = domain_xml("<serial type='dev'><source path='/a'/></serial><serial type='dev'><source path='/a'/></serial>")
    assert [one.where for one in references(xml)] == [
        "devices/serial[0]/source@path",
        "devices/serial[1]/source@path",
    ]
    assert {one.owner for one in references(xml)} == {"devices/serial[0]", "devices/serial[1]"}
