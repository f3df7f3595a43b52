"""Running kvm-clone against the lab, and looking at what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from labclient import Lab, Vm

IMAGES = "/var/lib/libvirt/images"
AGENT = "python3 -I -c exec("
"""How an agent's command line begins."""

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


def environment() -> dict[str, str]:
    """The environment without a configuration of whoever runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVM_CLONE_")}
    return {**kept, "XDG_CONFIG_HOME": "/nonexistent"}


def kvm_clone(lab: Lab, command: str, *argv: str, seconds: float = 120) -> Done:
    """Run kvm-clone with the lab's ssh configuration."""
    line = [sys.executable, "-m", "kvm_clone.cli", command, "-F", str(lab.ssh_config), *argv]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def running(lab: Lab, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A clone under way, which is killed in the end if it has not ended."""
    line = [sys.executable, "-m", "kvm_clone.cli", "clone", "-F", str(lab.ssh_config), *argv]
    child = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def ended(child: subprocess.Popen[str], seconds: float = 90) -> Done:
    """Wait for a clone that is under way."""
    out, err = child.communicate(timeout=seconds)
    return Done(child.returncode, out, err)


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


def agents(lab: Lab, host: str) -> list[int]:
    """The agents' pids on the host, the oldest first: the control agent, then a sender or receiver."""
    found = lab.run(host, "pgrep", "-f", AGENT.replace("(", r"\("), check=False).stdout.split()
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
ls -A /run/lock /run | grep kvm-clone; echo --
pgrep -f 'python3 -I -c exec\('; pgrep -x 'qemu-nbd|qemu-img'; true
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


def remove(lab: Lab, host: str, *names: str) -> None:
    """Remove VMs and their disks, as a test's end."""
    script = 'for vm; do virsh destroy --domain "$vm"; virsh undefine --domain "$vm" --remove-all-storage; done; true'
    lab.run(host, "sh", "-c", script, "remove", *names)
