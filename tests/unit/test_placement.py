"""placement.py: which name a disk gets where names are cut, folded or too many to be told."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from typing import Any

import pytest
from cases import IDENTITY, IMAGES, Case, disk_xml, images, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.planning.facts import FilesystemAbilities, ImageFacts
from kvm_clone.planning.file_names import stems
from kvm_clone.planning.placement import Names, place

FAT = FilesystemAbilities(any_name=False, folds=True)


@pytest.mark.parametrize(
    ("file", "taken", "where", "final"),
    [
        ("web.qcow2", ("WEB.QCOW2",), {"abilities": FAT}, "web-vda.qcow2"),
        ("web.qcow2", ("WEB.QCOW2",), {}, "web.qcow2"),
        ("a:b?.qcow2", (), {"abilities": FAT}, "a_b_.qcow2"),
        ("a:b?.qcow2", ("A_b_.qcow2",), {"abilities": FAT}, "a_b_-vda.qcow2"),
        ("a:b?.qcow2", (), {}, "a:b?.qcow2"),
        ("web. ", (), {"abilities": FAT}, "web._"),
        ("x" * 250 + ".img", (), {"longest": 143}, "x" * 139 + ".img"),
        ("web.qcow2", ("web-1.qcow2",), {"more": True}, "web-vda-0123456789ab.qcow2"),
        ("web.qcow2", (), {"more": True, "longest": 143}, "web-vda-0123456789ab.qcow2"),
        ("x" * 250 + ".img", (), {"more": True}, "x" * 234 + "-vda-0123456789ab.img"),
    ],
)
def test_file_name_where_names_are_not_what_they_are_elsewhere(
    file: str, taken: tuple[str, ...], where: dict[str, Any], final: str
) -> None:
    (directory,) = images(*taken)
    case = Case(disk_xml(f"{IMAGES}/{file}".replace('"', "&quot;")), directories=(replace(directory, **where),))
    plan = case.plan()
    assert plan.refusal() is None
    assert [disk.final for disk in plan.disks] == [f"{IMAGES}/{final}"]


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=120)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    paths=st.lists(
        st.builds("/data/{}{}".format, NAMES, st.sampled_from(["", ".raw", ".tar.gz", "." + "y" * 30])),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    new=NAMES,
    crowded=st.booleans(),
    where=st.sampled_from([{}, {"longest": 143}, {"abilities": FAT}, {"more": True}]),
)
def test_every_name_that_a_disk_may_get_was_asked_for(
    paths: list[str], new: str, crowded: bool, where: dict[str, Any]
) -> None:
    """Else a directory of a million files would have to be told whole."""
    (directory,) = images()
    names = Names("disk", new, IDENTITY.operation)
    begins = tuple(one.casefold() for one in stems(paths, names.old, new))
    found: list[str] = []
    for number, path in enumerate(paths * (20 if crowded else 1)):
        here = replace(directory, names=frozenset(map(posixpath.basename, found)), **where)
        facts = replace(Case().facts().destination, directories={IMAGES: here})
        image = ImageFacts(path, "raw", target=f"vd{number}")
        source = replace(Case().facts(), destination=facts)
        placed, _ = place(source, options(pool="default"), names, None, (image,))
        found += [disk.final for disk in placed]
    assert len({one.casefold() if where.get("abilities") else one for one in found}) == len(found)
    assert all(posixpath.basename(one).casefold().startswith(begins) for one in found)
