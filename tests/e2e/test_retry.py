"""The retry flags against everything that a destination may have, and what is kept, sent again and removed."""

from __future__ import annotations

import os
import pty
import select
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
    PROGRAM,
    Done,
    assert_becomes,
    assert_equal,
    assert_nothing_left,
    disks_of,
    ended,
    environment,
    interrupt,
    kvm_clone,
    leftovers,
    parts,
    picture,
    refused_in_the_end,
    remove,
    running,
    wait_for_copy,
    wait_for_durable,
    wait_until,
    wipe,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SLOW = ("--bandwidth-limit", "2M")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    """Whatever a test leaves, the next one does not find."""
    yield
    wipe(lab)


def clone(lab: Lab, name: str, *argv: str) -> Done:
    return kvm_clone(lab, "clone", "kc-a", "kc-b", name, "--output", "json", *argv)


def write(lab: Lab, vm: Vm, target: str, offset: int, data: bytes | None = None) -> None:
    """Change the source's disk, which is raw."""
    with lab.outside(vm.host, vm.disks[target]).open("r+b") as file:
        file.seek(offset)
        file.write(data or os.urandom(4096))


def files(lab: Lab) -> list[str]:
    """The names in the destination's pool."""
    return [name for name, _, _ in picture(lab, "kc-b").files]


# The table.


def _nothing(lab: Lab, vm: Vm) -> None:
    pass


def _interrupted(lab: Lab, vm: Vm) -> None:
    interrupt(lab, "kc-a", "kc-b", vm.name, *SLOW, disk="vdb", at=1)


def _finished(lab: Lab, vm: Vm) -> None:
    done = clone(lab, vm.name)
    assert done.code == 0, done.err


def _changed(lab: Lab, vm: Vm) -> None:
    _finished(lab, vm)
    write(lab, vm, "vdb", 0)


def _running(lab: Lab, vm: Vm) -> None:
    _finished(lab, vm)
    _started_and_changed(lab, vm)


def _started_and_changed(lab: Lab, vm: Vm) -> None:
    lab.run("kc-b", "virsh", "start", vm.name)
    write(lab, vm, "vdb", 0)


def _foreign(lab: Lab, vm: Vm) -> None:
    lab.vm("kc-b", vm.name, ["raw:4M:1M", "qcow2:4M:1M", "raw:4M:1M"], boot=False)


def _foreign_running(lab: Lab, vm: Vm) -> None:
    _foreign(lab, vm)
    lab.run("kc-b", "virsh", "start", vm.name)


STATES: dict[str, Callable[[Lab, Vm], None]] = {
    "nothing": _nothing,
    "interrupted": _interrupted,
    "finished": _finished,
    "changed since": _changed,
    "running": _running,
    "foreign": _foreign,
    "foreign, running": _foreign_running,
}

FLAGS = ("", "--idempotent", "--force", "--cleanup-existing", "--resume")

CODES: dict[str, tuple[int, ...]] = {  # in the order of FLAGS
    "nothing": (0, 0, 0, 0, 3),
    "interrupted": (4, 0, 0, 0, 0),
    "finished": (4, 0, 0, 0, 4),
    "changed since": (4, 0, 0, 0, 4),
    "running": (4, 3, 0, 0, 4),
    "foreign": (4, 0, 0, 0, 4),
    "foreign, running": (4, 3, 0, 0, 4),
}

DONE = [(state, flag) for state in STATES for flag, code in zip(FLAGS, CODES[state], strict=True) if not code]


@pytest.fixture
def row(lab: Lab) -> Vm:
    return lab.vm("kc-a", "row", ["qcow2:8M:3M", "raw:8M:3M"], boot=False)


def argv_of(flag: str) -> list[str]:
    return [flag] if flag else []


@pytest.mark.parametrize("state", STATES)
def test_what_the_table_refuses_changes_nothing(lab: Lab, row: Vm, state: str) -> None:
    STATES[state](lab, row)
    before = picture(lab, "kc-b")
    for flag, code in zip(FLAGS, CODES[state], strict=True):
        if code:
            done = clone(lab, "row", *argv_of(flag))
            assert (flag, done.code) == (flag, code), done.err
            assert "--" in done.document["error"]["remedy"]
            assert picture(lab, "kc-b") == before


@pytest.mark.parametrize(("state", "flag"), DONE)
def test_what_the_table_does_ends_with_the_clone_alone(lab: Lab, row: Vm, state: str, flag: str) -> None:
    STATES[state](lab, row)
    there = lab.run("kc-b", "virsh", "domuuid", "row", check=False).stdout.strip()
    done = clone(lab, "row", *argv_of(flag))
    assert done.code == 0, done.err
    result = done.document
    assert result["changed"] is not (state == "finished" and flag == "--idempotent")
    if state == "interrupted":
        assert (result["bytes_reused"] > 0) is (flag in ("--idempotent", "--resume"))
    if there and flag != "--cleanup-existing":
        assert result["uuid"] == there
    assert_equal(lab, row)
    assert lab.run("kc-b", "virsh", "domstate", "row").stdout.strip() == "shut off"
    assert sorted(files(lab)) == sorted(path.rpartition("/")[2] for path, _ in disks_of(lab, "kc-b", "row").values())
    assert_nothing_left(lab)


def test_two_flags_contradict_each_other(lab: Lab, row: Vm) -> None:
    assert clone(lab, "row", "--idempotent", "--force").code == 2


# Replacing.

_SPARE = """
<disk type='file' device='{device}'><driver name='qemu' type='{format}'/><source file='{path}'/>
<target dev='{target}' bus='{bus}'/>{more}</disk>
"""


def _with_disks(lab: Lab, name: str, *disks: str) -> None:
    xml = lab.run("kc-b", "virsh", "dumpxml", "--inactive", name).stdout
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml.replace("</devices>", "".join(disks) + "</devices>"))


def test_only_what_the_replaced_vm_had_alone_goes(lab: Lab, row: Vm) -> None:
    lab.vm("kc-b", "other", ["raw:4M:1M"], boot=False)
    lab.vm("kc-b", "row", ["raw:4M:1M"], boot=False)
    script = f"""
    cd {IMAGES}
    for name in shared.raw readonly.raw medium.iso used.raw base.raw middle.raw; do truncate -s 1M $name; done
    qemu-img create -q -f qcow2 -b base.raw -F raw overlay.qcow2
    qemu-img create -q -f qcow2 -b middle.raw -F raw others.qcow2
    """
    lab.run("kc-b", "sh", "-e", "-c", script)

    def disk(name: str, target: str, more: str = "", device: str = "disk", bus: str = "sata") -> str:
        form = "qcow2" if name.endswith("qcow2") else "raw"
        return _SPARE.format(device=device, format=form, path=f"{IMAGES}/{name}", target=target, more=more, bus=bus)

    _with_disks(
        lab,
        "row",
        disk("shared.raw", "sdb", "<shareable/>"),
        disk("readonly.raw", "vdc", "<readonly/>", bus="virtio"),
        disk("medium.iso", "sdd", "<readonly/>", "cdrom"),
        disk("used.raw", "sde"),
        disk("overlay.qcow2", "sdf"),
        disk("middle.raw", "sdg"),
    )
    _with_disks(lab, "other", disk("used.raw", "sdb"), disk("others.qcow2", "sdc"))
    done = clone(lab, "row", "--idempotent")
    assert done.code == 0, done.err
    assert sorted(done.document["removed"]) == [f"{IMAGES}/overlay.qcow2", f"{IMAGES}/row-vda.raw"]
    kept = ["base.raw", "medium.iso", "middle.raw", "other-vda.raw", "others.qcow2", "readonly.raw"]
    kept += ["row-vda.qcow2", "row-vdb.raw", "shared.raw", "used.raw"]
    assert sorted(files(lab)) == kept
    assert_equal(lab, row)


def test_what_libvirt_keeps_of_the_replaced_vm_goes(lab: Lab, row: Vm) -> None:
    lab.vm("kc-b", "row", ["qcow2:8M:1M"], boot=False)
    script = """
    virsh snapshot-create-as row first
    virsh snapshot-create-as row second
    virsh start row
    virsh checkpoint-create-as row mark
    virsh managedsave row
    """
    lab.run("kc-b", "sh", "-e", "-c", script)
    done = clone(lab, "row", "--idempotent")
    assert done.code == 0, done.err
    assert {"managed save", "snapshot first", "snapshot second", "checkpoint mark"} <= set(done.document["removed"])
    left = (
        "virsh snapshot-list row --name; virsh checkpoint-list row --name; virsh list --all --with-managed-save --name"
    )
    assert lab.run("kc-b", "sh", "-c", left).stdout.split() == []
    assert_equal(lab, row)
    lab.run("kc-b", "virsh", "undefine", "row")


def test_an_interrupted_replacement_leaves_the_old_vm_as_it_was(lab: Lab) -> None:
    source = lab.vm("kc-a", "swap", ["raw:16M:8M"], boot=False)
    old = lab.vm("kc-b", "swap", ["raw:8M:2M"])
    before = {path: lab.outside("kc-b", path).read_bytes() for path in old.disks.values()}
    with running(lab, "kc-a", "kc-b", "swap", "--idempotent", *SLOW) as child:
        wait_for_durable(lab, "vda", 1)
        child.kill()
        ended(child)
    wait_until("the agents have ended", lambda: not leftovers(lab, "kc-b").keys() - {"staged"})
    assert {path: lab.outside("kc-b", path).read_bytes() for path in before} == before
    assert lab.run("kc-b", "virsh", "domuuid", "swap").stdout.strip() == old.uuid
    lab.run("kc-b", "virsh", "start", "swap")
    assert lab.wait_for_guest("kc-b", old.serial) == "marker of swap vdb"
    assert clone(lab, "swap", "--idempotent").code == 3
    lab.run("kc-b", "virsh", "destroy", "swap")
    done = clone(lab, "swap", "--idempotent")
    assert done.code == 0, done.err
    assert done.document["bytes_reused"] > 0
    assert done.document["uuid"] == old.uuid
    assert_equal(lab, source)
    assert not [path for path in before if lab.outside("kc-b", path).exists()]
    assert_nothing_left(lab)


def test_cleanup_existing_makes_room_first_and_says_so(lab: Lab, row: Vm) -> None:
    old = lab.vm("kc-b", "row", ["raw:16M:8M"], boot=False)
    shown = clone(lab, "row", "--cleanup-existing", "--dry-run").document
    steps = [step["step"] for step in shown["steps"]]
    assert steps.index("RemoveExisting") < steps.index("CreateDisk")
    assert [finding for finding in shown["findings"] if "before the copy begins" in finding["text"]]
    with running(lab, "kc-a", "kc-b", "row", "--cleanup-existing", *SLOW) as child:
        wait_for_copy(lab)
        assert not lab.outside("kc-b", old.disks["vda"]).exists()
        assert child.wait(60) == 0
    assert_equal(lab, row)


def test_a_vm_that_was_stopped_for_a_definition_that_is_refused_is_started_again(lab: Lab, row: Vm) -> None:
    _foreign_running(lab, row)
    before = picture(lab, "kc-b")
    with refused_in_the_end(lab, row), running(lab, "kc-a", "kc-b", "row", "--force", *SLOW) as child:
        wait_for_copy(lab)
        lab.run("kc-b", "rm", EMULATOR)
        done = ended(child)
    assert done.code == 6, done.err
    assert f"defining row on kc-b: Cannot check QEMU binary {EMULATOR}" in done.err
    assert lab.run("kc-b", "virsh", "domstate", "row").stdout.strip() == "running"
    assert_becomes(lab, "kc-b", before)


# Resuming.


def test_a_copy_cut_at_three_quarters_sends_at_most_30_percent(lab: Lab) -> None:
    vm = lab.vm("kc-a", "cut", ["raw:40M:20M"], boot=False)
    interrupt(lab, "kc-a", "kc-b", "cut", "--bandwidth-limit", "3M", disk="vda", at=30 * MIB)
    result = clone(lab, "cut", "--resume").document
    print(f"sent {result['bytes_sent']}, reused {result['bytes_reused']} of {20 * MIB}")
    assert result["bytes_sent"] <= 6 * MIB
    assert result["bytes_resent"] == 0
    assert result["bytes_sent"] + result["bytes_reused"] == 20 * MIB
    assert_equal(lab, vm)
    assert_nothing_left(lab)


def test_a_source_that_changed_between_attempts_is_right_in_the_end(lab: Lab) -> None:
    vm = lab.vm("kc-a", "moved", ["raw:16M:8M"], boot=False)
    interrupt(lab, "kc-a", "kc-b", "moved", *SLOW, disk="vda", at=4 * MIB)
    write(lab, vm, "vda", 4096)
    write(lab, vm, "vda", MIB, bytes(MIB))
    write(lab, vm, "vda", 14 * MIB)
    done = clone(lab, "moved", "--idempotent")
    assert done.code == 0, done.err
    assert done.document["bytes_resent"] > 0
    assert_equal(lab, vm)
    assert_nothing_left(lab)
    assert clone(lab, "moved", "--idempotent").document["changed"] is False


def _damaged(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(64))


def _cut_short(path: Path) -> None:
    os.truncate(path, 1 * MIB)


def _gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_damaged, _cut_short, _gone])
@pytest.mark.parametrize("disk", ["raw:16M:8M", "qcow2:16M:8M"])
def test_damage_to_what_is_staged_is_found_and_mended(lab: Lab, disk: str, damage: Callable[[Path], None]) -> None:
    vm = lab.vm("kc-a", "damage", [disk], boot=False)
    interrupt(lab, "kc-a", "kc-b", "damage", *SLOW, disk="vda", at=4 * MIB)
    damage(Path(parts(lab)[0]))
    done = clone(lab, "damage", "--idempotent")
    assert done.code == 0, done.err
    assert_equal(lab, vm)
    assert_nothing_left(lab)


def test_a_source_of_another_size_starts_its_disk_again(lab: Lab, row: Vm) -> None:
    _interrupted(lab, row)
    lab.run("kc-a", "qemu-img", "resize", "-q", "-f", "raw", row.disks["vdb"], "12M")
    done = clone(lab, "row", "--idempotent")
    assert done.code == 0, done.err
    assert_equal(lab, row)
    assert_nothing_left(lab)


def test_an_attempt_of_another_vm_is_not_taken_for_ours(lab: Lab, row: Vm) -> None:
    _interrupted(lab, row)
    lab.vm("kc-a", "stranger", ["raw:8M:1M"], boot=False)
    before = picture(lab, "kc-b")
    done = clone(lab, "stranger", "--new-name", "row", "--idempotent")
    assert done.code == 3, done.err
    assert picture(lab, "kc-b") == before
    assert clone(lab, "stranger", "--new-name", "row", "--force").code == 0
    assert_nothing_left(lab)


def test_any_controller_can_go_on(lab: Lab, row: Vm, tmp_path: Path) -> None:
    _interrupted(lab, row)
    line = [*PROGRAM, "clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", "row", "--resume"]
    homes = {key: str(tmp_path / key) for key in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")}
    done = subprocess.run(line, cwd="/", env={**environment(), **homes}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "were there already" in done.stdout
    assert_equal(lab, row)


# Doing nothing.


def test_a_repeated_run_sends_and_changes_nothing(lab: Lab) -> None:
    vm = lab.vm("kc-a", "again", ["raw:2G:64M", "qcow2:8M:1M"], boot=False)
    _finished(lab, vm)
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    done = clone(lab, "again", "--idempotent")
    assert done.code == 0, done.err
    assert done.document["changed"] is False
    assert done.document["bytes_sent"] == 0
    assert {host: picture(lab, host) for host in before} == before


def test_verify_existing_digests_instead_of_trusting(lab: Lab, row: Vm) -> None:
    _finished(lab, row)
    done = clone(lab, "row", "--idempotent", "--verify-existing")
    assert (done.code, done.document["changed"], done.document["verified"]) == (0, False, True)
    _damaged(lab.outside("kc-b", disks_of(lab, "kc-b", "row")["vdb"][0]))
    assert clone(lab, "row", "--idempotent", "--verify-existing").code == 7
    assert clone(lab, "row", "--idempotent").document["changed"] is True, "its fingerprint is another"
    assert_equal(lab, row)


@pytest.mark.parametrize("size", ["512K", "64M"])
def test_verify_existing_sees_a_disk_of_another_size(lab: Lab, row: Vm, size: str) -> None:
    """Whatever it holds: a guest that was started on the clone has grown it, say."""
    _finished(lab, row)
    raw = next(path for path, format_ in disks_of(lab, "kc-b", "row").values() if format_ == "raw")
    lab.run("kc-b", "truncate", "-s", size, raw)
    done = clone(lab, "row", "--idempotent", "--verify-existing")
    assert (done.code, "bytes, the source's" in done.err) == (7, True), done.err


def test_verify_existing_does_not_pass_a_clone_that_lacks_a_disk(lab: Lab, row: Vm) -> None:
    _finished(lab, row)
    lab.run("kc-b", "virsh", "detach-disk", "row", "vdb", "--config")
    done = clone(lab, "row", "--idempotent", "--verify-existing")
    assert (done.code, done.document["changed"]) == (0, True), done.err
    assert_equal(lab, row)


def _everything(lab: Lab) -> list[object]:
    """Both hosts with the times and definitions that a mere look might change."""
    found: list[object] = []
    for host in ("kc-a", "kc-b"):
        root = lab.outside(host, IMAGES)
        times = [(path.name, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in sorted(root.iterdir())]
        script = "cat /etc/libvirt/qemu/*.xml; ls -A /run/lock /tmp; ls -A /run/kvm-clone 2>&1 || true"
        xml = lab.run(host, "sh", "-c", script).stdout
        found += [picture(lab, host), times, root.stat().st_mtime_ns, xml]
    return found


@pytest.mark.faults
def test_dry_run_tells_and_changes_nothing(lab: Lab, row: Vm) -> None:
    for prepare, flag, code, action in (
        (_nothing, "", 0, "clone"),
        (_interrupted, "--idempotent", 0, "resume"),
        (_nothing, "", 4, "stop here"),
        (_nothing, "--force", 0, "clone"),
        (wipe_and_finish, "--idempotent", 0, "nothing to do"),
        (_nothing, "", 4, "stop here"),
        (_started_and_changed, "--idempotent", 3, "stop here"),
    ):
        prepare(lab, row)
        before = _everything(lab)
        done = [clone(lab, "row", "--dry-run", *argv_of(flag)) for _ in range(2 if code == 0 else 1)]
        first, *more = ({**one.document, "findings": said(one)} for one in done)
        assert (done[0].code, first["action"], first["runs"]) == (code, action, code == 0), done[0].err
        assert more in ([], [first])
        assert _everything(lab) == before
    text = kvm_clone(lab, "clone", "kc-a", "kc-b", "row", "--dry-run", "--force").out
    assert "  1. " in text
    assert "stopped" in text


def said(done: Done) -> list[object]:
    """The findings, without what is measured anew each time."""
    return [finding for finding in done.document["findings"] if finding["code"] != "estimate"]


def wipe_and_finish(lab: Lab, vm: Vm) -> None:
    wipe(lab)
    _finished(lab, vm)


def test_a_saved_plan_runs_and_is_refused_when_its_facts_have_changed(lab: Lab, row: Vm, tmp_path: Path) -> None:
    plan = tmp_path / "row.plan"
    before = _everything(lab)
    assert clone(lab, "row", "--plan-out", str(plan)).code == 0
    assert _everything(lab) == before
    write(lab, row, "vdb", 0)
    refused = kvm_clone(lab, "apply", str(plan), "--output", "json")
    assert refused.code == 3, refused.err
    assert "--plan-out" in refused.document["error"]["remedy"]
    assert files(lab) == []
    assert clone(lab, "row", "--plan-out", str(plan)).code == 0
    done = kvm_clone(lab, "apply", str(plan), "--output", "json")
    assert done.code == 0, done.err
    assert_equal(lab, row)
    assert kvm_clone(lab, "apply", str(plan)).code == 3
    assert kvm_clone(lab, "apply", str(tmp_path / "none")).code == 2
    assert clone(lab, "row", "--plan-out", str(tmp_path / "other")).code == 4
    assert not (tmp_path / "other").exists()


# Together and again.


@pytest.mark.parametrize("wait", [False, True])
def test_two_controllers_at_once(lab: Lab, row: Vm, wait: bool) -> None:
    how = ["--wait"] if wait else []
    argv = ["kc-a", "kc-b", "row", "--idempotent", "--output", "json", "--bandwidth-limit", "2M", *how]
    with running(lab, *argv) as one, running(lab, *argv) as other:
        both = [ended(one), ended(other)]
    assert sorted(done.code for done in both) == ([0, 0] if wait else [0, 8]), [done.err for done in both]
    if wait:
        assert sorted(done.document["changed"] for done in both) == [False, True]
    else:
        loser = next(done for done in both if done.code == 8)
        assert "process" in loser.document["error"]["message"]
    assert_equal(lab, row)
    assert_nothing_left(lab)


@pytest.mark.faults
def test_a_loop_over_many_vms_run_twice_with_a_power_cut_between(lab: Lab) -> None:
    vms = [lab.vm("kc-a", f"many {number}", ["raw:12M:6M"], boot=False) for number in range(3)]
    wipe(lab)
    names = " ".join(f"'{vm.name}'" for vm in vms)
    options = " ".join([*IMPATIENT, *SLOW, "-q", "-F", str(lab.ssh_config)])
    script = f"""
    for vm in {names}; do
        {" ".join(PROGRAM)} clone {options} --retries 0 kc-a kc-b "$vm" --idempotent || true
    done
    """
    quick = {**environment(), **HASTY}
    loop = subprocess.Popen(["sh", "-c", script], env=quick, stderr=subprocess.PIPE, text=True)
    wait_until("the second one is under way", lambda: len(lab_names(lab)) == 1 and bool(parts(lab)), 60)
    wait_for_copy(lab)
    lab.power("off", "kc-b")
    _, err = loop.communicate(timeout=120)
    lab.power("on", "kc-b")
    assert loop.returncode == 0, err
    again = subprocess.run(["sh", "-c", script], env=quick, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0
    assert again.stderr == ""
    for vm in vms:
        assert_equal(lab, vm)
    assert_nothing_left(lab)
    remove(lab, "kc-a", *(vm.name for vm in vms))


def lab_names(lab: Lab) -> list[str]:
    """The VMs of the destination."""
    return [name for name in lab.run("kc-b", "virsh", "list", "--all", "--name").stdout.split("\n") if name]


# At a terminal.


def at_a_terminal(lab: Lab, answer: str, *argv: str) -> tuple[int, str]:
    """Clone `row` at a terminal, and answer its one question; the exit code, and what was shown."""
    line = [*PROGRAM, "clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", "row", *argv]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True
    )
    os.close(theirs)
    shown, answered, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            part = os.read(ours, 4096)
        except OSError:  # how a terminal says that nobody has it open any more
            break
        shown += part
        if b"[A]bort? " in shown and not answered:
            os.write(ours, f"{answer}\n".encode())
            answered = True
    os.close(ours)
    return child.wait(10), shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("state", "answer", "code"),
    [
        (_finished, "s", 0),
        (_finished, "", 4),
        pytest.param(_finished, "a", 4, marks=pytest.mark.faults),
        pytest.param(_finished, "r", 4, marks=pytest.mark.faults),
        (_changed, "c", 0),
        (_interrupted, "r", 0),
        (_interrupted, "c", 0),
    ],
)
def test_the_question_at_a_terminal(
    lab: Lab, row: Vm, state: Callable[[Lab, Vm], None], answer: str, code: int
) -> None:
    state(lab, row)
    before = picture(lab, "kc-b")
    status, shown = at_a_terminal(lab, answer)
    assert status == code, shown
    assert shown.count("[A]bort?") == 1
    if answer in ("c", "r") and code == 0:
        assert_equal(lab, row)
        assert_nothing_left(lab)
    else:
        assert picture(lab, "kc-b") == before


def test_with_a_flag_there_is_no_question(lab: Lab, row: Vm) -> None:
    _changed(lab, row)
    status, shown = at_a_terminal(lab, "", "--idempotent")
    assert status == 0, shown
    assert "[A]bort?" not in shown
