"""Where the benchmark takes place: a lab of its own on tmpfs, with one VM on kc-a to be copied to kc-b."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import BenchError, Done, check_running, ignore_ending_signals, run, running

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "lab"))

from kclab import host as lab_host  # noqa: E402
from kclab.command import LabError, environment  # noqa: E402
from kclab.disk import parse_size  # noqa: E402
from kclab.state import Lab  # noqa: E402

STATE = Path("/dev/shm/kvm-clone-bench")
SOURCE, DESTINATION = "kc-a", "kc-b"
VM, CLONE = "bench", "b1"
IMAGES = "/var/lib/libvirt/images"
COPY = f"{IMAGES}/copy.qcow2"

LIMIT_SECONDS = 600.0
"""For one copy; other commands get less."""

_SHORT_SECONDS = 120.0
_READY_SECONDS = 10.0


@dataclass(frozen=True)
class Arena:
    """The lab that is up. `image` is the source's disk as kc-a sees it."""

    lab: Lab
    image: str

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`."""
        return self.lab.ssh_config

    def outside(self, host: str, path: str) -> Path:
        """Where a file of a host lies on this machine."""
        return Path(f"{self.lab.host(host).root}{path}")

    def first_processes(self) -> dict[str, int]:
        """The process of each host from which all its others descend."""
        found = {name: lab_host.init_pid(self.lab.host(name)) for name in (SOURCE, DESTINATION)}
        return {name: pid for name, pid in found.items() if pid is not None}

    def run(self, host: str, *argv: str) -> Done:
        """Run a command on a host. Raises BenchError."""
        return run(self.entered(host, *argv), environment(), LIMIT_SECONDS)

    @contextmanager
    def serving(self, host: str, path: str, *argv: str) -> Iterator[str]:
        """Have a server run on a host, ready on its UNIX socket at `path`; the socket's NBD URI."""
        seen = self.outside(host, path)
        seen.unlink(missing_ok=True)
        with running(self.entered(host, *argv), environment()) as process:
            _wait_for_socket(seen, process)
            yield f"nbd+unix:///?socket={path}"

    def clear(self) -> None:
        """Remove from the destination what an earlier copy has left, and let the disks come to rest."""
        virsh = ("virsh", "-q", "-c", "qemu:///system")
        if CLONE in self.run(DESTINATION, *virsh, "list", "--all", "--name").output.split():
            self.run(DESTINATION, *virsh, "undefine", CLONE)
        for file in self.outside(DESTINATION, IMAGES).iterdir():
            file.unlink()
        os.sync()

    def check(self, copy: str) -> None:
        """Compare a copy at the destination with the source's disk. Raises BenchError when they differ."""
        files = [str(self.outside(SOURCE, self.image)), str(self.outside(DESTINATION, copy))]
        run(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", *files], environment(), LIMIT_SECONDS)

    def resized(self, size: int, data: int) -> Arena:
        """The same with a new VM, whose disk has `size` bytes, of them `data` of content."""
        self.clear()
        return Arena(self.lab, _make_vm(size, data))

    def make_running(self, name: str, disk: str) -> Path:
        """Make and start a VM on the source, in place of one of that name; its serial port's file."""
        made = _lab("vm", SOURCE, name, "--guest", "counter", "--disk", disk, "--disk", disk, "--start", "--json")
        return Path(json.loads(made)["serial_here"])

    def remove_running(self, name: str) -> None:
        """Stop and remove such a VM with its disks."""
        virsh = ("virsh", "-q", "-c", "qemu:///system")
        self.run(SOURCE, *virsh, "destroy", name)
        self.run(SOURCE, *virsh, "undefine", name, "--checkpoints-metadata", "--remove-all-storage")

    def entered(self, host: str, *argv: str) -> list[str]:
        """The command that runs another one on a host."""
        return lab_host.entered(self.lab.host(host), *argv)


def size_in_bytes(text: str) -> int:
    """Bytes from 64M, 1.5G, 512, as lab/lab understands them. Raises BenchError."""
    try:
        return parse_size(text)
    except LabError as error:
        raise BenchError(str(error)) from error


@contextmanager
def arena(size: str, data: str, needed: int, *, keep: bool) -> Iterator[Arena]:
    """The lab with its VM, up; brought down in the end unless it is to be kept. `needed`: bytes. Raises BenchError."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    mine = os.open(STATE, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(mine)
        raise BenchError(f"another benchmark runs in {STATE}") from None
    try:
        free = shutil.disk_usage(STATE).free
        if free < needed:
            raise BenchError(
                f"{STATE.parent} has {free >> 20} MiB free, {needed >> 20} are needed: "
                "try a smaller --data and --delta-data"
            )
        _lab("up")
        yield Arena(Lab(STATE), _make_vm(size, data))
    except LabError as error:
        raise BenchError(str(error)) from error
    finally:
        ignore_ending_signals()
        if not keep:
            _lab("down")
            shutil.rmtree(STATE)
        os.close(mine)


def _make_vm(size: object, data: object) -> str:
    """Make the VM on the source, in place of one that is there; its image."""
    made = _lab("vm", SOURCE, VM, "--no-boot-disk", "--disk", f"qcow2:{size}:{data}", "--json")
    return str(json.loads(made)["disks"]["vda"])


def _lab(*argv: str) -> str:
    settings = {**environment(), "KVM_CLONE_LAB_STATE": str(STATE)}
    return run([str(REPOSITORY / "lab/lab"), *argv], settings, _SHORT_SECONDS).output


def _wait_for_socket(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        check_running(process)
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"nothing listens on {path.name}: {error}") from error
            else:
                return
        time.sleep(0.02)
