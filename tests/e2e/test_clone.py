"""Clones between the lab's two hosts that are to succeed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from clonekit import IMAGES, definition, environment, identical, kvm_clone, picture, remove, running, wait_for_copy
from labclient import REPOSITORY, Lab

from kvm_clone import Client, CloneOptions, DiskProgress, Event, Phase, PhaseStarted, Route, SshOptions

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Every test begins with the same hosts, and leaves nothing on the destination."""
    before = picture(lab, "kc-b")
    yield
    names = set(lab.run("kc-b", "virsh", "list", "--all", "--name").stdout.split("\n"))
    remove(lab, "kc-b", *(name for name in names if name and name not in before.domains.split()))
    after = picture(lab, "kc-b")
    assert after.files == before.files
    assert after.processes == before.processes
    assert after.locks == before.locks


@pytest.mark.parametrize("route", ["direct", pytest.param("relay", marks=pytest.mark.faults)])
def test_the_clone_boots_with_the_same_data(lab: Lab, route: str) -> None:
    vm = lab.vm("kc-a", "boots", ["raw:256M:40M", "qcow2:1G:30M"])
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "boots", "--route", route, "--output", "json")
    assert done.code == 0, done.err
    result = done.document
    assert result["route"] == route
    assert result["verified"] is True
    assert result["changed"] is True
    formats = {disk["target"]: disk["format"] for disk in result["disks"]}
    assert formats == {"vda": "qcow2", "vdb": "raw", "vdc": "qcow2"}
    for disk in result["disks"]:
        identical(lab, vm, disk["target"], disk["destination"], disk["format"])
    lab.run("kc-b", "virsh", "start", "boots")
    assert lab.wait_for_guest("kc-b", vm.serial) == "marker of boots vdb"


def test_the_definition_has_a_new_identity_and_a_mark(lab: Lab) -> None:
    vm = lab.vm("kc-a", "identity", ["raw:8M:1M"], boot=False)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "identity", "--new-name", "renamed").code == 0
    ours, theirs = definition(lab, "kc-a", "identity"), definition(lab, "kc-b", "renamed")
    assert theirs.findtext("uuid") != vm.uuid
    macs = [[mac.get("address") for mac in root.iter("mac")] for root in (ours, theirs)]
    assert macs[0] != macs[1] or not macs[0]
    source = theirs.find(".//disk/source")
    assert source is not None
    assert source.get("file") == f"{IMAGES}/renamed-vda.raw"
    mark = theirs.find("metadata/{https://kvm-clone.org/xmlns/clone/1}clone")
    assert mark is not None
    assert mark.get("source-uuid") == vm.uuid


def test_uuid_and_macs_can_be_kept(lab: Lab) -> None:
    vm = lab.vm("kc-a", "kept", ["raw:8M:1M"], boot=False)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "kept", "--preserve-uuid", "--preserve-mac").code == 0
    ours, theirs = definition(lab, "kc-a", "kept"), definition(lab, "kc-b", "kept")
    assert theirs.findtext("uuid") == vm.uuid
    assert [mac.get("address") for mac in theirs.iter("mac")] == [mac.get("address") for mac in ours.iter("mac")]


@pytest.mark.parametrize("name", ['it\'s a "quoted" & <odd> name', "-starts-with-a-dash", "ünï cödé $HOME"])
def test_names_that_shells_and_xml_dislike(lab: Lab, name: str) -> None:
    vm = lab.vm("kc-a", name, ["qcow2:8M:1M"], boot=False)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "--output", "json", "--", name)
    assert done.code == 0, done.err
    identical(lab, vm, "vda", done.document["disks"][0]["destination"], "qcow2")
    assert definition(lab, "kc-b", name).findtext("name") == name
    remove(lab, "kc-a", name)


def test_two_disks_with_the_same_basename(lab: Lab) -> None:
    vm = lab.vm("kc-a", "twins", ["raw:8M:2M", "raw:8M:1M"], boot=False)
    other = f"{IMAGES}/other"
    lab.run("kc-a", "mkdir", "-p", other)
    lab.run("kc-a", "mv", vm.disks["vdb"], f"{other}/twins-vda.raw")
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", "twins").stdout
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(vm.disks["vdb"], f"{other}/twins-vda.raw"))
    vm.disks["vdb"] = f"{other}/twins-vda.raw"
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "twins", "--output", "json")
    assert done.code == 0, done.err
    paths = [disk["destination"] for disk in done.document["disks"]]
    assert paths == [f"{IMAGES}/twins-vda.raw", f"{IMAGES}/twins-vda-vdb.raw"]
    for disk in done.document["disks"]:
        identical(lab, vm, disk["target"], disk["destination"], "raw")
    remove(lab, "kc-a", "twins")


QCOW2_FEATURES = [
    ("cluster_size=512", False),
    ("cluster_size=2M", False),
    ("compat=0.10", False),
    ("lazy_refcounts=on,refcount_bits=8", False),
    ("extended_l2=on,cluster_size=128k", False),
    ("compression_type=zstd", True),
    ("cluster_size=64k", True),
]


@pytest.mark.parametrize(("options", "compressed"), QCOW2_FEATURES)
def test_qcow2_features_are_kept(lab: Lab, options: str, compressed: bool) -> None:
    vm = lab.vm("kc-a", "features", ["qcow2:32M:9M"], boot=False)
    path = lab.outside("kc-a", vm.disks["vda"])
    convert = ["qemu-img", "convert", "-O", "qcow2", "-o", options, *(["-c"] if compressed else [])]
    subprocess.run([*convert, str(path), f"{path}.new"], check=True)
    path.write_bytes((path.parent / f"{path.name}.new").read_bytes())
    (path.parent / f"{path.name}.new").unlink()
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "features", "--output", "json")
    assert done.code == 0, done.err
    clone = done.document["disks"][0]["destination"]
    identical(lab, vm, "vda", clone, "qcow2")
    about = [
        json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        for argv in (
            ["qemu-img", "info", "--output=json", str(path)],
            ["qemu-img", "info", "--output=json", str(lab.outside("kc-b", clone))],
        )
    ]
    for key in ("virtual-size", "cluster-size", "format-specific"):
        assert about[0][key] == about[1][key]


def test_a_missing_medium_is_a_warning_and_its_reference_is_kept(lab: Lab) -> None:
    lab.vm("kc-a", "media", ["raw:8M:1M"], boot=False)
    medium = "/srv/only on the source.iso"
    lab.run("kc-a", "virsh", "attach-disk", "media", medium, "sda", "--type", "cdrom", "--config")
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "media")
    assert done.code == 0, done.err
    assert medium in done.err
    assert "warning" in done.err
    sources = [source.get("file") for source in definition(lab, "kc-b", "media").iterfind(".//disk/source")]
    assert medium in sources


def test_a_source_that_cannot_reach_the_destination_is_relayed(lab: Lab) -> None:
    lab.vm("kc-a", "relayed", ["raw:8M:1M"], boot=False)
    lab.run("kc-a", "sh", "-c", "mv /root/.ssh/id_ed25519 /root/.ssh/away")
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "relayed", "--output", "json")
        refused = kvm_clone(lab, "clone", "kc-a", "kc-b", "relayed", "--new-name", "other", "--route", "direct")
    finally:
        lab.run("kc-a", "sh", "-c", "mv /root/.ssh/away /root/.ssh/id_ed25519")
    assert done.code == 0, done.err
    assert done.document["route"] == "relay"
    assert "Permission denied" in done.document["route_reason"]
    assert refused.code == 3
    assert "direct route" in refused.err


def test_localhost_as_source_and_as_both(lab: Lab) -> None:
    lab.vm("kc-a", "local", ["qcow2:16M:4M"], boot=False)
    line = [sys.executable, "-m", "kvm_clone.cli", "clone", "localhost"]
    away = lab.command("exec", "kc-a", "--", "env", "XDG_CONFIG_HOME=/x", *line, "kc-b", "local", check=False)
    assert away.returncode == 0, away.stderr
    here = lab.command("exec", "kc-a", "--", "env", "XDG_CONFIG_HOME=/x", *line, "localhost", "local", check=False)
    assert here.returncode == 4, here.stderr
    here = lab.command(
        "exec", "kc-a", "--", "env", "XDG_CONFIG_HOME=/x", *line, "localhost", "local", "--new-name", "l2", check=False
    )
    assert here.returncode == 0, here.stderr
    assert "this machine is one of the two hosts" in here.stdout
    remove(lab, "kc-a", "l2")


def test_another_pool_can_be_named(lab: Lab) -> None:
    lab.vm("kc-a", "pooled", ["raw:8M:1M"], boot=False)
    lab.run("kc-b", "sh", "-c", f"mkdir -p {IMAGES}/second && virsh pool-create-as second dir --target {IMAGES}/second")
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "pooled", "--pool", "second", "--output", "json")
        assert done.code == 0, done.err
        assert done.document["disks"][0]["destination"] == f"{IMAGES}/second/pooled-vda.raw"
        assert "pooled-vda.raw" in lab.run("kc-b", "virsh", "vol-list", "second").stdout
        remove(lab, "kc-b", "pooled")
    finally:
        lab.run("kc-b", "virsh", "pool-destroy", "second")


def test_the_source_cannot_be_started_while_it_is_copied(lab: Lab) -> None:
    vm = lab.vm("kc-a", "held", ["raw:64M:24M"])
    before = {path: lab.outside("kc-a", path).stat() for path in vm.disks.values()}
    with running(lab, "kc-a", "kc-b", "held", "--bandwidth-limit", "6M") as child:
        wait_for_copy(lab)
        started = lab.run("kc-a", "virsh", "start", "held", check=False)
        assert started.returncode != 0
        assert "lock" in started.stderr
        assert child.wait(60) == 0
    for path, stat in before.items():
        now = lab.outside("kc-a", path).stat()
        assert (now.st_mtime_ns, now.st_size, now.st_mode) == (stat.st_mtime_ns, stat.st_size, stat.st_mode)
    assert lab.run("kc-a", "virsh", "start", "held").returncode == 0
    lab.run("kc-a", "virsh", "destroy", "held")


def test_without_verification_the_result_says_so(lab: Lab) -> None:
    lab.vm("kc-a", "unproven", ["raw:8M:1M"], boot=False)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "unproven", "--no-verify", "-q")
    assert done.code == 0
    assert "not verified" in done.out
    assert done.err == ""


def test_the_api_reports_typed_events(lab: Lab) -> None:
    lab.vm("kc-a", "api", ["raw:16M:8M", "qcow2:16M:4M"], boot=False)
    events: list[Event] = []

    async def clone() -> str:
        async with Client(SshOptions(config=lab.ssh_config)) as client:
            options = CloneOptions(route=Route.RELAY, parallel=1)
            result = await client.clone("kc-a", "kc-b", "api", options, on_event=events.append)
            listed = await client.list_vms(["kc-b"])
            assert result.uuid in [vm.uuid for vm in listed[0].vms]
            return result.name

    assert asyncio.run(clone()) == "api"
    phases = [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert phases == [Phase.CONNECT, Phase.INSPECT, Phase.PREPARE, Phase.COPY, Phase.PROVE, Phase.COMMIT]
    for phase in (Phase.COPY, Phase.PROVE):
        last = {
            event.disk: (event.done, event.total)
            for event in events
            if isinstance(event, DiskProgress) and event.phase is phase
        }
        assert set(last) == {"vda", "vdb"}
        assert all(done == total for done, total in last.values())


def test_progress_is_plain_lines_when_nobody_watches(lab: Lab) -> None:
    lab.vm("kc-a", "lines", ["raw:64M:24M"], boot=False)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "lines", "--bandwidth-limit", "5M")
    assert done.code == 0
    assert "/s, " in done.err
    assert " left" in done.err
    assert "\x1b" not in done.err
    assert done.out.startswith("lines on kc-a is cloned to kc-b")


def test_list_shows_all_hosts_and_an_error_for_one_that_is_not_there(lab: Lab) -> None:
    lab.vm("kc-a", "listed", ["raw:8M:1M"], boot=False)
    done = kvm_clone(lab, "list", "kc-a", "kc-b", "--output", "json")
    assert done.code == 0
    rows = {vm["name"]: vm for vm in done.document["hosts"][0]["vms"]}
    assert rows["listed"]["state"] == "shut off"
    assert rows["listed"]["disks"][0]["virtual_size"] == 8 << 20
    assert rows["listed"]["disks"][0]["allocated"] > 0
    assert "listed" not in kvm_clone(lab, "list", "kc-a", "--state", "running").out
    assert "listed" in kvm_clone(lab, "list", "kc-a", "--state", "shut-off").out
    partly = kvm_clone(lab, "list", "kc-a", "no-such-host.invalid", "--output", "json")
    assert partly.code == 5
    assert [("error" in host) for host in partly.document["hosts"]] == [False, True]
    assert "listed" in [vm["name"] for vm in partly.document["hosts"][0]["vms"]]


def test_from_a_clean_directory_as_the_readme_says(lab: Lab) -> None:
    lab.vm("kc-a", "plain", ["raw:8M:1M"], boot=False)
    command = REPOSITORY / ".venv/bin/kvm-clone"
    done = subprocess.run(
        [str(command), "clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", "plain"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
