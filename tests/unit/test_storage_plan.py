"""storage.py as tables: what the filesystems that disks land on can hold, and what they lack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import (
    GIB,
    IMAGES,
    ONE_DISK,
    REPLICA_IMAGE,
    Case,
    disk_xml,
    images,
    options,
    replica,
    running,
    staged,
    staged_disk,
)

from kvm_clone.findings import Severity
from kvm_clone.options import Retry
from kvm_clone.planning.assets import Place
from kvm_clone.planning.decide import SYNC
from kvm_clone.planning.domain_facts import Pool
from kvm_clone.planning.facts import Directory, FilesystemAbilities, ImageFacts
from kvm_clone.planning.placement import PlannedDisk
from kvm_clone.planning.storage import storage_findings, to_write

B, W = Severity.BLOCKING, Severity.WARNING

RAW_DISK = disk_xml(f"{IMAGES}/web.raw", format_="raw")
DIRECT = ONE_DISK.replace("type='qcow2'/>", "type='qcow2' cache='none'/>")
FAT = FilesystemAbilities(naming="rename", owners=False, modes=False, sparse=False, largest=4 * GIB - 1)


def case(devices: str = ONE_DISK, *, image: dict[str, Any] | None = None, free: int = 1 << 40, **can: Any) -> Case:
    """A clone into a directory that can `can`."""
    (directory,) = images()
    return Case(
        devices, image=image or {}, directories=(replace(directory, free=free, abilities=FilesystemAbilities(**can)),)
    )


Seen = tuple[str, str, Severity]

FINDINGS: dict[str, tuple[Case, list[Seen]]] = {
    "a filesystem that can everything": (case(), []),
    "one without hard links": (case(naming="rename"), []),
    "one where no file gets a name": (case(naming=""), [("no-links", IMAGES, B)]),
    "one where no file can be made": (
        case(naming="", owners=False, trouble="Input/output error"),
        [("storage", IMAGES, B)],
    ),
    "one without owners": (case(owners=False), [("owner", IMAGES, W)]),
    "one without modes": (case(modes=False), [("mode", IMAGES, W)]),
    "two disks on one without owners": (
        case(ONE_DISK + disk_xml(f"{IMAGES}/b.qcow2", "vdb"), owners=False),
        [("owner", IMAGES, W)],
    ),
    "a file that is too large": (
        case(RAW_DISK, image={"virtual_size": 5 * GIB, "data": 0}, largest=4 * GIB - 1),
        [("file-size", "vda", B)],
    ),
    "a file that is just not too large": (
        case(RAW_DISK, image={"virtual_size": 4 * GIB - 512}, largest=4 * GIB - 1),
        [],
    ),
    "a qcow2 file that is too large": (
        case(image={"virtual_size": 9 * GIB, "data": 5 * GIB}, largest=4 * GIB - 1),
        [("file-size", "vda", B)],
    ),
    "a qcow2 file that will be too large": (
        case(image={"virtual_size": 9 * GIB, "data": GIB}, largest=4 * GIB - 1),
        [("file-size-later", "vda", W)],
    ),
    "a disk past the page cache where there is such a thing": (case(DIRECT), []),
    "a disk past the page cache where there is none": (case(DIRECT, direct=False), [("direct", "vda", W)]),
    "no disk past the page cache": (case(direct=False), []),
    "by native I/O": (
        case(ONE_DISK.replace("type='qcow2'/>", "type='qcow2' io='native'/>"), direct=False),
        [("direct", "vda", W)],
    ),
    "no room for what the source's filesystem compresses": (
        case(image={"data": 100, "allocated": 1}, free=114),
        [("space", IMAGES, B)],
    ),
    "room for it": (case(image={"data": 100, "allocated": 1}, free=115), []),
    "no room without sparse files": (
        case(RAW_DISK, image={"virtual_size": GIB, "data": 100}, free=GIB, sparse=False),
        [("space", IMAGES, B)],
    ),
    "everything at once": (
        replace(
            case(RAW_DISK.replace("type='raw'/>", "type='raw' io='native'/>"), image={"virtual_size": 5 * GIB}),
            directories=(
                replace(images()[0], free=GIB, abilities=replace(FAT, naming="", direct=False)),
            ),
        ),
        [
            ("no-links", IMAGES, B),
            ("owner", IMAGES, W),
            ("mode", IMAGES, W),
            ("file-size", "vda", B),
            ("direct", "vda", W),
            ("space", IMAGES, B),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FINDINGS)
def test_findings(what: str) -> None:
    given, expected = FINDINGS[what]
    plan = given.plan()
    assert [(one.code, one.subject, one.severity) for one in plan.findings] == expected
    assert (plan.refusal() is None) == (not any(severity is B for _, _, severity in expected))
    assert all(one.remedy and one.text.endswith(".") for one in plan.findings)


def test_a_sync_is_told_the_same() -> None:
    given = case(DIRECT, image={"virtual_size": GIB}, owners=False, direct=False)
    plan = replace(given, existing=replica(given.facts())).sync()
    assert [one.code for one in plan.findings] == ["owner", "direct"]


@pytest.mark.parametrize(("format_", "code"), [("raw", "file-size"), ("qcow2", "file-size-later")])
def test_a_replica_that_grows_too_large(format_: str, code: str) -> None:
    """It is the replica's own file that counts, not the overlay on it."""
    given = case(image={"virtual_size": 5 * GIB, "data": GIB}, largest=4 * GIB - 1)
    base = replace(REPLICA_IMAGE, path=f"{IMAGES}/replica.{format_}", format=format_, virtual_size=GIB)
    plan = replace(given, existing=replica(given.facts(), base)).sync()
    assert [one.code for one in plan.findings] == [code]


def test_room_is_not_counted_before_the_existing_vm_has_gone() -> None:
    given = case(image={"data": 100}, free=1)
    assert [one.code for one in storage_findings(given.facts(), given.plan().disks)] == ["space"]
    assert not list(storage_findings(given.facts(), given.plan().disks, room=False))


def test_each_filesystem_is_counted_for_itself() -> None:
    """Two directories of one filesystem share its room."""
    devices = disk_xml("/one/a.qcow2") + disk_xml("/two/b.qcow2", "vdb")
    pools = (Pool("one", "dir", "/one", active=True), Pool("two", "dir", "/two", active=True))
    for filesystems, free, expected in (((0, 0), 229, ["space"]), ((0, 0), 230, []), ((0, 1), 115, [])):
        directories = tuple(
            Directory(path, True, True, free, filesystem=number)
            for path, number in zip(("/one", "/two"), filesystems, strict=True)
        )
        plan = Case(devices, image={"data": 100}, pools=pools, directories=directories).plan()
        assert [one.code for one in plan.findings] == expected


# How much will be written.

IMAGE = ImageFacts(f"{IMAGES}/web", "qcow2", target="vda", virtual_size=1000, allocated=1, data=400)
RAW = replace(IMAGE, format="raw")
COMPRESSED = replace(IMAGE, stored=150)
BASE = replace(IMAGE, path=f"{IMAGES}/replica", data=300)
RAW_BASE = replace(BASE, format="raw", virtual_size=900)
KEPT = staged_disk(data=250, allocated=260, durable=100)


def planned(image: ImageFacts, **how: Any) -> PlannedDisk:
    return PlannedDisk(image, Place(IMAGES, "final"), **how)


ROOM: dict[str, tuple[PlannedDisk, int, int]] = {
    # what, bytes where holes take no room, bytes where they do
    "a qcow2 image": (planned(IMAGE), 400, 400),
    "a qcow2 image that stays compressed": (planned(COMPRESSED), 150, 150),
    "a raw image": (planned(RAW), 400, 1000),
    "an empty one": (planned(replace(RAW, data=0)), 0, 1000),
    "a qcow2 image that is gone on with": (planned(IMAGE, staged=KEPT), 150, 150),
    "a compressed one, uncompressed from there on": (planned(COMPRESSED, staged=KEPT), 150, 150),
    "a raw image that is gone on with": (planned(RAW, staged=KEPT), 150, 740),
    "one that has everything": (planned(IMAGE, staged=replace(KEPT, data=500)), 0, 0),
    "an overlay": (planned(IMAGE, base=BASE), 100 + 100, 100 + 100),
    "an overlay that is gone on with": (planned(IMAGE, base=BASE, staged=replace(KEPT, data=30)), 70 + 100, 70 + 100),
    "an overlay that has more than that": (planned(IMAGE, base=BASE, staged=KEPT), 0 + 100, 0 + 100),
    "an overlay on a raw image": (planned(RAW, base=RAW_BASE), 100 + 100, 100 + 100),
    "an overlay on a raw image that has not grown": (
        planned(RAW, base=replace(RAW_BASE, virtual_size=1000)), 100 + 100, 100 + 0,
    ),
    "an overlay on what has more": (planned(IMAGE, base=replace(BASE, data=700)), 0, 0),
    "a copy that shares its blocks": (planned(IMAGE, base=BASE, shares=True), 100, 100),
}  # fmt: skip


@pytest.mark.parametrize("what", ROOM)
def test_what_will_be_written(what: str) -> None:
    disk, sparse, dense = ROOM[what]
    directory = Directory(IMAGES, True, True, 0)
    assert to_write(disk, directory) == sparse
    assert to_write(disk, replace(directory, abilities=FilesystemAbilities(sparse=False))) == dense


def test_what_runs_is_stored_uncompressed() -> None:
    """It is read from its backup job, which knows of no compressed clusters: the agent tells no `stored` of it."""
    how = running()
    given = Case(**{**how, "image": {"data": 100}, "directories": (replace(images()[0], free=114),)})
    assert [one.code for one in given.plan().findings] == ["space"]


def test_a_resumed_sync_needs_less() -> None:
    base = replace(REPLICA_IMAGE, data=0)
    given = case(image={"data": 1000, "virtual_size": GIB}, free=1800)
    kept = staged_disk(final=f"{IMAGES}/kvm-clone-earlier-vda.qcow2", backing=base.path, data=700)
    there = replica(given.facts(), base)
    assert [one.code for one in replace(given, existing=there).sync().findings] == ["space"]
    attempt = replace(given, existing=there, staged=staged(kind=SYNC, disks={"vda": kept}))
    assert attempt.sync(retry=Retry.RESUME).findings == ()


def test_a_pool_that_was_asked_for_is_the_one_that_is_looked_at() -> None:
    poor = Directory("/fat", True, True, 1 << 40, filesystem=1, abilities=FAT)
    given = Case(
        pools=(Pool("default", "dir", IMAGES, active=True), Pool("fat", "dir", "/fat", active=True)),
        directories=(*images(), poor),
    )
    assert given.plan().findings == ()
    there = replace(given, options=options(pool="fat")).plan()
    assert [one.code for one in there.findings] == ["owner", "mode"]
