"""What interrupted attempts leave: shown by status, removed by cleanup; and the removal of whole VMs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clonekit import (
    IMAGES,
    PROGRAM,
    STATE_VARIABLE,
    Done,
    environment,
    kvm_clone,
    parts,
    picture,
    remove,
    running,
    wait_for_copy,
    wait_until,
)
from labclient import Lab, Vm

from kvm_clone import Client, SshOptions
from kvm_clone.errors import RefusedError

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))


@pytest.fixture
def vm(lab: Lab) -> Iterator[Vm]:
    yield lab.vm("kc-a", "kept", ["qcow2:64M:14M", "raw:64M:14M"], boot=False)
    remove(lab, "kc-a", "kept")


@pytest.fixture
def interrupted(lab: Lab, vm: Vm, logs: None) -> Iterator[str]:
    """An interrupted attempt; its operation."""
    with running(lab, "kc-a", "kc-b", "kept", "--bandwidth-limit", "4M") as child:
        wait_for_copy(lab)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    [operation] = {Path(path).name.split("-")[2] for path in parts(lab)}
    yield operation
    kvm_clone(lab, "cleanup", "kc-b")
    remove(lab, "kc-b", "kept")


def status(lab: Lab, *argv: str) -> Done:
    """`kvm-clone status`, which needs no connection unless a host is named."""
    line = [*PROGRAM, "status", *argv]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr)


def test_status_shows_the_operation_and_its_log(lab: Lab, interrupted: str) -> None:
    listed = json.loads(status(lab, "--output", "json").out)["operations"]
    [one] = [one for one in listed if one["operation"] == interrupted]
    assert (one["state"], one["vm"], one["destination"]) == ("interrupted", "kept", "kc-b")
    assert f"{interrupted}  interrupted" in status(lab).out
    assert "--resume" in status(lab).out
    log = status(lab, interrupted, "--follow").out
    assert "CreateDisk: done" in log
    assert "CopyDisks: CancelledError" in log
    unknown = status(lab, "no-such-operation")
    assert unknown.code == 2


def test_the_way_on_names_the_clone(lab: Lab, vm: Vm) -> None:
    argv = ("kc-a", "kc-b", "kept", "--new-name", "kept-2", "--bandwidth-limit", "4M")
    with running(lab, *argv) as child:
        wait_for_copy(lab)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    assert "kvm-clone clone kc-a kc-b kept --new-name kept-2 --resume" in status(lab).out
    assert kvm_clone(lab, "cleanup").code == 0
    assert "interrupted" not in status(lab).out


def test_status_of_a_host_shows_what_is_staged(lab: Lab, interrupted: str) -> None:
    done = status(lab, "-F", str(lab.ssh_config), "--host", "kc-b", "--host", "kc-a", "--output", "json")
    assert done.code == 0, done.err
    there, nothing = done.document["hosts"]
    assert nothing["staged"] == []
    [data] = there["staged"]
    assert (data["name"], data["operation"], data["active"]) == ("kept", interrupted, False)
    assert data["size"] > 1 << 20
    text = status(lab, "-F", str(lab.ssh_config), "--host", "kc-b").out
    assert "kept from kc-a, interrupted" in text
    assert "kvm-clone cleanup kc-b" in text


def test_cleanup_removes_what_is_staged_and_nothing_else(lab: Lab, interrupted: str) -> None:
    stranger = lab.outside("kc-b", f"{IMAGES}/.kvm-clone-notes.txt")
    stranger.write_text("somebody's")
    try:
        before = picture(lab, "kc-b")
        assert "would be removed" in kvm_clone(lab, "cleanup", "kc-b", "--dry-run").out
        assert "nothing to remove" in kvm_clone(lab, "cleanup", "kc-b", "--older-than", "1h").out
        assert picture(lab, "kc-b") == before
        done = kvm_clone(lab, "cleanup", "kc-b")
        assert done.code == 0, done.err
        assert "kept" in done.out
        assert [name for name, _, _ in picture(lab, "kc-b").files if "kvm-clone" in name] == [stranger.name]
        assert "nothing to remove" in kvm_clone(lab, "cleanup", "kc-b").out
        assert f"{interrupted}  failed" in status(lab).out, "there is nothing to go on with"
        assert "cleaned up" in status(lab, interrupted).out
    finally:
        stranger.unlink()


APART = f"{IMAGES}/apart"
"""A directory of both hosts that is no pool's."""


@pytest.fixture
def apart(lab: Lab, vm: Vm) -> Iterator[Path]:
    """The VM's disks lie outside the pools, and the destination has such a directory, which is returned."""
    for host in ("kc-a", "kc-b"):
        lab.run(host, "mkdir", "-p", APART)
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", "kept").stdout
    for path in vm.disks.values():
        lab.run("kc-a", "mv", path, APART)
        xml = xml.replace(path, f"{APART}/{Path(path).name}")
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
    yield lab.outside("kc-b", APART)
    for host in ("kc-a", "kc-b"):
        remove(lab, host, "kept")
        lab.run(host, "rm", "-rf", APART)


def test_cleanup_finds_what_is_staged_outside_pools(
    lab: Lab, apart: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with running(lab, "kc-a", "kc-b", "kept", "--bandwidth-limit", "4M") as child:
        wait_until("a disk is staged", lambda: any(apart.glob("*.part")))
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    staged = set(apart.iterdir())
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "of another machine"))
    assert "nothing to remove" in kvm_clone(lab, "cleanup", "kc-b").out
    assert set(apart.iterdir()) == staged
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    assert f"staged in {APART}" in status(lab, "-F", str(lab.ssh_config), "--host", "kc-b").out
    done = kvm_clone(lab, "cleanup")
    assert (done.code, "kept" in done.out) == (0, True), done.err
    assert list(apart.iterdir()) == []
    assert "interrupted" not in status(lab).out


def test_cleanup_leaves_a_running_operation_alone(lab: Lab, vm: Vm) -> None:
    with running(lab, "kc-a", "kc-b", "kept", "--bandwidth-limit", "4M") as child:
        wait_for_copy(lab)
        assert "running" in status(lab, "-F", str(lab.ssh_config), "--host", "kc-b").out
        assert "nothing to remove" in kvm_clone(lab, "cleanup", "kc-b").out
        assert child.wait(60) == 0
    remove(lab, "kc-b", "kept")


def test_cleanup_keeps_a_clone_that_had_committed(lab: Lab, vm: Vm) -> None:
    """The controller dies before the journal's end. What only the journal names is not removed."""
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "kept").code == 0
    xml = lab.run("kc-b", "virsh", "dumpxml", "kept").stdout
    operation = xml.split('operation="')[1].split('"')[0]
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from kvm_clone.agent import names\n"
        "from kvm_clone.agent.staging import journal\n"
        "log = journal.Journal(names.journal_path(sys.argv[2], 'kept'))\n"
        "log.append('begin', operation=sys.argv[3], name='kept', started=0)\n"
        "log.append('define', uuid='', remove=[sys.argv[2] + '/replaced.raw'], forget=[])\n"
    )
    source = str(Path(__file__).parents[2] / "src")
    lab.run("kc-b", "/usr/bin/python3", "-c", _without_controller(script), source, IMAGES, operation)
    replaced = lab.outside("kc-b", f"{IMAGES}/replaced.raw")
    replaced.write_bytes(b"of a VM that the journal alone says was replaced")
    before = picture(lab, "kc-b")
    done = kvm_clone(lab, "cleanup", "kc-b")
    assert "had committed" in done.out, done.err
    after = picture(lab, "kc-b")
    assert after.domains == before.domains
    assert len(before.files) == len(after.files) + 1
    replaced.unlink()
    remove(lab, "kc-b", "kept")


def _without_controller(script: str) -> str:
    """The agent alone, as a host has it: the package's own __init__ needs more than the standard library."""
    stub = (
        "import sys, types; package = types.ModuleType('kvm_clone'); package.__path__ = [sys.argv[1] + '/kvm_clone']\n"
    )
    return stub + "sys.modules['kvm_clone'] = package\n" + script


def test_a_host_that_cannot_be_reached_is_an_error(lab: Lab) -> None:
    done = kvm_clone(lab, "cleanup", "no-such-host.invalid")
    assert done.code == 5
    assert "no-such-host.invalid" in done.err


def test_cleanup_vm_removes_everything_that_is_its_own(lab: Lab) -> None:
    vm = lab.vm("kc-b", "gone", ["qcow2:16M:2M", "raw:16M:2M"], start=True)
    before = picture(lab, "kc-b")
    shared = vm.disks["vdc"]
    xml = lab.run("kc-b", "virsh", "dumpxml", "--inactive", "gone").stdout
    uuid = f"<uuid>{vm.uuid}</uuid>"
    other = xml.replace("<name>gone</name>", "<name>neighbour</name>").replace(uuid, "")
    theirs = {"vda": f"{IMAGES}/neighbour-vda.qcow2", "vdb": f"{IMAGES}/neighbour-vdb.qcow2"}
    for path in theirs.values():
        lab.run("kc-b", "qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    lab.run(
        "kc-b",
        "virsh",
        "define",
        "/dev/stdin",
        input=other.replace(vm.disks["vda"], theirs["vda"]).replace(vm.disks["vdb"], theirs["vdb"]),
    )

    async def clean(stop: bool) -> list[str]:
        async with Client(SshOptions(config=lab.ssh_config)) as client:
            return await client.cleanup_vm("kc-b", "gone", stop=stop)

    try:
        with pytest.raises(RefusedError):
            asyncio.run(clean(stop=False))
        assert set(before.files) <= set(picture(lab, "kc-b").files)
        removed = asyncio.run(clean(stop=True))
        assert "definition of gone" in removed
        assert lab.outside("kc-b", shared).exists()
        assert not lab.outside("kc-b", vm.disks["vdb"]).exists()
        assert asyncio.run(clean(stop=True)) == []
        assert all(lab.outside("kc-b", path).exists() for path in theirs.values())
    finally:
        remove(lab, "kc-b", "neighbour", "gone")
        for path in theirs.values():
            lab.outside("kc-b", path).unlink(missing_ok=True)
        lab.outside("kc-b", shared).unlink(missing_ok=True)
