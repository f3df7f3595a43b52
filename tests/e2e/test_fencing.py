"""A controller that wakes up after another run took its place finds every door closed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from clonekit import (
    agents,
    assert_equal,
    assert_nothing_left,
    definition,
    disks_of,
    ended,
    held,
    kill,
    kvm_clone,
    picture,
    wait_until,
    wipe,
)
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

OURS = "metadata/{https://kvm-clone.org/xmlns/clone/1}clone"
PATIENCE = 45.0
"""Seconds; longer than an agent waits for a word of its controller."""


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    yield
    wipe(lab)


def operation(lab: Lab, name: str) -> str:
    mark = definition(lab, "kc-b", name).find(OURS)
    return "" if mark is None else mark.get("operation", "")


def overtaken(lab: Lab, child: subprocess.Popen[str], *argv: str, silent: bool = False) -> None:
    """While the first controller stands still, its agent ends, and another run completes.

    `silent`: the agent is left to find out by itself that its controller says nothing.
    """
    if silent:
        wait_until("the agent lets go", lambda: not agents(lab, "kc-b"), PATIENCE)
    else:
        for pid in agents(lab, "kc-b"):
            kill(lab, "kc-b", pid)
    second = kvm_clone(lab, *argv, "--wait")
    assert second.code == 0, second.err


@pytest.mark.parametrize(
    ("record", "silent"),
    [
        pytest.param("define", False),
        pytest.param("proven", False, marks=pytest.mark.faults),
        pytest.param("publish", False, marks=pytest.mark.faults),
        pytest.param("committed", False),
        pytest.param("define", True, marks=pytest.mark.faults),
    ],
)
def test_a_clone_that_was_overtaken_changes_nothing(lab: Lab, record: str, silent: bool) -> None:
    source = lab.vm("kc-a", "late", ["qcow2:8M:2M", "raw:4M:1M"], boot=False)
    argv = ("kc-a", "kc-b", "late")
    with held(lab, record, *argv, "--retries", "0") as child:
        overtaken(lab, child, "clone", *argv, "--force", silent=silent)
        uuid, made, before = (
            definition(lab, "kc-b", "late").findtext("uuid"),
            operation(lab, "late"),
            picture(lab, "kc-b"),
        )
        child.send_signal(signal.SIGCONT)
        late = ended(child)
    assert late.code in (0, 4, 6), late.err
    assert "Traceback" not in late.err
    assert (definition(lab, "kc-b", "late").findtext("uuid"), operation(lab, "late")) == (uuid, made)
    assert picture(lab, "kc-b").files == before.files
    assert_equal(lab, source)
    assert_nothing_left(lab)


def test_a_sync_that_was_overtaken_changes_nothing(lab: Lab) -> None:
    source = lab.vm("kc-a", "late", ["qcow2:8M:2M"], boot=False)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "late").code == 0
    path = lab.outside("kc-a", source.disks["vda"])
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", path], check=True, stdout=subprocess.DEVNULL)
    argv = ("kc-a", "kc-b", "late")
    with held(lab, "define", *argv, "--retries", "0", command="sync") as child:
        overtaken(lab, child, "sync", *argv, "--idempotent")
        before, disks = picture(lab, "kc-b").files, disks_of(lab, "kc-b", "late")
        child.send_signal(signal.SIGCONT)
        late = ended(child)
    assert late.code in (0, 4, 6), late.err
    assert (picture(lab, "kc-b").files, disks_of(lab, "kc-b", "late")) == (before, disks)
    assert_equal(lab, source)


def test_a_retry_does_not_stop_or_replace_what_was_not_there_at_first(lab: Lab) -> None:
    lab.vm("kc-a", "late", ["qcow2:8M:2M"], boot=False)
    argv = ("kc-a", "kc-b", "late", "--force")
    with held(lab, "copied", *argv) as child:
        overtaken(lab, child, "clone", *argv)
        made = operation(lab, "late")
        lab.run("kc-b", "virsh", "start", "late")
        child.send_signal(signal.SIGCONT)
        late = ended(child)
    assert late.code == 4, late.err
    assert operation(lab, "late") == made
    assert lab.run("kc-b", "virsh", "domstate", "late").stdout.strip() == "running"


def _foreign(lab: Lab, name: str, uuid: str) -> None:
    lab.run("kc-b", "qemu-img", "create", "-q", "-f", "qcow2", "/var/lib/libvirt/images/foreign.qcow2", "1M")
    xml = (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' "
        "type='qcow2'/><source file='/var/lib/libvirt/images/foreign.qcow2'/><target dev='vda' bus='virtio'/></disk>"
        "</devices></domain>"
    )
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml)
    lab.run("kc-b", "virsh", "start", name)


@pytest.mark.parametrize("name", ["late", "stranger"])
def test_a_vm_that_appeared_meanwhile_is_not_replaced(lab: Lab, name: str) -> None:
    """Of the same name, or of the UUID that was to be kept."""
    source = lab.vm("kc-a", "late", ["raw:4M:1M"], boot=False)
    with held(lab, "proven", "kc-a", "kc-b", "late", "--preserve-uuid") as child:
        _foreign(lab, name, source.uuid)
        child.send_signal(signal.SIGCONT)
        late = ended(child)
    assert late.code == 4, late.err
    assert lab.run("kc-b", "virsh", "domstate", name).stdout.strip() == "running"
    assert [path for path, _ in disks_of(lab, "kc-b", name).values()] == ["/var/lib/libvirt/images/foreign.qcow2"]
    wait_until(
        "what was staged is gone", lambda: [one[0] for one in picture(lab, "kc-b").files] == ["foreign.qcow2"], 20
    )


def _grown(lab: Lab, name: str) -> Vm:
    """A replica whose merge takes a while: much has changed."""
    source = lab.vm("kc-a", name, ["raw:512M:16M"], boot=False)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", name).code == 0
    path = lab.outside("kc-a", source.disks["vda"])
    with path.open("r+b") as file:
        for _ in range(300):
            file.write(b"\x5a" * (1 << 20))
    return source


@pytest.mark.faults
def test_ctrl_c_does_not_wait_out_a_merge(lab: Lab) -> None:
    source = _grown(lab, "merging")
    argv = ("kc-a", "kc-b", "merging")
    with held(lab, "before merge", *argv, "--no-verify", command="sync") as child:
        child.send_signal(signal.SIGCONT)
        wait_until(
            "it merges", lambda: bool(lab.run("kc-b", "pgrep", "-x", "qemu-nbd", check=False).stdout.strip()), 20
        )
        for pid in lab.run("kc-b", "pgrep", "-x", "qemu-nbd").stdout.split():
            kill(lab, "kc-b", int(pid), signal.SIGSTOP)  # a merge that takes for ever
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        done = ended(child, 30)
    assert done.code == 130, done.err
    assert "is complete" in done.err
    assert time.monotonic() - started < 20
    again = kvm_clone(lab, "sync", *argv, "--idempotent", "--wait")
    assert again.code == 0, again.err
    assert_equal(lab, source)
    assert_nothing_left(lab)


def test_a_merge_is_finished_without_the_source(lab: Lab) -> None:
    source = _grown(lab, "merging")
    with held(lab, "before merge", "kc-a", "kc-b", "merging", "--output", "json", command="sync") as child:
        lab.power("off", "kc-a")
        try:
            child.send_signal(signal.SIGCONT)
            done = ended(child)
        finally:
            lab.power("on", "kc-a")
    assert done.code == 0, done.err
    assert done.document["changed"] is True
    assert_equal(lab, source)
    assert_nothing_left(lab)
