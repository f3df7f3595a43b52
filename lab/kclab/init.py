"""The first process of a host's PID namespace: mounts the host's own files and starts its daemons.

Started in new mount, UTS, PID and network namespaces as `python3 -I init.py DIRECTORY NAME`. Killing it is
a power cut: the kernel ends every process of the namespace with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

OWN_FILES = (
    "/var/lib/libvirt",
    "/var/log/libvirt",
    "/var/cache/libvirt",
    "/etc/libvirt",
    "/etc/ssh",
    "/root/.ssh",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/machine-id",
    "/etc/shadow",
)
DAEMONS = (["virtlogd"], ["libvirtd"], [shutil.which("sshd") or "sshd", "-D", "-e"])
# The user's shell set-up, and KVM, which does not work on every machine that has the device.
HIDDEN = ("/root/.bashrc", "/dev/kvm")


def main(directory: Path, name: str) -> None:
    """Become the host, then reap the namespace's orphans for ever."""
    record_pid(directory / "init.pid")
    socket.sethostname(name)
    # Opened first, as the directory may lie under a path that the host's own files hide.
    logs = {argv[0]: (directory / f"{Path(argv[0]).name}.log").open("ab") for argv in DAEMONS}
    mount_all(directory / "root")
    for argv in DAEMONS:
        with logs[argv[0]] as log:
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        if argv == ["virtlogd"]:
            wait_for(Path("/run/libvirt/virtlogd-sock"))
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
            continue
        time.sleep(1)


def record_pid(file: Path) -> None:
    """Write the process id as the machine sees it, which /proc shows until the namespace has its own."""
    pid = os.readlink("/proc/self")
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    temporary = file.with_suffix(".new")
    temporary.write_text(f"{pid} {started}\n")
    temporary.rename(file)


def mount_all(root: Path) -> None:
    """Give the namespace its own /proc, files and empty /run and /tmp."""
    resolver = Path("/etc/resolv.conf").resolve()
    mount("-t", "proc", "proc", "/proc")
    for path in OWN_FILES:
        source = Path(f"{root}{path}")
        if source.is_dir():
            Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        mount("--bind", str(source), path)
    for path in HIDDEN:
        if Path(path).exists():
            # A read-only empty file: libvirt must find that it cannot write to /dev/kvm. Could it open the
            # device without being able to use it, it would probe QEMU again (5 s) for every definition.
            mount("--bind", str(root / "empty"), path)
            mount("-o", "remount,bind,ro", path)
    # After the others, as the state directory itself may lie under one of them.
    with kept_visible(REPOSITORY):
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/tmp")
    for needed in ("/run/sshd", "/run/lock", "/run/libvirt"):
        Path(needed).mkdir()
    if str(resolver).startswith("/run/"):
        resolver.parent.mkdir(parents=True, exist_ok=True)
        resolver.touch()


@contextlib.contextmanager
def kept_visible(path: Path) -> Iterator[None]:
    """A checkout under /tmp or /run stays where it is, so that what lies in it can be run on the hosts."""
    if not str(path).startswith(("/tmp/", "/run/")):
        yield
        return
    descriptor = os.open(path, os.O_PATH)
    yield
    path.mkdir(parents=True)
    argv = ["mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{descriptor}", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, pass_fds=[descriptor])
    os.close(descriptor)


def mount(*argv: str) -> None:
    """Mount, by the program of that name."""
    subprocess.run(["mount", *argv], check=True, stdin=subprocess.DEVNULL)


def wait_for(path: Path) -> None:
    """Wait until a daemon has made its socket."""
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
