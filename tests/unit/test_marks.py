"""ownership.py: marks and seals that come back as they were written, and what the definition's digest is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from cases import ONE_DISK, OTHER_UUID, UUID, domain_xml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_clone.definition import marks
from kvm_clone.definition.domain_xml import read_domain
from kvm_clone.definition.marks import Provenance, Seal, definition_digest, mark_markup, read_provenance, read_seal
from kvm_clone.definition.rewrite import Change, rewrite
from kvm_clone.errors import RefusedError

MARK = Provenance("0f", OTHER_UUID, "kc-a", UUID, "web", "xml=1;vda=1:2:3", "1.0", "2026-01-01T00:00:00", True)
FULL = replace(
    MARK, macs="aa=11 bb=22", consistency="filesystem", frozen="0.120", scratch="4096", checkpoint="kvm-clone.x.0f"
)
SEAL = Seal("0123456789abcdef", {"vda": "1:2:3:4:5", "vdb": "1:3:3:4:5"})


def as_libvirt_prints(seal: Seal) -> str:
    """virDomainSetMetadata puts the prefix and the namespace in."""
    markup = marks.seal_markup(seal).replace("<replica ", f'<s:replica xmlns:s="{marks.SEAL_NAMESPACE}" ')
    return markup.replace("</replica>", "</s:replica>").replace("<image ", "<s:image ")


def domain(metadata: str = "", name: str = "web", devices: str = ONE_DISK) -> str:
    xml = domain_xml(devices).replace("NAME", name)
    return xml.replace("<memory>", f"<metadata>{metadata}</metadata><memory>") if metadata else xml


@pytest.mark.parametrize(
    "mark", [MARK, FULL, replace(MARK, verified=False), replace(MARK, source_name="a 'b' \"c\" &<")]
)
def test_a_mark_comes_back_as_it_was_written(mark: Provenance) -> None:
    assert read_provenance(domain(mark_markup(mark))) == mark


def test_a_mark_says_only_what_there_is_to_say() -> None:
    """What a clone at rest has no use for is not in its definition."""
    plain = mark_markup(MARK)
    optional = {part.name for part in fields(Provenance)} - marks._ALWAYS
    assert optional == {"macs", "consistency", "frozen", "scratch", "checkpoint"}
    assert [name for name in optional if f"{name}=" in plain] == []
    assert [name for name in optional if f"{name}=" not in mark_markup(FULL)] == []
    assert 'source-name=""' in mark_markup(replace(MARK, source_name="")), "what every mark has is there, even empty"


@pytest.mark.parametrize("part", sorted(marks._ALWAYS))
def test_half_a_mark_is_none(part: str) -> None:
    attribute = part.replace("_", "-")
    damaged = mark_markup(FULL).replace(f' {attribute}="', f' other-{attribute}="')
    assert damaged != mark_markup(FULL)
    assert read_provenance(domain(damaged)) is None


def test_mac_pairs() -> None:
    assert FULL.mac_pairs == {"aa": "11", "bb": "22"}
    assert MARK.mac_pairs == {}
    assert replace(MARK, macs="aa= broken bb=22").mac_pairs == {"aa": "", "bb": "22"}


SEALS = st.builds(
    Seal,
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.dictionaries(st.text("abvdx0123 '\"&<>", min_size=1), st.text("0123456789:'\"&<>\t\n")),
)


@settings(max_examples=50, deadline=None)
@given(SEALS)
def test_a_seal_comes_back_as_it_was_written(seal: Seal) -> None:
    assert read_seal(domain(as_libvirt_prints(seal))) == seal


def test_what_is_pending_comes_back_as_it_was_written() -> None:
    pending = marks.Pending("0f", ("/a & b", "/c"), ("monday",), {"/c": "1:2:3"})
    assert marks.read_pending(domain(marks.pending_markup(pending))) == pending


def test_a_domain_without_a_seal() -> None:
    for metadata in ("", "<other/>", mark_markup(MARK), "<replica/>"):
        assert read_seal(domain(metadata)) is None
    assert read_provenance(domain(as_libvirt_prints(SEAL))) is None


def test_a_domain_without_disks_can_be_sealed() -> None:
    assert read_seal(domain(as_libvirt_prints(Seal("0f", {})))) == Seal("0f", {})


@pytest.mark.parametrize("read", [read_provenance, read_seal, definition_digest])
def test_what_is_no_domain(read: Callable[[str], object]) -> None:
    with pytest.raises(RefusedError):
        read("<network><name>default</name></network>")


TOOL = '<t:app xmlns:t="urn:t">kept</t:app>'
PRETTY = domain(TOOL).replace("><", ">\n   <")

SAME: dict[str, str] = {
    "another name": domain(name="copy"),
    "our mark": domain(mark_markup(MARK)),
    "a seal": domain(as_libvirt_prints(SEAL)),
    "both": domain(mark_markup(FULL) + as_libvirt_prints(SEAL)),
    "space between elements": domain().replace("><", ">\n  <"),
    "metadata that is empty": domain(" "),
    "the mark as we write it": rewrite(domain(), Change("copy", MARK)),
}


@pytest.mark.parametrize("what", SAME)
def test_the_digest_of_a_definition_stays_with(what: str) -> None:
    assert SAME[what] != domain()
    assert definition_digest(SAME[what]) == definition_digest(domain())


BESIDE: dict[str, str] = {
    "our mark": domain(TOOL + mark_markup(MARK)),
    "a seal before it": domain(as_libvirt_prints(SEAL) + TOOL),
    "space": PRETTY,
    "space and both": PRETTY.replace(TOOL, f"{mark_markup(FULL)}\n\t{as_libvirt_prints(SEAL)}\n {TOOL}"),
    "another name": domain(TOOL, name="copy"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_beside_other_tools_metadata_it_stays_with(what: str) -> None:
    assert definition_digest(BESIDE[what]) == definition_digest(domain(TOOL))


OTHERWISE: dict[str, str] = {
    "memory": domain().replace("1024", "2048"),
    "a disk's file": domain().replace("web.qcow2", "snapshot.qcow2"),
    "a disk more": domain(devices=ONE_DISK + ONE_DISK.replace("vda", "vdb")),
    "another UUID": domain().replace(UUID, OTHER_UUID),
    "another tool's metadata": domain(TOOL),
    "a title": domain().replace("<memory>", "<title>x</title><memory>"),
    "space within a text": domain().replace("<os>", "<title>x </title><os>"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_the_digest_of_a_definition_changes_with(what: str) -> None:
    assert definition_digest(OTHERWISE[what]) != definition_digest(domain())


def test_different_changes_have_different_digests() -> None:
    assert len({definition_digest(xml) for xml in OTHERWISE.values()}) == len(OTHERWISE)
    assert len({definition_digest(domain(TOOL.replace("kept", text))) for text in ("one", "two")}) == 2


def test_what_a_seal_seals_is_what_a_sync_reads() -> None:
    """The seal itself must not break the seal."""
    plain = rewrite(domain(TOOL), Change("copy", MARK))
    seal = Seal(definition_digest(plain), SEAL.images)
    sealed = plain.replace("</metadata>", f"{as_libvirt_prints(seal)}</metadata>")
    found = read_seal(sealed)
    assert found is not None
    assert found.definition == definition_digest(sealed)
    assert read_domain(sealed).disks == read_domain(plain).disks
