"""Cloning and syncing VMs that run: what it must leave of them, and how to look at what it made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clonekit import (
    IMAGES,
    PROGRAM,
    Done,
    assert_equal,
    disks_of,
    environment,
    kvm_clone,
    succeeded,
    wait_until,
)
from guests import assert_counter, raw_copy
from labclient import Lab, Vm

SOCKETS = "/var/lib/libvirt/qemu"
HELD = Path(__file__).with_name("held_live.py")

OUR_CHECKPOINTS = "kvm-clone."
STEPPED_IN_SECONDS = 50.0
"""More than the silence after which an agent that is cut off ends a backup job."""


@dataclass(frozen=True)
class Traces:
    """Everything that a backup may leave at a source."""

    definition: str
    files: tuple[str, ...]
    checkpoints: tuple[str, ...]
    snapshots: tuple[str, ...]
    job: str
    locks: str
    state: str
    messages: str


def traces(lab: Lab, name: str) -> Traces:
    """Look at a VM of kc-a, and at the directories where a backup has its files."""
    seen = lab.run("kc-a", "sh", "-c", _LOOK, "look", name).stdout.split("--\n")
    files, checkpoints, snapshots, job, locks, state, messages = seen[1:]
    listed = [tuple(sorted(part.split())) for part in (files, checkpoints, snapshots)]
    return Traces(seen[0], listed[0], listed[1], listed[2], job.strip(), locks.strip(), state.strip(), messages.strip())


_LOOK = rf"""
virsh dumpxml --inactive --security-info --domain "$1"; echo --
ls -A {IMAGES} {SOCKETS} | grep -e scratch -e kvm-clone; echo --
virsh checkpoint-list --name --domain "$1"; echo --
virsh snapshot-list --name --domain "$1"; echo --
virsh -q backup-dumpxml --domain "$1" 2>/dev/null; echo --
ls -A /run/kvm-clone 2>/dev/null; echo --
virsh domstate --domain "$1"; echo --
virsh dominfo --domain "$1" | sed -n '/^Messages/,$p'
"""


def assert_no_job(lab: Lab, name: str, seconds: float = STEPPED_IN_SECONDS) -> None:
    """Soon there is no backup job, socket, scratch or lock at the source."""

    def idle() -> bool:
        now = traces(lab, name)
        return not (now.job or now.files or now.locks)

    wait_until("the backup job is over", idle, seconds)


def ours(lab: Lab, name: str) -> list[str]:
    """Our checkpoints of the VM."""
    return [one for one in traces(lab, name).checkpoints if one.startswith(OUR_CHECKPOINTS)]


def virsh(lab: Lab, *argv: str, check: bool = True) -> str:
    """What virsh on kc-a prints."""
    return lab.run("kc-a", "virsh", "-q", *argv, check=check).stdout.strip()


def copied(lab: Lab, command: str, vm: Vm, *argv: str, seconds: float = 120) -> dict[str, Any]:
    """Clone or sync to kc-b, which must work; the result."""
    return succeeded(lab, command, vm.name, *argv, seconds=seconds)


def failed(lab: Lab, command: str, vm: Vm, code: int, *argv: str) -> str:
    """Clone or sync to kc-b, which must fail with the code; what is said."""
    done = kvm_clone(lab, command, "kc-a", "kc-b", vm.name, *argv)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    return done.err


@contextmanager
def under_way(lab: Lab, command: str, *argv: str, point: str = "") -> Iterator[subprocess.Popen[str]]:
    """A clone or sync under way. `point`: where it stops or ends itself, see held_live.py."""
    program = (sys.executable, str(HELD), point) if point else PROGRAM
    stops = point and ":" not in point
    child = subprocess.Popen(
        [*program, command, "-F", str(lab.ssh_config), "kc-a", "kc-b", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        if stops:
            wait_until(f"it stops at {point}", lambda: is_stopped(child), 40)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def is_stopped(child: subprocess.Popen[str]) -> bool:
    """Whether the process has stopped itself."""
    if child.poll() is not None:
        raise AssertionError(f"it has ended: {child.communicate()}")
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_for_job(lab: Lab, name: str, child: subprocess.Popen[str]) -> None:
    """Wait until the source has a backup job of ours."""

    def begun() -> bool:
        if child.poll() is not None:
            raise AssertionError(f"it has ended: {child.communicate()}")
        return bool(virsh(lab, "backup-dumpxml", "--domain", name, check=False))

    wait_until("the backup job has begun", begun, 40)


def ended(child: subprocess.Popen[str], seconds: float = 90) -> Done:
    """Wait for a clone or sync that is under way."""
    out, err = child.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    return Done(child.returncode, out, err)


def images(lab: Lab, name: str, directory: Path, targets: Sequence[str] = ("vdb", "vdc")) -> list[Path]:
    """Raw copies of disks of a VM of kc-b that is shut off."""
    directory.mkdir(parents=True, exist_ok=True)
    disks = disks_of(lab, "kc-b", name)
    return [raw_copy(lab, "kc-b", disks[target][0], directory / target) for target in targets]


def counted(lab: Lab, name: str, directory: Path) -> int:
    """The count of the replica of a counter guest, whose disks must be of one moment."""
    return assert_counter(images(lab, name, directory))


def power_off(lab: Lab, vm: Vm) -> None:
    """Shut the guest down in order, as its kernel answers the power button."""
    virsh(lab, "shutdown", "--domain", vm.name)
    wait_until("the guest is off", lambda: "shut off" in virsh(lab, "domstate", "--domain", vm.name), 30)


def power_on(lab: Lab, vm: Vm) -> None:
    """Start the VM, and wait until its guest works."""
    serial = lab.outside(vm.host, vm.serial)
    before = serial.stat().st_size if serial.exists() else 0
    virsh(lab, "start", "--domain", vm.name)
    wait_until("the guest ticks", lambda: _ticks_after(serial, before), 60)


def _ticks_after(serial: Path, before: int) -> bool:
    if not serial.exists():
        return False
    size = serial.stat().st_size
    with serial.open("rb") as file:
        file.seek(before if size >= before else 0)
        return b"TICK" in file.read()


def assert_ends_equal(lab: Lab, vm: Vm, name: str | None = None) -> None:
    """Stop the source where it is, sync, and compare every disk."""
    virsh(lab, "destroy", "--domain", vm.name, check=False)
    copied(lab, "sync", vm, "--idempotent", "--wait", *(("--target-name", name) if name else ()))
    assert_equal(lab, vm, name)


def wait_for_agent(lab: Lab, vm: Vm) -> None:
    """Wait for the guest agent by what only libvirt itself asks of it: another command would taint the domain."""
    ask = ("virsh", "domfsinfo", "--domain", vm.name)
    wait_until("the guest agent answers", lambda: "/data" in lab.run(vm.host, *ask, check=False).stdout, 60)
