"""Running kvm-clone against the lab, and looking at what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labclient import Lab, Vm

PROGRAM = (sys.executable, "-m", "kvm_clone.cli")
IMAGES = "/var/lib/libvirt/images"
AGENT = "python3 -I -X utf8 -c import os"
"""How an agent's command line begins."""

IMPATIENT = ("--ssh-option", "ServerAliveInterval=1", "--ssh-option", "ServerAliveCountMax=3")
"""Notices a dead connection in seconds."""

HASTY = {"KVM_CLONE_CONNECT_TIMEOUT": "3", "KVM_CLONE_CONNECT_RETRIES": "0"}
"""Gives a host that does not answer up in seconds."""

SETTLED_SECONDS = 60.0
"""Longer than an agent that is cut off waits before it rolls back by itself."""


@dataclass(frozen=True)
class Done:
    """A finished kvm-clone."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


STATE_VARIABLE = "KVM_CLONE_TEST_STATE"
"""Names the directory for the logs of operations, for tests that read them."""


def environment() -> dict[str, str]:
    """The environment without configuration and logs of whoever runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVM_CLONE_")}
    return {**kept, "XDG_CONFIG_HOME": "/nonexistent", "XDG_STATE_HOME": os.environ.get(STATE_VARIABLE, os.devnull)}


def kvm_clone(lab: Lab, command: str, *argv: str, seconds: float = 120) -> Done:
    """Run kvm-clone with the lab's ssh configuration."""
    line = [*PROGRAM, command, "-F", str(lab.ssh_config), *argv]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def succeeded(lab: Lab, command: str, name: str, *argv: str, seconds: float = 120) -> dict[str, Any]:
    """Clone or sync the VM to kc-b, which must work; the result."""
    done = kvm_clone(lab, command, "kc-a", "kc-b", name, "--output", "json", *argv, seconds=seconds)
    assert done.code == 0, done.err
    document: dict[str, Any] = done.document
    return document


@contextmanager
def running(
    lab: Lab,
    *argv: str,
    command: str = "clone",
    program: Sequence[str] = PROGRAM,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A clone, or a sync, under way, which is killed in the end if it has not ended."""
    child = subprocess.Popen(
        [*program, command, "-F", str(lab.ssh_config), *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **(variables or {})},
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


@contextmanager
def stopped(child: subprocess.Popen[str]) -> Iterator[None]:
    """The process stands still, so that nothing it would do next comes in between."""
    child.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.send_signal(signal.SIGCONT)


def ended(child: subprocess.Popen[str], seconds: float = 90) -> Done:
    """Wait for a clone that is under way."""
    out, err = child.communicate(timeout=seconds)
    return Done(child.returncode, out, err)


HELD = Path(__file__).with_name("held.py")


@contextmanager
def held(lab: Lab, record: str, *argv: str, command: str = "clone") -> Iterator[subprocess.Popen[str]]:
    """A clone, or a sync, that has stopped at the record, and is killed in the end if it has not ended."""
    program = (sys.executable, str(HELD), record)
    with running(lab, *argv, command=command, program=program, variables=HASTY) as child:
        wait_until(f"the {command} stops at {record}", lambda: _has_stopped(child), 30)
        yield child


def _has_stopped(child: subprocess.Popen[str]) -> bool:
    assert child.poll() is None, child.communicate()
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def interrupt(lab: Lab, *argv: str, disk: str, at: int, command: str = "clone") -> Done:
    """Copy until the journal calls so much of the disk durable, then end it by a signal that keeps what is staged."""
    with running(lab, *argv, command=command) as child:
        wait_for_durable(lab, disk, at)
        child.terminate()
        done = ended(child)
    assert done.code == 6, done.err
    return done


def wait_until(what: str, holds: Callable[[], bool], seconds: float = SETTLED_SECONDS) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


def parts(lab: Lab, host: str = "kc-b") -> list[str]:
    """The staged files on the host, by their paths outside."""
    return sorted(str(path) for path in lab.outside(host, IMAGES).glob(".kvm-clone-*.part"))


def wait_for_copy(lab: Lab, count: int = 1, written: int = 1 << 20) -> None:
    """Wait until the copy is well under way."""

    def under_way() -> bool:
        found = [os.stat(path).st_blocks * 512 for path in parts(lab)]
        return len(found) >= count and sum(found) > written

    wait_until("the copy is under way", under_way, 30)


def records(lab: Lab, host: str = "kc-b") -> list[dict[str, Any]]:
    """What the journals on the host say; a torn last line counts as never written."""
    found = []
    for path in sorted(lab.outside(host, IMAGES).glob(".kvm-clone-*.journal")):
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:  # it has just ended
            continue
        found += [json.loads(line.partition(b" ")[2]) for line in lines]
    return found


def durable(lab: Lab, disk: str, host: str = "kc-b") -> int:
    """The byte before which the journal calls the disk durable."""
    said = [entry["end"] for entry in records(lab, host) if entry["record"] == "durable" and entry["disk"] == disk]
    return max(said, default=0)


def wait_for_durable(lab: Lab, disk: str, end: int, seconds: float = 60) -> None:
    """Wait until the journal says that so much of the disk is durable."""
    wait_until(f"{end} bytes of {disk} are durable", lambda: durable(lab, disk) >= end, seconds)


def agents(lab: Lab, host: str) -> list[int]:
    """The agents' pids on the host, the oldest first: the control agent, then a sender or receiver."""
    found = lab.run(host, "pgrep", "-f", AGENT, check=False).stdout.split()
    return sorted(int(pid) for pid in found)


def pids(lab: Lab, host: str, name: str) -> list[int]:
    """Pids of programs of that exact name."""
    return [int(pid) for pid in lab.run(host, "pgrep", "-x", name, check=False).stdout.split()]


def kill(lab: Lab, host: str, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to one process on a host."""
    lab.run(host, "kill", f"-{int(number)}", str(pid))


@dataclass(frozen=True)
class Picture:
    """Everything of a host that a clone might have touched."""

    files: tuple[tuple[str, int, int], ...]
    domains: str
    locks: str
    processes: str


def picture(lab: Lab, host: str) -> Picture:
    """Look at the host."""
    root = lab.outside(host, IMAGES)
    files = tuple(
        (str(path.relative_to(root)), path.lstat().st_ino, path.lstat().st_size)
        for path in sorted(root.rglob("*"))
        if path.is_file() or path.is_symlink()
    )
    seen = lab.run(host, "sh", "-c", _LOOK).stdout
    domains, locks, processes = seen.split("--\n")
    return Picture(files, domains, locks, processes)


_LOOK = r"""
virsh list --all --uuid --name; echo --
ls -A /run/kvm-clone 2>/dev/null; echo --
pgrep -f 'python3 -I -X utf8 -c impor[t] os'; pgrep -x 'qemu-nbd|qemu-img'; true
"""


def assert_becomes(lab: Lab, host: str, before: Picture, seconds: float = SETTLED_SECONDS) -> None:
    """The host is soon as it was."""
    deadline = time.monotonic() + seconds
    while (now := picture(lab, host)) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert now == before


def identical(lab: Lab, source: Vm, target: str, clone_path: str, image_format: str) -> None:
    """The clone's disk holds what the guest saw at the source, and takes no more room than it may."""
    ours, theirs = lab.outside(source.host, source.disks[target]), lab.outside("kc-b", clone_path)
    argv = ["qemu-img", "compare", "-f", image_format, "-F", image_format, str(ours), str(theirs)]
    compared = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert theirs.stat().st_blocks <= ours.stat().st_blocks * 1.05


def definition(lab: Lab, host: str, name: str) -> ElementTree.Element:
    """The definition that the next start takes."""
    return ElementTree.fromstring(lab.run(host, "virsh", "dumpxml", "--inactive", "--domain", name).stdout)


def disks_of(lab: Lab, host: str, name: str) -> dict[str, tuple[str, str]]:
    """Path and format of each disk by its target, media left out; of volumes POOL/VOLUME and the format."""
    found = {}
    for disk in definition(lab, host, name).iterfind("devices/disk"):
        source, target, driver = disk.find("source"), disk.find("target"), disk.find("driver")
        if disk.get("device") == "disk" and source is not None and target is not None and driver is not None:
            found[target.get("dev", "")] = (_path_of(source), driver.get("type", ""))
    return found


def _path_of(source: ElementTree.Element) -> str:
    return source.get("file") or "/".join(source.get(key, "") for key in ("pool", "volume"))


def assert_equal(lab: Lab, source: Vm, name: str | None = None) -> None:
    """The clone has every disk of its source, with the same content."""
    theirs = disks_of(lab, "kc-b", name or source.name)
    assert theirs.keys() >= source.disks.keys()
    for target in source.disks:
        identical(lab, source, target, *theirs[target])


def leftovers(lab: Lab, host: str) -> dict[str, Any]:
    """Everything that an operation has on the host while it runs, and may leave when it is interrupted."""
    now = picture(lab, host)
    staged = [name for name, _, _ in now.files if ".kvm-clone-" in name]
    found = {"staged": staged, "locks": now.locks, "processes": now.processes}
    return {what: those for what, those in found.items() if those}


def assert_nothing_left(lab: Lab, seconds: float = SETTLED_SECONDS) -> None:
    """Soon neither host has staged files, journals, locks or processes of ours."""
    for host in ("kc-a", "kc-b"):
        deadline = time.monotonic() + seconds
        while (found := leftovers(lab, host)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not found, f"{host} is not tidy: {found}\n{_what_runs(lab, host, found.get('processes', ''))}"


def _what_runs(lab: Lab, host: str, processes: str) -> str:
    """Of each process: for how long, in what state, where in the kernel, and its command."""
    fields = "pid,ppid,etimes,stat,wchan:24,args"
    return lab.run(host, "ps", "-o", fields, *processes.split(), check=False).stdout if processes else ""


@contextmanager
def written_by_another(lab: Lab, path: str, format_: str) -> Iterator[None]:
    """A process on kc-a has the image open for writing."""
    lab.run("kc-a", "sh", "-c", f"qemu-nbd -f {format_} -t -k /run/other.sock --fork {path}")
    try:
        yield
    finally:
        for pid in pids(lab, "kc-a", "qemu-nbd"):
            kill(lab, "kc-a", pid)


def children_of(pid: int) -> list[int]:
    """The pids of a process's children, the oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def remove(lab: Lab, host: str, *names: str) -> None:
    """Remove VMs and their disks, as a test's end."""
    kept = "--remove-all-storage --managed-save --snapshots-metadata --checkpoints-metadata --nvram"
    script = f'for vm; do virsh destroy --domain "$vm"; virsh undefine --domain "$vm" {kept}; done; true'
    lab.run(host, "sh", "-c", script, "remove", *names)


def wipe_vms(lab: Lab) -> None:
    """Remove every VM of the destination."""
    names = lab.run("kc-b", "virsh", "list", "--all", "--name").stdout.split("\n")
    remove(lab, "kc-b", *filter(None, names))


def wipe(lab: Lab) -> None:
    """Remove every VM of the destination, and everything in its pool."""
    wipe_vms(lab)
    lab.run("kc-b", "sh", "-c", f"find {IMAGES} -mindepth 1 -maxdepth 1 -exec rm -rf {{}} +")


EMULATOR = "/run/qemu-elsewhere"


@contextmanager
def refused_in_the_end(lab: Lab, vm: Vm) -> Iterator[None]:
    """The VM wants EMULATOR, which both hosts have: libvirt refuses its definition once a test removes it there."""
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", vm.name).stdout
    for host in ("kc-a", "kc-b"):
        lab.run(host, "cp", "-sf", "/usr/bin/qemu-system-x86_64", EMULATOR)
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace("/usr/bin/qemu-system-x86_64", EMULATOR))
    try:
        yield
    finally:
        lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)
        for host in ("kc-a", "kc-b"):
            lab.run(host, "rm", "-f", EMULATOR)
