"""Clones that fail or are hit on their way: rolled back, kept or got over, and the exit code says which."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clonekit import (
    EMULATOR,
    HASTY,
    IMAGES,
    IMPATIENT,
    agents,
    assert_becomes,
    assert_equal,
    assert_nothing_left,
    children_of,
    ended,
    kill,
    kvm_clone,
    leftovers,
    parts,
    picture,
    pids,
    refused_in_the_end,
    remove,
    running,
    stopped,
    wait_for_copy,
    wait_for_durable,
    wait_until,
    wipe,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

SLOW = ("--bandwidth-limit", "3M")
"""Keeps the copy of `victim` going for long enough to hit it in the middle."""

ROLL_BACK = ("--retries", "0", "--no-keep-partial")


@pytest.fixture(scope="module")
def victim(lab: Lab) -> Iterator[Vm]:
    """A VM whose clone is interrupted: one qcow2 disk, so that qemu-nbd runs, and one raw."""
    yield lab.vm("kc-a", "victim", ["qcow2:40M:5M", "raw:40M:5M"], boot=False)
    remove(lab, "kc-a", "victim")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    if leftovers(lab, "kc-b") or picture(lab, "kc-b").domains.strip():
        wipe(lab)


def _controller(lab: Lab, child: subprocess.Popen[str]) -> None:
    child.kill()


def _nth_agent(host: str, index: int) -> Callable[[Lab, subprocess.Popen[str]], None]:
    def hit(lab: Lab, child: subprocess.Popen[str]) -> None:
        kill(lab, host, agents(lab, host)[index])

    return hit


def _nbd(lab: Lab, child: subprocess.Popen[str]) -> None:
    kill(lab, "kc-b", pids(lab, "kc-b", "qemu-nbd")[0])


def _connection(number: int) -> Callable[[Lab, subprocess.Popen[str]], None]:
    """Kill one of the controller's ssh processes: 0 and 1 are the masters."""

    def hit(lab: Lab, child: subprocess.Popen[str]) -> None:
        os.kill(children_of(child.pid)[number], signal.SIGKILL)

    return hit


PROCESSES = {
    "source control agent": _nth_agent("kc-a", 0),
    "sender": _nth_agent("kc-a", 1),
    "destination control agent": _nth_agent("kc-b", 0),
    "receiver": _nth_agent("kc-b", 1),
    "qemu-nbd": _nbd,
    "first connection": _connection(0),
    "second connection": _connection(1),
}

ROUTES = ["direct", pytest.param("relay", marks=pytest.mark.faults)]
"""`make test` takes the one, `make test-faults` both."""

ROLLED_BACK = [
    *((process, "direct") for process in ("controller", *PROCESSES)),
    ("sender", "relay"),
    *(pytest.param(process, "relay", marks=pytest.mark.faults) for process in ("controller", "receiver", "qemu-nbd")),
]


@pytest.mark.parametrize(("process", "route"), ROLLED_BACK)
def test_a_killed_process_leaves_the_destination_as_before(lab: Lab, victim: Vm, process: str, route: str) -> None:
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    with running(lab, "kc-a", "kc-b", "victim", "--route", route, *SLOW, *ROLL_BACK) as child:
        wait_for_copy(lab, count=2)
        PROCESSES.get(process, _controller)(lab, child)
        done = ended(child)
    assert done.code == (-signal.SIGKILL if process == "controller" else 6), done.err
    assert "Traceback" not in done.err
    for host in ("kc-a", "kc-b"):
        assert_becomes(lab, host, before[host])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_killed_process_is_got_over_within_the_run(lab: Lab, victim: Vm, process: str, route: str) -> None:
    with running(lab, "kc-a", "kc-b", "victim", "--route", route, *SLOW, "--output", "json") as child:
        wait_for_copy(lab, count=2)
        PROCESSES[process](lab, child)
        done = ended(child)
    assert done.code == 0, done.err
    assert "going on in" in done.err
    assert done.document["changed"] is True
    assert done.document["verified"] is True
    assert_equal(lab, victim)
    assert_nothing_left(lab)


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_killed_controller_leaves_is_finished_by_the_next_one(lab: Lab, victim: Vm, route: str) -> None:
    with running(lab, "kc-a", "kc-b", "victim", "--route", route, *SLOW) as child:
        wait_for_copy(lab, count=2, written=2 << 20)
        wait_for_durable(lab, "vdb", 1)
        child.kill()
        ended(child)
    wait_until("the agents have ended", lambda: not leftovers(lab, "kc-b").keys() - {"staged"})
    assert len(parts(lab)) == 2
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--idempotent", "--output", "json")
    assert done.code == 0, done.err
    assert done.document["bytes_reused"] > 0
    assert_equal(lab, victim)
    assert_nothing_left(lab)


SIGNALS = [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 6),
    pytest.param(signal.SIGHUP, 6, marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_rolls_back_where_nothing_is_to_be_kept(
    lab: Lab, victim: Vm, number: signal.Signals, code: int
) -> None:
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    with running(lab, "kc-a", "kc-b", "victim", *SLOW, "--no-keep-partial") as child:
        wait_for_copy(lab)
        child.send_signal(number)
        done = ended(child)
        # What a user finds when the prompt is back, not a while later.
        assert not parts(lab)
    assert done.code == code, done.err
    for host in ("kc-a", "kc-b"):
        assert_becomes(lab, host, before[host])


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_keeps_what_was_copied(lab: Lab, victim: Vm, number: signal.Signals, code: int) -> None:
    with running(lab, "kc-a", "kc-b", "victim", *SLOW) as child:
        wait_for_copy(lab, count=2)
        child.send_signal(number)
        done = ended(child)
        # The lock is free and nothing runs when the prompt is back.
        again = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--resume")
    assert done.code == code, done.err
    assert "kept on kc-b" in done.err
    assert "--resume" in done.err
    assert again.code == 0, again.err
    assert_equal(lab, victim)
    assert_nothing_left(lab)


def test_ctrl_c_at_a_terminal_reaches_the_whole_group(lab: Lab, victim: Vm) -> None:
    """A terminal signals every process of the group, ssh as well: rolling back must still work."""
    before = picture(lab, "kc-b")
    with running(lab, "kc-a", "kc-b", "victim", *SLOW, "--no-keep-partial") as child:
        wait_for_copy(lab)
        for pid in (child.pid, *children_of(child.pid)):
            with contextlib.suppress(ProcessLookupError):  # the first of them may end others before it is their turn
                os.kill(pid, signal.SIGINT)
        done = ended(child)
    assert done.code == 130, done.err
    assert_becomes(lab, "kc-b", before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_timeout_is_an_interruption(lab: Lab, victim: Vm, keep: bool) -> None:
    before = picture(lab, "kc-b")
    how = () if keep else ("--no-keep-partial",)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", *SLOW, "--timeout", "4", "--output", "json", *how)
    assert done.code == 6
    assert done.document["error"]["exit_code"] == 6
    assert "--timeout" in done.document["error"]["remedy"]
    if not keep:
        assert_becomes(lab, "kc-b", before)
        return
    assert "--resume" in done.document["error"]["remedy"]
    assert len(parts(lab)) == 2
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--resume").code == 0
    assert_equal(lab, victim)


@pytest.mark.faults
def test_a_cut_network_rolls_back_on_both_sides(lab: Lab, victim: Vm) -> None:
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    with running(lab, "kc-a", "kc-b", "victim", *SLOW, *ROLL_BACK) as child:
        wait_for_copy(lab)
        lab.net("cut", "kc-b")
        try:
            done = ended(child, 150)
        finally:
            lab.net("heal", "kc-b")
    assert done.code == 6, done.err
    for host in ("kc-a", "kc-b"):
        assert_becomes(lab, host, before[host], 120)


def test_a_network_that_comes_back_is_got_over_within_the_run(lab: Lab, victim: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "victim", *SLOW, *IMPATIENT) as child:
        wait_for_copy(lab)
        lab.net("cut", "kc-b")
        try:
            assert child.stderr is not None
            while "going on in" not in child.stderr.readline():
                assert child.poll() is None
        finally:
            lab.net("heal", "kc-b")
        done = ended(child, 150)
    assert done.code == 0, done.err
    assert_equal(lab, victim)
    assert_nothing_left(lab)


def test_after_a_power_cut_of_the_destination_the_same_command_succeeds(lab: Lab, victim: Vm) -> None:
    how = ("--idempotent", "--retries", "1", *IMPATIENT)
    with running(lab, "kc-a", "kc-b", "victim", *SLOW, *how, variables=HASTY) as child:
        wait_for_copy(lab)
        lab.power("off", "kc-b")
        done = ended(child, 150)
    lab.power("on", "kc-b")
    assert done.code == 6, done.err
    assert "--idempotent" in done.err
    assert parts(lab)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--idempotent").code == 0
    assert_equal(lab, victim)
    assert_nothing_left(lab)


def _overwrite(lab: Lab, target: str) -> None:
    with open(next(path for path in parts(lab) if path.endswith(f"-{target}.part")), "r+b") as file:
        file.write(os.urandom(64))


def test_a_corrupted_copy_is_mended(lab: Lab, victim: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "victim", "--output", "json", *SLOW) as child:
        wait_for_copy(lab, count=2, written=2 << 20)
        _overwrite(lab, "vdb")
        done = ended(child)
    assert done.code == 0, done.err
    assert done.document["bytes_resent"] > 0
    assert_equal(lab, victim)


def test_a_copy_that_stays_corrupted_is_never_committed(lab: Lab, victim: Vm) -> None:
    before = picture(lab, "kc-b")
    with running(lab, "kc-a", "kc-b", "victim", "--output", "json", *SLOW) as child:
        wait_for_copy(lab, count=2, written=2 << 20)
        while child.poll() is None:
            with contextlib.suppress(StopIteration, FileNotFoundError):
                _overwrite(lab, "vdb")
            time.sleep(0.002)
        done = ended(child)
    assert done.code == 7, done.err
    assert "vdb differs" in done.document["error"]["message"]
    assert_becomes(lab, "kc-b", before)


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_a_source_that_changes_under_the_copy_is_copied_as_it_is_in_the_end(lab: Lab, victim: Vm, verify: str) -> None:
    with running(lab, "kc-a", "kc-b", "victim", verify, *SLOW) as child:
        wait_for_copy(lab, count=2, written=2 << 20)
        with lab.outside("kc-a", victim.disks["vdb"]).open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(64))
        done = ended(child)
    assert done.code == 0, done.err
    assert "was changed" in done.err
    assert_equal(lab, victim)


@pytest.mark.faults
def test_a_source_that_keeps_changing_is_given_up(lab: Lab, victim: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "victim", "--retries", "1", *SLOW) as child:
        wait_for_copy(lab)
        while child.poll() is None:
            lab.outside("kc-a", victim.disks["vdb"]).touch()
            time.sleep(0.01)
        done = ended(child)
    assert done.code == 6, done.err
    assert "was changed" in done.err
    assert "victim" not in picture(lab, "kc-b").domains


def test_a_file_that_appears_at_the_final_path_is_never_overwritten(lab: Lab, victim: Vm) -> None:
    squatter = lab.outside("kc-b", f"{IMAGES}/victim-vdb.raw")
    try:
        with running(lab, "kc-a", "kc-b", "victim", *SLOW) as child:
            wait_for_copy(lab)
            squatter.write_text("somebody's")
            before = picture(lab, "kc-b").files
            done = ended(child)
        assert done.code == 6, done.err
        assert "victim-vdb.raw" in done.err
        assert squatter.read_text() == "somebody's"
        names = [name for name, _, _ in before if ".kvm-clone-" not in name]
        wait_until("rolled back", lambda: [name for name, _, _ in picture(lab, "kc-b").files] == names)
        again = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--output", "json")
        assert again.code == 0, again.err
        paths = [disk["destination"] for disk in again.document["disks"]]
        assert paths == [f"{IMAGES}/victim-vda.qcow2", f"{IMAGES}/victim-vdb-vdb.raw"]
        assert squatter.read_text() == "somebody's"
    finally:
        remove(lab, "kc-b", "victim")
        squatter.unlink(missing_ok=True)


@pytest.mark.faults
def test_libvirtd_restarted_in_the_midst_of_the_copy(lab: Lab, victim: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "victim", *SLOW) as child:
        wait_for_copy(lab)
        kill(lab, "kc-b", pids(lab, "kc-b", "libvirtd")[0], signal.SIGTERM)
        wait_until("libvirtd has ended", lambda: not pids(lab, "kc-b", "libvirtd"))
        lab.run("kc-b", "libvirtd", "-d")
        done = ended(child)
    assert done.code == 0, done.err
    assert_equal(lab, victim)
    assert_nothing_left(lab)


def test_an_existing_vm_is_left_alone(lab: Lab, victim: Vm) -> None:
    lab.vm("kc-b", "victim", ["raw:8M:1M"], boot=False)
    before = picture(lab, "kc-b")
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--output", "json")
    assert done.code == 4
    assert done.document["error"]["findings"][0]["code"] == "domain-exists"
    assert picture(lab, "kc-b") == before
    remove(lab, "kc-b", "victim")


def test_a_second_operation_on_the_same_vm_is_locked_out(lab: Lab, victim: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "victim", *SLOW) as child:
        wait_for_copy(lab)
        with stopped(child):
            second = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim")
        assert second.code == 8, second.err
        assert f"process {child.pid}" in second.err
        assert len(parts(lab)) == 2
        assert child.wait(90) == 0
    remove(lab, "kc-b", "victim")


def test_a_definition_that_libvirt_refuses_rolls_back(lab: Lab, victim: Vm) -> None:
    before = picture(lab, "kc-b")
    with refused_in_the_end(lab, victim), running(lab, "kc-a", "kc-b", "victim", *SLOW) as child:
        wait_for_copy(lab)
        lab.run("kc-b", "rm", EMULATOR)
        done = ended(child)
    assert done.code == 6, done.err
    assert f"defining victim on kc-b: Cannot check QEMU binary {EMULATOR}" in done.err
    assert_becomes(lab, "kc-b", before)


def _config_with(lab: Lab, tmp_path: Path, change: Callable[[str], str], known_hosts: str | None = None) -> Path:
    """A copy of the lab's ssh configuration with something wrong in it."""
    text = lab.ssh_config.read_text()
    if known_hosts is not None:
        (tmp_path / "known_hosts").write_text(known_hosts)
        text = text.replace(str(lab.state / "known_hosts"), str(tmp_path / "known_hosts"))
    config = tmp_path / "ssh_config"
    config.write_text(change(text))
    return config


def _clone_with(config: Path) -> tuple[int, str]:
    lab = Lab(config.parent)
    assert lab.ssh_config == config
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim")
    return done.code, done.err


def test_a_wrong_host_key_is_refused_at_once(lab: Lab, victim: Vm, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    lines = [f"{line.split()[0]} {key}" for line in (lab.state / "known_hosts").read_text().splitlines() if line]
    code, err = _clone_with(_config_with(lab, tmp_path, str, "\n".join(lines) + "\n"))
    assert code == 5
    assert "key" in err
    assert "known_hosts" in err
    assert "trying again" not in err


def test_an_unknown_host_key_is_refused_at_once(lab: Lab, victim: Vm, tmp_path: Path) -> None:
    def ask(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if "StrictHostKeyChecking" not in line) + "\n"

    code, err = _clone_with(_config_with(lab, tmp_path, ask, ""))
    assert code == 5
    assert "trying again" not in err


def test_a_refused_key_is_not_tried_again(lab: Lab, victim: Vm, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    identity = str(lab.state / "id_ed25519")
    config = _config_with(lab, tmp_path, lambda text: text.replace(identity, str(tmp_path / "other")))
    code, err = _clone_with(config)
    assert code == 5
    assert "refused to let us in" in err
    assert "trying again" not in err


def _written_by_another(lab: Lab, vm: Vm) -> str:
    lab.run("kc-a", "sh", "-c", f"qemu-nbd -f qcow2 -t -k /run/other.sock --fork {vm.disks['vda']}")
    return "in use"


def _with_xml(old: str, new: str, said: str) -> Callable[[Lab, Vm], str]:
    def change(lab: Lab, vm: Vm) -> str:
        xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
        assert old in xml
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace(old, new, 1))
        return said

    return change


_BLOCK_DISK = (
    "<disk type='block' device='disk'><driver type='raw'/><source dev='/dev/loop7'/><target dev='vdx'/></disk>"
)
_NETWORK_DISK = (
    "<disk type='network' device='disk'><driver type='raw'/><source protocol='nbd' name='far'><host name='h'/></source>"
    "<target dev='vdy'/></disk>"
)
_TPM = "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
_WRITTEN_LOADER = "</type><loader type='pflash'>/var/lib/libvirt/images/refused.fd</loader>"

REFUSALS: dict[str, Callable[[Lab, Vm], str]] = {
    "an image in use": _written_by_another,
    "a block device": _with_xml("</devices>", f"{_BLOCK_DISK}</devices>", "/dev/loop7"),
    "a network disk": _with_xml("</devices>", f"{_NETWORK_DISK}</devices>", "vdy"),
    "a TPM": _with_xml("</devices>", f"{_TPM}</devices>", "TPM"),
    "UEFI variables in the loader": _with_xml("</type>", _WRITTEN_LOADER, "UEFI"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_handled_is_refused_by_name(lab: Lab, reason: str) -> None:
    vm = lab.vm("kc-a", "refused", ["qcow2:16M:1M"], boot=False)
    named = REFUSALS[reason](lab, vm)
    before = picture(lab, "kc-b")
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "refused", "--output", "json")
        assert done.code == 3, done.err
        assert named in done.err
        findings = done.document["error"]["findings"]
        assert [finding for finding in findings if named in finding["text"]], json.dumps(findings)
        assert picture(lab, "kc-b") == before
    finally:
        for pid in pids(lab, "kc-a", "qemu-nbd"):
            kill(lab, "kc-a", pid)
        remove(lab, "kc-a", "refused")
        lab.run("kc-a", "sh", "-c", f"rm -f {IMAGES}/refused*")


def test_all_findings_are_told_at_once(lab: Lab, victim: Vm) -> None:
    lab.vm("kc-b", "there", ["raw:8M:1M"], boot=False)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "victim", "--new-name", "there", "--pool", "nowhere")
    assert done.code == 3
    assert "already has a VM named there" in done.err
    assert "no storage pool named nowhere" in done.err
    remove(lab, "kc-b", "there")


def test_a_vm_that_is_not_there(lab: Lab) -> None:
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "no such vm")
    assert done.code == 3
    assert "kvm-clone list kc-a" in done.err
