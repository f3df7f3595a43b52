"""things.py: what is asked for, and the small parsers of what hosts answer."""

from __future__ import annotations

import pytest

from kvm_clone.definition.domain_xml import read_domain
from kvm_clone.definition.references import Reference, Role, references
from kvm_clone.hosts.answers import resources
from kvm_clone.planning.things import (
    UNKNOWN,
    HugePages,
    Resources,
    Things,
    claim,
    is_claim,
    kept,
    kernel_paths,
    parse_set,
    paths_of,
    plain_path,
)

SETS = [
    ("0", {0}),
    ("0-3", {0, 1, 2, 3}),
    ("0-3,^2", {0, 1, 3}),
    (" 1 , 5-6 ,", {1, 5, 6}),
    ("", set()),
    ("3-1", set()),
    (None, None),
    ("x", None),
    ("1-", None),
    ("1234567", None),
    ("٣", None),
]


@pytest.mark.parametrize(("text", "expected"), SETS)
def test_sets(text: str | None, expected: set[int] | None) -> None:
    assert parse_set(text) == expected


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/a//b/./c/..", "/a/b"),
        ("/var/run/x", "/run/x"),
        ("/var/lock/x", "/run/lock/x"),
        ("/var/runner/x", "/var/runner/x"),
    ],
)
def test_plain_paths(path: str, plain: str) -> None:
    assert plain_path(path) == plain


@pytest.mark.parametrize(
    ("role", "value", "paths"),
    [
        (Role.INTERFACE, "eth0", ["/sys/class/net/eth0"]),
        (Role.BRIDGE, "br0", ["/sys/class/net/br0"]),
        (Role.HOST_DEVICE, "pci:0000:06:00.0", ["/sys/bus/pci/devices/0000:06:00.0"]),
        (Role.HOST_DEVICE, "scsi:0:0:1:2", ["/sys/bus/scsi/devices/0:0:1:2"]),
        (Role.HOST_DEVICE, "mdev:c217", ["/sys/bus/mdev/devices/c217"]),
        (Role.HOST_DEVICE, "usb:1:2", []),
        (Role.SOCKET, "/run/x", []),
    ],
)
def test_where_the_kernel_shows_it(role: Role, value: str, paths: list[str]) -> None:
    assert list(kernel_paths(Reference("k", "w", value, role))) == paths


def test_where_the_kernel_shows_a_partition() -> None:
    found = kernel_paths(Reference("k", "w", "/machine/prod", Role.CGROUP))
    assert "/sys/fs/cgroup/machine.slice/machine-prod.slice" in found
    assert "/sys/fs/cgroup/cpu/machine.partition/prod.partition" in found


def test_the_paths_to_look_at() -> None:
    made = Reference("serial", "w", "/log/x.log", Role.OUTPUT, made=True)
    other = Reference("serial", "w", "/dev/x", Role.DEVICE)
    name = Reference("interface", "w", "eth0", Role.INTERFACE)
    text = Reference("title", "title", "/t", Role.INERT)
    assert paths_of([made, other, name, text]) == ("/dev/x", "/log", "/log/x.log", "/sys/class/net/eth0")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (Reference("serial", "w", "/var/run/x", Role.SOCKET, made=True), "/run/x"),
        (Reference("serial", "w", "/p", Role.PIPE), "/p"),
        (Reference("vsock CID", "w", "3", Role.EXCLUSIVE), "vsock CID 3"),
        (Reference("serial", "w", "/p", Role.SOCKET), None),
        (Reference("interface", "w", "eth0", Role.INTERFACE), None),
    ],
)
def test_what_two_vms_cannot_share(reference: Reference, expected: str | None) -> None:
    assert (claim(reference) if is_claim(reference) else None) == expected


def test_own_disks_are_left_out() -> None:
    disk = "<disk type='file' device='%s'><source file='%s'><seclabel model='dac'/></source><target dev='%s'/></disk>"
    devices = disk % ("disk", "/a", "vda") + disk % ("cdrom", "/b", "sda")
    xml = f"<domain><name>n</name><devices>{devices}</devices></domain>"
    assert [one.value for one in kept(references(xml), read_domain(xml))] == ["dac", "/b", "dac"]


def test_a_path_that_nobody_asked_for_is_not_known() -> None:
    assert Things({"/a": "file"}).path("/b") == UNKNOWN


def test_the_agents_answer() -> None:
    answer = {
        "hugepages": {"2048": [5, 3]},
        "default_hugepage": 2048,
        "hugetlbfs": True,
        "nodes": "0-1",
        "cpus": None,
        "usb": ["1d6b:0002", "1/1"],
        "addresses": {"10.0.0.1": False},
    }
    assert resources(answer) == Resources(
        {2048: HugePages(5, 3)},
        2048,
        True,
        frozenset({0, 1}),
        None,
        frozenset({"1d6b:0002", "1/1"}),
        {"10.0.0.1": False},
    )
