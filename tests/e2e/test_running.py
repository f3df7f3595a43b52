"""Cloning and syncing a VM that runs: one point in time at the destination, and nothing left of it at the source."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clonekit import (
    IMAGES,
    IMPATIENT,
    agents,
    assert_equal,
    definition,
    disks_of,
    kill,
    kvm_clone,
    remove,
    wait_for_durable,
    wait_until,
    wipe,
)
from guests import Ticks, assert_clean, assert_file_system, needs_replay
from labclient import Lab, Vm
from livekit import (
    assert_ends_equal,
    assert_no_job,
    copied,
    counted,
    ended,
    failed,
    images,
    ours,
    power_off,
    power_on,
    traces,
    under_way,
    virsh,
    wait_for_agent,
    wait_for_job,
)

pytestmark = pytest.mark.e2e

LONG = pytest.mark.faults
"""What takes a guest's boot or a patience to run out; make test-faults takes it."""

LONGEST_PAUSE = 2.0
"""Seconds that a guest may stand still."""


@pytest.fixture(scope="module")
def counter(lab: Lab) -> Iterator[Vm]:
    """A guest that counts on two qcow2 disks, without a guest agent."""
    vm = lab.vm("kc-a", "live-counter", ["qcow2:24M:2M", "qcow2:24M:2M"], start=True, guest="counter")
    lab.wait_for_guest("kc-a", vm.serial)
    yield vm
    remove(lab, "kc-a", vm.name)


@pytest.fixture(scope="module")
def files(lab: Lab) -> Iterator[Vm]:
    """A guest with a file system and a guest agent."""
    vm = lab.vm("kc-a", "live-files", ["qcow2:32M:2M"], start=True, guest="fs", guest_agent=True)
    lab.wait_for_guest("kc-a", vm.serial)
    wait_for_agent(lab, vm)
    yield vm
    remove(lab, "kc-a", vm.name)


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    """Whatever a test makes at the destination, the next one does not find."""
    yield
    wipe(lab)


@pytest.fixture(autouse=True)
def untracked(lab: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared guests run and have no checkpoint when a test begins."""
    for name in ("counter", "files"):
        if name in request.fixturenames:
            _make_ready(lab, request.getfixturevalue(name))
    yield


def _make_ready(lab: Lab, vm: Vm) -> None:
    if "running" not in virsh(lab, "domstate", "--domain", vm.name):
        power_on(lab, vm)
        if vm.name == "live-files":
            wait_for_agent(lab, vm)
    virsh(lab, "domjobabort", "--domain", vm.name, check=False)
    for name in virsh(lab, "checkpoint-list", "--name", "--topological", "--domain", vm.name).split()[::-1]:
        for how in ((), ("--metadata",)):
            virsh(lab, "checkpoint-delete", "--domain", vm.name, name, *how, check=False)


def by_target(document: dict[str, Any], key: str) -> dict[str, Any]:
    """One field of the result's disks."""
    return {disk["target"]: disk[key] for disk in document["disks"]}


def mark_of(lab: Lab, name: str) -> dict[str, str]:
    """Our mark in a clone's metadata."""
    mark = definition(lab, "kc-b", name).find("metadata/{https://kvm-clone.org/xmlns/clone/1}clone")
    assert mark is not None
    return dict(mark.attrib)


@LONG
def test_clone_is_crash_consistent_without_freezing(lab: Lab, files: Vm, tmp_path: Path) -> None:
    before = traces(lab, files.name)
    with Ticks(lab, "kc-a", files.serial) as ticks:
        seen = ticks.wait()
        result = copied(lab, "clone", files, "--quiesce", "off")
        ticks.wait()
        assert ticks.longest_pause() < LONGEST_PAUSE
    assert traces(lab, files.name) == before
    assert (result["consistency"], result["frozen_seconds"]) == ("crash", 0)
    assert mark_of(lab, files.name)["consistency"] == "crash"
    (disk,) = images(lab, files.name, tmp_path, ["vdb"])
    assert needs_replay(disk)
    assert assert_file_system(disk, tmp_path / "files") >= seen.count


@pytest.mark.faults
def test_clone_is_frozen_for_a_moment(lab: Lab, files: Vm, tmp_path: Path) -> None:
    before = traces(lab, files.name)
    with Ticks(lab, "kc-a", files.serial) as ticks:
        seen = ticks.wait()
        result = copied(lab, "clone", files, "--quiesce", "require")
        ticks.wait()
        assert ticks.longest_pause() < LONGEST_PAUSE
    assert traces(lab, files.name) == before
    assert result["consistency"] == "filesystem"
    assert 0 < result["frozen_seconds"] < LONGEST_PAUSE
    assert mark_of(lab, files.name)["consistency"] == "filesystem"
    (disk,) = images(lab, files.name, tmp_path, ["vdb"])
    assert not needs_replay(disk)
    assert_clean(disk)
    assert assert_file_system(disk, tmp_path / "files") >= seen.count
    serial = lab.outside("kc-b", files.serial)
    lab.run("kc-b", "virsh", "start", files.name)
    wait_until("the clone's guest works", lambda: serial.exists() and "TICK" in serial.read_text(), 60)


@pytest.mark.faults
def test_counters_of_a_clone_and_of_syncs_are_of_one_moment(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    before = traces(lab, counter.name)
    with Ticks(lab, "kc-a", counter.serial) as ticks:
        copied(lab, "clone", counter)
        counts = [counted(lab, counter.name, tmp_path / "0")]
        for number in ("1", "2"):
            result = copied(lab, "sync", counter, "--verify", "full")
            assert result["bytes_compared"] >= 48 << 20
            assert set(by_target(result, "method").values()) == {"digests"}
            counts.append(counted(lab, counter.name, tmp_path / number))
        assert ticks.longest_pause() < LONGEST_PAUSE
    assert counts == sorted(set(counts))
    assert traces(lab, counter.name) == before


def test_sync_takes_what_a_bitmap_names(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    before = traces(lab, counter.name)
    with Ticks(lab, "kc-a", counter.serial) as ticks:
        first = copied(lab, "clone", counter, "--track")
        assert [first["checkpoint"]] == ours(lab, counter.name)
        last = first
        for number in ("1", "2"):
            time.sleep(1)
            result = copied(lab, "sync", counter, "--track", *(("--verify", "full") if number == "2" else ()))
            print("SYNC", number, result["seconds"], result["bytes_sent"], result["frozen_seconds"])
            assert set(by_target(result, "method").values()) == {"bitmap"}, result["hint"]
            assert (result["bytes_compared"], result["hint"]) == (0, "")
            assert by_target(result, "sent")["vda"] == 0
            assert 0 < result["bytes_sent"] < 8 << 20
            assert [result["checkpoint"]] == ours(lab, counter.name) != [last["checkpoint"]]
            counted(lab, counter.name, tmp_path / number)
            last = result
        assert ticks.longest_pause() < LONGEST_PAUSE
    done = kvm_clone(lab, "sync", "kc-a", "kc-b", counter.name, "--untrack")
    assert done.code == 0, done.err
    assert traces(lab, counter.name) == before


@LONG
def test_chains_are_apart_and_foreign_checkpoints_stay(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    other = "live-other"
    copied(lab, "clone", counter, "--track", "--verify")
    copied(lab, "clone", counter, "--track", "--new-name", other)
    assert len(ours(lab, counter.name)) == 2
    for name in (counter.name, other):
        result = copied(lab, "sync", counter, "--track", "--target-name", name)
        assert set(by_target(result, "method").values()) == {"bitmap"}, result["hint"]
        counted(lab, name, tmp_path / name)
    assert len(ours(lab, counter.name)) == 2
    virsh(lab, "checkpoint-create-as", "--domain", counter.name, "foreign")
    assert "foreign" in failed(lab, "sync", counter, 3, "--track")
    failed(lab, "sync", counter, 0, "--untrack")
    assert ours(lab, counter.name) == [result["checkpoint"]]
    assert "foreign" in traces(lab, counter.name).checkpoints
    result = copied(lab, "sync", counter, "--verify", "full", "--target-name", other)
    assert set(by_target(result, "method").values()) == {"bitmap"}, result["hint"]
    assert (result["checkpoint"], ours(lab, counter.name)) == ("", [])
    counted(lab, other, tmp_path / "last")


def _delete_checkpoint(lab: Lab, vm: Vm) -> None:
    virsh(lab, "checkpoint-delete", "--domain", vm.name, *ours(lab, vm.name))


def _forget_checkpoint(lab: Lab, vm: Vm) -> None:
    virsh(lab, "checkpoint-delete", "--domain", vm.name, "--metadata", *ours(lab, vm.name))


def _remove_bitmap(lab: Lab, vm: Vm) -> None:
    (name,) = ours(lab, vm.name)
    power_off(lab, vm)
    lab.run("kc-a", "qemu-img", "bitmap", "--remove", vm.disks["vdb"], name)
    power_on(lab, vm)


def _cut_power(lab: Lab, vm: Vm) -> None:
    """QEMU has not stored the bitmap yet."""
    lab.power("off", "kc-a")
    lab.power("on", "kc-a")
    power_on(lab, vm)


def _cut_power_later(lab: Lab, vm: Vm) -> None:
    """QEMU has stored it once, and it is marked as in use since."""
    power_off(lab, vm)
    power_on(lab, vm)
    _cut_power(lab, vm)


def _restore_into_another_file(lab: Lab, vm: Vm) -> None:
    """The copy has the bitmap too."""
    power_off(lab, vm)
    path = vm.disks["vdb"]
    lab.run("kc-a", "sh", "-ec", 'cp -p "$1" "$1.copy"; mv "$1.copy" "$1"', "restore", path)
    power_on(lab, vm)


def _use_replica(lab: Lab, vm: Vm) -> None:
    path = disks_of(lab, "kc-b", vm.name)["vdb"][0]
    lab.run("kc-b", "qemu-io", "-f", "qcow2", "-c", "write -P 7 5M 64k", path)


LOSSES = {
    "checkpoint deleted": (_delete_checkpoint, "lacks the checkpoint"),
    "checkpoint forgotten": (_forget_checkpoint, "lacks the checkpoint"),
    "bitmap removed": (_remove_bitmap, "bitmap"),
    "power cut": (_cut_power, "bitmap"),
    "power cut later": (_cut_power_later, "bitmap"),
    "replica used": (_use_replica, "used"),
    "another file": (_restore_into_another_file, "vdb is another file"),
}


@LONG
@pytest.mark.parametrize("loss", LOSSES)
def test_a_bitmap_is_only_a_hint(lab: Lab, counter: Vm, tmp_path: Path, loss: str) -> None:
    lose, said = LOSSES[loss]
    first = copied(lab, "clone", counter, "--track")
    lose(lab, counter)
    planned = kvm_clone(lab, "sync", "kc-a", "kc-b", counter.name, "--dry-run", "--force")
    assert planned.code == 0, planned.err
    result = copied(lab, "sync", counter, "--track", "--verify", "full", "--force")
    assert said in result["hint"], result
    assert "bitmap" not in by_target(result, "method").values()
    counted(lab, counter.name, tmp_path / "1")
    assert [result["checkpoint"]] == ours(lab, counter.name) != [first["checkpoint"]]
    again = copied(lab, "sync", counter, "--track", "--verify", "full")
    assert set(by_target(again, "method").values()) == {"bitmap"}, again["hint"]
    assert not again["warnings"]
    counted(lab, counter.name, tmp_path / "2")
    assert [again["checkpoint"]] == ours(lab, counter.name)


@LONG
def test_what_a_disk_lost_while_it_was_smaller_is_no_secret_of_its_bitmap(lab: Lab) -> None:
    """QEMU sets no bit for it."""
    vm = lab.vm("kc-a", "live-smaller", ["qcow2:24M:2M", "qcow2:24M:2M"], boot=True, guest="counter")
    disk = vm.disks["vdb"]
    lab.run("kc-a", "qemu-io", "-f", "qcow2", "-c", "write -P 9 20M 1M", disk)
    try:
        power_on(lab, vm)
        copied(lab, "clone", vm, "--track")
        there = disks_of(lab, "kc-b", vm.name)["vdb"][0]
        assert "failed" not in lab.run("kc-b", "qemu-io", "-f", "qcow2", "-c", "read -P 9 20M 1M", there).stdout
        power_off(lab, vm)
        lab.run("kc-a", "qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", disk, "18M")
        lab.run("kc-a", "qemu-img", "resize", "-q", "-f", "qcow2", disk, "24M")
        power_on(lab, vm)
        result = copied(lab, "sync", vm, "--track")
        assert set(by_target(result, "method").values()) == {"bitmap"}, result["hint"]
        assert "failed" not in lab.run("kc-b", "qemu-io", "-f", "qcow2", "-c", "read -P 0 20M 1M", there).stdout
    finally:
        remove(lab, "kc-a", vm.name)


@LONG
def test_a_sync_that_is_gone_on_with_trusts_no_bitmap(lab: Lab, counter: Vm) -> None:
    copied(lab, "clone", counter, "--track")
    with under_way(lab, "sync", counter.name, "--track", *SLOW) as child:
        wait_for_durable(lab, "vdb", 1 << 20)
        child.kill()
    result = copied(lab, "sync", counter, "--track", "--idempotent", "--wait")
    assert by_target(result, "method")["vdb"] == "digests"
    assert result["bytes_compared"] >= by_target(result, "virtual_size")["vdb"]
    assert_ends_equal(lab, counter)


@LONG
def test_a_guest_that_could_not_be_thawed_is_not_frozen(lab: Lab, files: Vm) -> None:
    lab.run("kc-a", "mount", "--bind", "/dev/null", "/usr/bin/virsh")
    try:
        result = copied(lab, "clone", files)
        assert result["consistency"] == "crash"
        assert result["frozen_seconds"] == 0
        said = failed(lab, "clone", files, 3, "--quiesce", "require", "--force")
        assert "libvirt-clients" in said
    finally:
        lab.run("kc-a", "umount", "/usr/bin/virsh")


@LONG
def test_a_bitmap_outlives_a_restart_of_its_vm(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    copied(lab, "clone", counter, "--track")
    power_off(lab, counter)
    power_on(lab, counter)
    result = copied(lab, "sync", counter, "--track", "--verify", "full")
    assert set(by_target(result, "method").values()) == {"bitmap"}, result["hint"]
    counted(lab, counter.name, tmp_path / "1")
    assert_ends_equal(lab, counter)


@LONG
def test_paused_vm_stays_paused(lab: Lab, files: Vm, tmp_path: Path) -> None:
    virsh(lab, "suspend", "--domain", files.name)
    try:
        before = traces(lab, files.name)
        result = copied(lab, "clone", files)
        assert traces(lab, files.name) == before
        assert before.state == "paused"
        assert result["consistency"] == "crash"
    finally:
        virsh(lab, "resume", "--domain", files.name)
    (disk,) = images(lab, files.name, tmp_path, ["vdb"])
    assert_file_system(disk, tmp_path / "files")


@contextmanager
def extra_disk(lab: Lab, vm: Vm, how: str) -> Iterator[None]:
    """The VM has one disk more, in one of its definitions."""
    path = f"{IMAGES}/extra.raw"
    lab.run("kc-a", "truncate", "-s", "1M", path)
    virsh(lab, "attach-disk", "--domain", vm.name, path, "vdx", "--subdriver", "raw", how)
    try:
        yield
    finally:
        virsh(lab, "detach-disk", "--domain", vm.name, "vdx", how)
        lab.run("kc-a", "rm", "-f", path)


@LONG
def test_disk_of_one_definition_only(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    with extra_disk(lab, counter, "--config"):
        assert "vdx" in failed(lab, "clone", counter, 3)
    with extra_disk(lab, counter, "--live"):
        result = copied(lab, "clone", counter, "--track")
        warned = [one for one in result["findings"] if one["code"] == "live-disk"]
        assert [one["subject"] for one in warned] == ["vdx"]
        assert "vdx" not in disks_of(lab, "kc-b", counter.name)
        counted(lab, counter.name, tmp_path / "1")


FOREIGN_JOB = """<domainbackup mode="pull"><server transport="unix" socket="/var/lib/libvirt/qemu/foreign.sock"/>
<disks><disk name="vdb" backup="yes" type="file"><scratch file="/var/lib/libvirt/images/foreign.tmp"/></disk></disks>
</domainbackup>"""


def test_jobs_of_others_are_left_alone(lab: Lab, counter: Vm) -> None:
    lab.run("kc-a", "virsh", "backup-begin", counter.name, "/dev/stdin", input=FOREIGN_JOB)
    try:
        said = failed(lab, "clone", counter, 3)
        assert "backup job of another tool" in said
        assert "foreign.sock" in virsh(lab, "backup-dumpxml", "--domain", counter.name)
    finally:
        virsh(lab, "domjobabort", "--domain", counter.name)
    copy = f"{IMAGES}/foreign.qcow2"
    virsh(lab, "blockcopy", "--domain", counter.name, "vdb", copy, "--transient-job")
    try:
        assert "block job" in failed(lab, "clone", counter, 3)
        jobs = virsh(lab, "qemu-monitor-command", counter.name, '{"execute": "query-block-jobs"}')
        assert '"type":"mirror"' in jobs.replace(" ", "")
    finally:
        virsh(lab, "blockjob", "--domain", counter.name, "vdb", "--abort")
        lab.run("kc-a", "rm", "-f", copy)


@LONG
def test_raw_disks_of_a_running_vm(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("kc-a", "live-raw", ["raw:24M:2M", "qcow2:24M:2M"], start=True, guest="counter")
    try:
        lab.wait_for_guest("kc-a", vm.serial)
        copied(lab, "clone", vm, "--track")
        counted(lab, vm.name, tmp_path / "0")
        result = copied(lab, "sync", vm, "--track", "--verify", "full")
        assert by_target(result, "method") == {"vda": "bitmap", "vdb": "digests", "vdc": "bitmap"}
        counted(lab, vm.name, tmp_path / "1")
        assert_ends_equal(lab, vm)
    finally:
        remove(lab, "kc-a", vm.name)


SLOW = ("--bandwidth-limit", "1M", "--output", "json")


@LONG
def test_guest_powers_off_during_the_copy(lab: Lab, counter: Vm) -> None:
    with under_way(lab, "clone", counter.name, *SLOW, "--retries", "0") as child:
        wait_for_durable(lab, "vda", 1 << 20)
        virsh(lab, "destroy", "--domain", counter.name)
        done = ended(child)
    assert done.code == 6, done.err
    assert "kept" in done.err
    assert_no_job(lab, counter.name)
    result = copied(lab, "clone", counter, "--idempotent")
    assert result["bytes_reused"] >= 1 << 20
    assert_equal(lab, counter)


@LONG
def test_source_without_power_during_a_tracking_sync(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    copied(lab, "clone", counter, "--track")
    with under_way(lab, "sync", counter.name, "--track", *SLOW, *IMPATIENT, "--retries", "0") as child:
        wait_for_job(lab, counter.name, child)
        lab.power("off", "kc-a")
        done = ended(child)
    lab.power("on", "kc-a")
    assert done.code in (5, 6), done.err
    power_on(lab, counter)
    result = copied(lab, "sync", counter, "--track", "--idempotent", "--wait", "--verify", "full")
    counted(lab, counter.name, tmp_path / "1")
    assert [result["checkpoint"]] == ours(lab, counter.name)
    assert_no_job(lab, counter.name, 5)
    assert_ends_equal(lab, counter)


@LONG
def test_controller_killed_during_the_copy(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    before = traces(lab, counter.name)
    with Ticks(lab, "kc-a", counter.serial) as ticks:
        with under_way(lab, "clone", counter.name, *SLOW) as child:
            wait_for_durable(lab, "vda", 1 << 20)
            child.kill()
        assert_no_job(lab, counter.name)
        ticks.wait()
        assert ticks.longest_pause() < LONGEST_PAUSE
    assert traces(lab, counter.name) == before
    result = copied(lab, "clone", counter, "--idempotent", "--wait")
    assert result["bytes_reused"] > 0
    counted(lab, counter.name, tmp_path)
    assert traces(lab, counter.name) == before


@LONG
@pytest.mark.parametrize("point", ["freeze", "frozen"])
def test_controller_killed_while_the_guest_is_frozen(lab: Lab, files: Vm, point: str) -> None:
    before = traces(lab, files.name)
    with Ticks(lab, "kc-a", files.serial) as ticks, under_way(lab, "clone", files.name, point=point) as child:
        last = len(ticks.seen)
        if point == "frozen":
            time.sleep(1)
            assert len(ticks.seen) <= last + 1, "it is frozen"
        child.kill()
        ticks.wait(3, 20)
    assert_no_job(lab, files.name)
    assert traces(lab, files.name) == before


@LONG
@pytest.mark.parametrize("point", ["freeze", "frozen", "begin", "begun"])
def test_controller_ended_by_a_signal_as_the_job_begins(lab: Lab, files: Vm, point: str) -> None:
    before = traces(lab, files.name)
    with Ticks(lab, "kc-a", files.serial) as ticks:
        with under_way(lab, "clone", files.name, "--track", point=f"{point}:term") as child:
            done = ended(child)
        ticks.wait(3, 20)
    assert done.code == 6, done.err
    assert_no_job(lab, files.name, 5)
    assert traces(lab, files.name) == before


@LONG
def test_network_cut_during_the_copy(lab: Lab, counter: Vm) -> None:
    before = traces(lab, counter.name)
    with under_way(lab, "clone", counter.name, *SLOW, *IMPATIENT, "--retries", "0") as child:
        wait_for_durable(lab, "vda", 1 << 20)
        lab.net("cut", "kc-a")
        try:
            done = ended(child)
            assert done.code == 6, done.err
            assert_no_job(lab, counter.name)
        finally:
            lab.net("heal", "kc-a")
    assert traces(lab, counter.name) == before


@LONG
def test_stale_job_is_ended_by_the_next_run(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    """Neither the controller nor the source's agent has lived to end it."""
    before = traces(lab, counter.name)
    with under_way(lab, "clone", counter.name, *SLOW, point="begun") as child:
        kill(lab, "kc-a", agents(lab, "kc-a")[0])
        child.kill()
    assert traces(lab, counter.name).job
    copied(lab, "clone", counter, "--idempotent", "--wait")
    counted(lab, counter.name, tmp_path)
    assert traces(lab, counter.name) == before


@LONG
def test_stale_job_is_ended_by_cleanup(lab: Lab, counter: Vm) -> None:
    before = traces(lab, counter.name)
    with under_way(lab, "clone", counter.name, *SLOW, point="begun") as child:
        assert "nothing to remove" in kvm_clone(lab, "cleanup", "kc-a").out
        kill(lab, "kc-a", agents(lab, "kc-a")[0])
        child.kill()
    assert f"the backup job of {counter.name}: would be ended" in kvm_clone(lab, "cleanup", "kc-a", "--dry-run").out
    assert traces(lab, counter.name).job
    done = kvm_clone(lab, "cleanup", "kc-a", "--output", "json")
    assert (done.code, done.document["hosts"][0]["jobs"]) == (0, [counter.name]), done.err
    assert traces(lab, counter.name) == before
    assert kvm_clone(lab, "cleanup", "kc-b").code == 0


@LONG
def test_one_operation_at_a_time_on_a_running_source(lab: Lab, counter: Vm, tmp_path: Path) -> None:
    with under_way(lab, "clone", counter.name, *SLOW, point="begun") as child:
        said = failed(lab, "clone", counter, 8, "--new-name", "live-other")
        assert "Another operation" in said
        with under_way(lab, "clone", counter.name, "--new-name", "live-other", "--wait") as other:
            time.sleep(3)
            assert other.poll() is None
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGCONT)
            assert ended(child).code == 6
            done = ended(other)
            assert done.code == 0, done.err
    counted(lab, "live-other", tmp_path)


def test_require_needs_an_agent(lab: Lab, counter: Vm) -> None:
    assert "guest agent" in failed(lab, "clone", counter, 3, "--quiesce", "require")


@LONG
def test_guest_that_others_have_frozen_stays_frozen(lab: Lab, files: Vm, tmp_path: Path) -> None:
    virsh(lab, "domfsfreeze", "--domain", files.name)
    try:
        before = traces(lab, files.name)
        failed(lab, "clone", files, 3, "--quiesce", "require", "--new-name", "live-other")
        result = copied(lab, "clone", files)
        assert result["consistency"] == "crash"
        assert "Thawed 1" in lab.run("kc-a", "virsh", "domfsthaw", files.name).stdout
        assert traces(lab, files.name) == before
    finally:
        virsh(lab, "domfsthaw", "--domain", files.name)
    (disk,) = images(lab, files.name, tmp_path, ["vdb"])
    assert_clean(disk)


@LONG
def test_guest_that_freezes_too_late_is_thawed(lab: Lab, files: Vm, tmp_path: Path) -> None:
    before = traces(lab, files.name)
    with under_way(lab, "clone", files.name, "--output", "json", point="freeze") as child:
        virsh(lab, "blkdeviotune", "--domain", files.name, "vdb", "--live", "--total-iops-sec", "1")
        try:
            child.send_signal(signal.SIGCONT)
            time.sleep(14)
        finally:
            virsh(lab, "blkdeviotune", "--domain", files.name, "vdb", "--live", "--total-iops-sec", "0")
        done = ended(child)
    print("LATE", done.err)
    assert done.code == 0, done.err
    with Ticks(lab, "kc-a", files.serial) as ticks:
        ticks.wait(3, 20)
    assert traces(lab, files.name) == before
    (disk,) = images(lab, files.name, tmp_path, ["vdb"])
    assert_file_system(disk, tmp_path / "files")


@contextmanager
def small_storage(lab: Lab, mebibytes: int) -> Iterator[Vm]:
    """A counting guest whose host has so much for its disks, and nothing else for scratch."""
    place = f"{IMAGES}/small"
    lab.run("kc-a", "sh", "-c", f"mkdir -p {place} && mount -t tmpfs -o size={mebibytes}M tmpfs {place}")
    vm = lab.vm("kc-a", "live-small", ["qcow2:24M:1M", "qcow2:24M:1M"], guest="counter")
    try:
        lab.run("kc-a", "sh", "-c", f"mv {IMAGES}/live-small-* {place}")
        xml = lab.run("kc-a", "virsh", "dumpxml", vm.name).stdout
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(f"{IMAGES}/", f"{place}/"))
        virsh(lab, "pool-destroy", "default")
        virsh(lab, "start", "--domain", vm.name)
        lab.wait_for_guest("kc-a", vm.serial)
        yield vm
    finally:
        remove(lab, "kc-a", vm.name)
        virsh(lab, "pool-start", "default", check=False)
        lab.run("kc-a", "sh", "-c", f"umount {place} && rmdir {place}")


@LONG
def test_scratch_that_runs_out_ends_the_copy_and_not_the_guest(lab: Lab, tmp_path: Path) -> None:
    with small_storage(lab, 300) as vm, Ticks(lab, "kc-a", vm.serial) as ticks:
        before = traces(lab, vm.name)
        with under_way(lab, "clone", vm.name, "--retries", "0", *SLOW) as child:
            wait_for_job(lab, vm.name, child)
            fill = f"cd {IMAGES}/small; fallocate -l $(($(df --output=avail -B1 . | tail -1) - 28000000)) ballast"
            lab.run("kc-a", "sh", "-c", fill)
            done = ended(child, 30)
        assert done.code == 6, done.err
        assert "left for what the guest writes" in done.err
        ticks.wait(3)
        assert ticks.longest_pause() < LONGEST_PAUSE
        assert traces(lab, vm.name) == before
        said = failed(lab, "clone", vm, 3, "--idempotent")
        assert "no room on kc-a for what the guest writes" in said


FEW = 4
SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(2, 100))]


@LONG
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_next_sync_ends_equal(lab: Lab, counter: Vm, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    copied(lab, "clone", counter, *chance.choice([(), ("--track",)]))
    for _ in range(FEW):
        event = chance.choices(list(EVENTS), [3, 3, 2, 2, 1])[0]
        print("EVENT", seed, event)
        EVENTS[event](lab, counter, chance)
        wait_until("the source is free", lambda: not traces(lab, counter.name).locks, 50)
    assert_ends_equal(lab, counter)


def _sync(lab: Lab, vm: Vm, *argv: str) -> None:
    copied(lab, "sync", vm, "--idempotent", "--wait", *argv)


def _restart(lab: Lab, vm: Vm, chance: random.Random) -> None:
    power_off(lab, vm)
    if chance.random() < 0.5:
        _sync(lab, vm)
    power_on(lab, vm)


def _kill_in_the_midst(lab: Lab, vm: Vm, chance: random.Random) -> None:
    track = chance.choice([(), ("--track",)])
    point = chance.choice(["begin", "begun", "define", ""])
    with under_way(lab, "sync", vm.name, "--idempotent", "--wait", *track, *SLOW, point=point) as child:
        if not point:
            time.sleep(chance.uniform(1, 6))
        child.kill()


def _lose_power(lab: Lab, vm: Vm, chance: random.Random) -> None:
    argv = ("--idempotent", "--wait", "--track", "--retries", "0", *SLOW, *IMPATIENT)
    with under_way(lab, "sync", vm.name, *argv) as child:
        time.sleep(chance.uniform(1, 6))
        lab.power("off", "kc-a")
        child.communicate(timeout=60)
    lab.power("on", "kc-a")
    power_on(lab, vm)


EVENTS: dict[str, Callable[[Lab, Vm, random.Random], None]] = {
    "sync": lambda lab, vm, chance: _sync(lab, vm),
    "tracking sync": lambda lab, vm, chance: _sync(lab, vm, "--track"),
    "restart": _restart,
    "kill": _kill_in_the_midst,
    "power cut": _lose_power,
}
"""What a sequence is made of; the guest writes all the time."""
