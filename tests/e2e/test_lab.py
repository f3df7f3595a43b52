"""The lab itself, through its command line."""

from __future__ import annotations

import filecmp
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import Ticks, assert_clean, assert_counter, assert_file_system, needs_replay, raw_copy
from labclient import LAB, Lab, Vm

pytestmark = pytest.mark.e2e

DELAY = 0.025  # as in `--delay 25ms`


@pytest.fixture
def delayed(lab: Lab) -> Iterator[Lab]:
    """Give the lab with the link of kc-b delayed."""
    lab.net("shape", "kc-b", "--delay", "25ms", "--rate", "200mbit")
    try:
        yield lab
    finally:
        lab.net("shape", "kc-b", "--clear")


@pytest.fixture
def own_lab(tmp_path: Path) -> Iterator[Lab]:
    """Give a lab of one host that the test may take down."""
    own = Lab(tmp_path / "lab")
    own.command("up", "--hosts", "1")
    try:
        yield own
    finally:
        own.command("down")


def test_status_names_both_hosts(lab: Lab) -> None:
    status = lab.command("status").stdout
    for host in ("kc-a", "kc-b"):
        assert any(line.startswith(host) and "power on  link up" in line for line in status.splitlines())


def test_up_again_changes_nothing(lab: Lab) -> None:
    boot = lab.run("kc-a", "stat", "-c", "%z", "/run").stdout
    lab.command("up")
    assert lab.run("kc-a", "stat", "-c", "%z", "/run").stdout == boot


def test_exec_keeps_arguments_streams_and_exit_code(lab: Lab) -> None:
    odd = ["a b", "", "--", "-x", "*", "it's", "$HOME"]
    assert lab.command("exec", "kc-a", "--", "printf", "%s|", *odd).stdout == "".join(f"{word}|" for word in odd)
    script = "cat; hostname >&2; exit 7"
    done = lab.command("exec", "kc-b", "--", "sh", "-c", script, check=False, input="text\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "text\n", "kc-b\n")


def test_hosts_differ_and_reach_each_other(lab: Lab) -> None:
    addresses = [lab.run(host, "hostname", "-I").stdout.split()[0] for host in ("kc-a", "kc-b")]
    assert lab.ssh("kc-a", f"ssh root@{addresses[1]} hostname").stdout == "kc-b\n"
    assert lab.ssh("kc-b", "ssh kc-a hostname").stdout == "kc-a\n"
    uuids = {lab.run(host, "sh", "-c", "virsh capabilities | grep -m1 uuid").stdout for host in ("kc-a", "kc-b")}
    assert len(uuids) == 2


def test_host_has_an_active_autostarted_pool(lab: Lab) -> None:
    pool = lab.run("kc-b", "virsh", "pool-info", "default").stdout
    fields = dict(line.split(":", 1) for line in pool.splitlines() if line)
    assert fields["State"].strip() == "running"
    assert fields["Autostart"].strip() == "yes"


def test_guest_boots_and_reads_its_data_disk(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("kc-a", "lab-guest", start=True)
    try:
        assert lab.wait_for_guest("kc-a", vm.serial) == "marker of lab-guest vdb"
        assert "guest_agent" not in lab.run("kc-a", "virsh", "dumpxml", vm.uuid).stdout
        time.sleep(1.5)
        lab.run("kc-a", "virsh", "shutdown", vm.uuid)
        _wait_until_off(lab, vm)
        assert "TICK" not in lab.outside("kc-a", vm.serial).read_text()
        assert b"tick 1\n" in raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "vdb").read_bytes()
    finally:
        _remove(lab, vm.uuid)


@pytest.mark.faults
def test_counter_guest_writes_both_disks_in_order(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("kc-a", "lab-counter", start=True, guest="counter")
    try:
        assert lab.wait_for_guest("kc-a", vm.serial) == "marker of lab-counter vdb"
        with Ticks(lab, "kc-a", vm.serial) as ticks:
            seen = ticks.wait(10)
            lab.run("kc-a", "virsh", "suspend", vm.uuid)
            time.sleep(1)
            lab.run("kc-a", "virsh", "resume", vm.uuid)
            ticks.wait()
            assert ticks.longest_pause() >= 1
        lab.run("kc-a", "virsh", "destroy", vm.uuid)
        disks = [raw_copy(lab, "kc-a", vm.disks[target], tmp_path / target) for target in ("vdb", "vdc")]
        assert assert_counter(disks) >= seen.count
    finally:
        _remove(lab, vm.uuid)


@pytest.mark.faults
def test_fs_guest_leaves_a_file_system_that_its_journal_mends(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("kc-a", "lab-fs", ["qcow2:64M:2M"], start=True, guest="fs")
    try:
        with Ticks(lab, "kc-a", vm.serial) as ticks:
            seen = ticks.wait(10)
        lab.run("kc-a", "virsh", "suspend", vm.uuid)
        crashed = raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "crashed")
        lab.run("kc-a", "virsh", "resume", vm.uuid)
        assert needs_replay(crashed)
        assert assert_file_system(crashed, tmp_path / "files") >= seen.count
        assert (tmp_path / "files/stretch-1").stat().st_size == 1 << 20
        lab.run("kc-a", "virsh", "shutdown", vm.uuid)
        _wait_until_off(lab, vm)
        unmounted = raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "unmounted")
        assert not needs_replay(unmounted)
        assert_clean(unmounted)
    finally:
        _remove(lab, vm.uuid)


@pytest.mark.faults
def test_guest_agent_freezes_and_thaws(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("kc-a", "lab-agent", start=True, guest="fs", guest_agent=True)
    try:
        with Ticks(lab, "kc-a", vm.serial) as ticks:
            ticks.wait()
            lab.wait_for_guest_agent("kc-a", vm.uuid)
            assert "/data" in lab.run("kc-a", "virsh", "domfsinfo", vm.uuid).stdout
            assert lab.run("kc-a", "virsh", "domfsfreeze", vm.uuid).stdout == "Froze 1 filesystem(s)\n\n"
            early = raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "early")
            last = len(ticks.seen)
            time.sleep(1)
            assert len(ticks.seen) == last, "a frozen guest must not tick"
            late = raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "late")
            assert lab.run("kc-a", "virsh", "domfsthaw", vm.uuid).stdout == "Thawed 1 filesystem(s)\n\n"
            ticks.wait()
        assert filecmp.cmp(early, late, shallow=False), "a frozen guest must not write"
        assert not needs_replay(late)
        assert_clean(late)
        lab.run("kc-a", "virsh", "shutdown", vm.uuid, "--mode", "agent")
        _wait_until_off(lab, vm)
        assert not needs_replay(raw_copy(lab, "kc-a", vm.disks["vdb"], tmp_path / "unmounted"))
    finally:
        _remove(lab, vm.uuid)


def test_guest_agent_needs_no_workload(lab: Lab) -> None:
    vm = lab.vm("kc-a", "lab-agent", start=True, guest_agent=True)
    try:
        assert lab.wait_for_guest("kc-a", vm.serial) == "marker of lab-agent vdb"
        lab.wait_for_guest_agent("kc-a", vm.uuid)
    finally:
        _remove(lab, vm.uuid)


@pytest.mark.parametrize("name", ["-odd name's", 'a "quoted" & <b>', "ünï cödé", "--help"])
def test_vm_names_may_be_odd(lab: Lab, name: str) -> None:
    vm = lab.vm("kc-a", name, ["raw:4M:1M"], boot=False)
    try:
        assert lab.run("kc-a", "virsh", "domname", vm.uuid).stdout.rstrip("\n") == name
    finally:
        _remove(lab, vm.uuid)


def test_disk_content_is_reproducible_in_every_format(lab: Lab) -> None:
    contents = []
    for kind in ("raw", "qcow2", "raw"):
        vm = lab.vm("kc-a", "lab-disk", [f"{kind}:16M:4M"], boot=False)
        lab.run("kc-a", "qemu-img", "convert", "-f", kind, "-O", "raw", vm.disks["vda"], "/tmp/content")
        contents.append(lab.run("kc-a", "sha256sum", "/tmp/content").stdout)
        tail = lab.run("kc-a", "sh", "-c", "tail -c 512 /tmp/content | tr -d '\\0' | wc -c").stdout
        assert int(tail) > 0, "data must reach the disk's end"
        used = int(lab.run("kc-a", "stat", "-c", "%b", vm.disks["vda"]).stdout) * 512
        assert used < 8 << 20, "holes must stay holes"
    assert len(set(contents)) == 1
    _remove(lab, vm.uuid)


def test_vm_replaces_one_of_its_name(lab: Lab) -> None:
    lab.vm("kc-a", "lab-again", ["raw:4M:1M", "raw:4M:1M"], boot=False)
    vm = lab.vm("kc-a", "lab-again", ["qcow2:4M:1M"], boot=False)
    images = lab.run("kc-a", "ls", "/var/lib/libvirt/images").stdout.split()
    assert [name for name in images if name.startswith("lab-again")] == ["lab-again-vda.qcow2"]
    _remove(lab, vm.uuid)


def test_power_cut_keeps_disks_and_identity(lab: Lab) -> None:
    vm = lab.vm("kc-b", "lab-power", ["raw:4M:1M"], boot=False)
    lab.run("kc-b", "touch", "/run/gone")
    lab.power("off", "kc-b")
    refused = lab.command("exec", "kc-b", "--", "true", check=False)
    assert refused.stderr == "lab: kc-b is off: run lab/lab power on kc-b\n"
    lab.power("on", "kc-b")
    assert lab.ssh("kc-b", "test ! -e /run/gone && virsh domname " + vm.uuid).stdout.strip() == "lab-power"
    _remove(lab, vm.uuid, "kc-b")


def test_net_cut_and_heal(lab: Lab) -> None:
    lab.net("cut", "kc-b")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            lab.ssh("kc-b", "true", timeout=2)
    finally:
        lab.net("heal", "kc-b")
    assert lab.ssh("kc-b", "true").returncode == 0


def test_net_shape_limits_the_rate(lab: Lab) -> None:
    lab.net("shape", "kc-b", "--rate", "100mbit")
    try:
        assert "link up, shaped" in lab.command("status").stdout
    finally:
        lab.net("shape", "kc-b", "--clear")
    assert "shaped" not in lab.command("status").stdout


def test_net_shape_delays_each_direction(lab: Lab) -> None:
    undelayed = _round_trip(lab, "kc-b")
    try:
        for delay in ("60ms", "25ms"):  # the second in place of the first
            lab.net("shape", "kc-b", "--delay", delay)
            assert "link up, shaped" in lab.command("status").stdout
        assert 2 * DELAY <= _round_trip(lab, "kc-b") < undelayed + 4 * DELAY
    finally:
        lab.net("shape", "kc-b", "--clear")
    assert _round_trip(lab, "kc-b") < 2 * DELAY
    assert "shaped" not in lab.command("status").stdout


def test_delayed_link_carries_data_intact_in_both_directions(delayed: Lab) -> None:
    data = os.urandom(16 << 20)
    started = time.monotonic()
    done = subprocess.run(
        delayed.ssh_argv("kc-b", "tee /tmp/data; sha256sum /tmp/data >&2; rm /tmp/data"),
        input=data,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stderr.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert done.stdout == data
    assert time.monotonic() - started > len(data) * 8 / 220e6, "the rate must hold with a delay too"


def test_connection_outlives_a_change_of_shape(lab: Lab) -> None:
    with subprocess.Popen(
        lab.ssh_argv("kc-b", "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for number, change in enumerate((["--delay", "25ms"], ["--delay", "5ms"], ["--clear"])):
                lab.net("shape", "kc-b", *change)
                process.stdin.write(f"{number}\n")
                assert process.stdout.readline() == f"{number}\n"
        finally:
            lab.net("shape", "kc-b", "--clear")


def test_net_cut_and_heal_of_a_delayed_link(delayed: Lab) -> None:
    delayed.net("cut", "kc-b")
    try:
        assert "link cut, shaped" in delayed.command("status").stdout
        with pytest.raises(subprocess.TimeoutExpired):
            delayed.ssh("kc-b", "true", timeout=2)
    finally:
        delayed.net("heal", "kc-b")
    assert _round_trip(delayed, "kc-b") >= 2 * DELAY


def test_shape_that_fails_leaves_the_link_unshaped(lab: Lab) -> None:
    assert lab.command("net", "shape", "kc-b", "--delay", "25ms", "--rate", "much", check=False).returncode == 1
    assert "shaped" not in lab.command("status").stdout
    assert lab.ssh("kc-b", "true").returncode == 0


@pytest.mark.faults
def test_power_cut_and_down_end_the_delay(own_lab: Lab) -> None:
    assert _traces(own_lab)
    own_lab.net("shape", "kc-a", "--delay", "25ms")
    own_lab.power("off", "kc-a")
    assert not any("kc-a" in trace or "pid" in trace for trace in _traces(own_lab))
    own_lab.power("on", "kc-a")
    assert "shaped" not in own_lab.command("status").stdout
    own_lab.net("shape", "kc-a", "--delay", "25ms")
    own_lab.command("down")
    assert _traces(own_lab) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["exec", "kc-q", "--", "true"],
        ["exec", "kc-a"],
        ["vm", "kc-a"],
        ["vm", "kc-a", "x", "--disk", "vmdk:1G"],
        ["vm", "kc-a", "a/b"],
        ["vm", "kc-a", "x", "--guest", "idle"],
        ["vm", "kc-a", "x", "--guest", "counter", "--no-boot-disk"],
        ["vm", "kc-a", "x", "--guest-agent", "--no-boot-disk"],
        ["vm", "kc-a", "x", "--guest", "counter", "--disk", "raw:64M"],
        ["power", "sideways", "kc-a"],
        ["net", "shape", "kc-a"],
        ["net", "shape", "kc-a", "--rate", "much"],
        ["net", "shape", "kc-a", "--delay", "25"],
        ["frobnicate"],
    ],
)
def test_errors_are_one_line(lab: Lab, argv: list[str]) -> None:
    done = lab.command(*argv, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("lab: ")
    assert done.stderr.count("\n") == 1


def test_help_shows_examples() -> None:
    done = subprocess.run([str(LAB), "--help"], capture_output=True, text=True, check=True)
    assert "lab/lab vm kc-a web --start" in done.stdout


def _round_trip(lab: Lab, host: str) -> float:
    """Seconds that connecting takes, at best: the first one may have to ask for the MAC address."""
    address = lab.run(host, "hostname", "-I").stdout.split()[0]
    taken = []
    for _ in range(5):
        started = time.monotonic()
        socket.create_connection((address, 22), timeout=10).close()
        taken.append(time.monotonic() - started)
    return min(taken)


def _traces(lab: Lab) -> list[str]:
    """Namespaces and interfaces of a lab on this machine, and what its switch has and runs."""
    tag = "kc" + hashlib.sha256(str(lab.state.resolve()).encode()).hexdigest()[:6]
    found = [line for line in _ip("netns", "list") + _ip("-oneline", "link", "show") if tag in line]
    if any(line.startswith(f"{tag}-sw") for line in found):
        found += _ip("-netns", f"{tag}-sw", "-oneline", "link", "show")
        found += [f"pid {pid}" for pid in _ip("netns", "pids", f"{tag}-sw")]
    return found


def _ip(*argv: str) -> list[str]:
    return subprocess.run(["ip", *argv], capture_output=True, text=True, check=True).stdout.splitlines()


def _wait_until_off(lab: Lab, vm: Vm, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while "shut off" not in lab.run(vm.host, "virsh", "domstate", vm.uuid).stdout:
        assert time.monotonic() < deadline, f"{vm.name} is not off after {seconds} s"
        time.sleep(0.1)


def _remove(lab: Lab, uuid: str, host: str = "kc-a") -> None:
    lab.run(host, "virsh", "destroy", uuid, check=False)
    lab.run(host, "virsh", "undefine", uuid, "--remove-all-storage")
