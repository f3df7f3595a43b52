"""The pool `own` on kc-b: on a filesystem of its own, perhaps on a device that breaks."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clonekit import IMAGES, wipe_vms
from labclient import Lab

MIB = 1 << 20
OWN = f"{IMAGES}/own"


@contextmanager
def own_pool(lab: Lab, mount: str) -> Iterator[None]:
    """The pool `own` on kc-b, on what the command `mount DIRECTORY` puts there."""
    script = f"mkdir {OWN}; {mount} {OWN}; rm -rf {OWN}/lost+found; virsh pool-create-as own dir --target {OWN}"
    lab.run("kc-b", "sh", "-e", "-c", script)
    try:
        yield
    finally:
        wipe_vms(lab)
        lab.run("kc-b", "sh", "-c", f"virsh pool-destroy own; umount {OWN}; rmdir {OWN}; true")


def in_pool(lab: Lab) -> list[str]:
    """The names in the pool, if there is one."""
    return lab.run("kc-b", "ls", "-A", OWN, check=False).stdout.split()


def digest(lab: Lab, host: str, path: str, format_: str = "") -> str:
    """Of what the guest sees; asked on the host, which alone sees its mounts."""
    script = 'qemu-img convert ${2:+-f} $2 -O raw "$1" /run/content && sha256sum /run/content && rm /run/content'
    return lab.run(host, "sh", "-c", script, "digest", path, format_).stdout


class Device:
    """A disk in memory whose writes fail from some moment on, for good: the loop device's file gets sealed."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("device", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        self.file = Path(f"/proc/{os.getpid()}/fd/{self._fd}")
        os.truncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)

    def format(self, *options: str) -> None:
        """Make an ext4 filesystem that has everything but files and a journal in the first MiB."""
        _run("mkfs.ext4", "-q", "-b", "4096", "-N", "64", *options, str(self.file))

    def format_btrfs(self) -> None:
        """Make a filesystem whose files can share blocks."""
        _run("mkfs.btrfs", "-q", "--mixed", str(self.file))

    def fail(self) -> None:
        """Every write fails from now on."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def fail_after(self, end: int) -> None:
        """What lies behind is lost, and every write there fails from now on."""
        os.truncate(self._fd, end)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


@contextmanager
def device(size: int = 128 * MIB) -> Iterator[Device]:
    """A device of `size` bytes."""
    made = Device(size)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def pool_on(lab: Lab, disk: Device) -> Iterator[None]:
    """The pool `own` on the device."""
    loop = _run("losetup", "--find", "--show", str(disk.file)).strip()
    try:
        with own_pool(lab, f"mount {loop}"):
            _run("losetup", "--detach", loop)  # now it goes with its mount, whatever becomes of this process
            yield
    except BaseException:
        subprocess.run(["losetup", "--detach", loop], capture_output=True, check=False)
        raise


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
