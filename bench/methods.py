"""The ways to bring the disk from kc-a to kc-b, all through the lab's ssh, all onto an image that is new.

    kvm-clone    agent on kc-a ──ssh──> agent on kc-b; or both by way of this machine. It alone makes a VM of the copy.
    cat          cat image | ssh kc-b 'cat > image'
    scp, rsync   the same file, run on kc-a
    nbdcopy      qemu-nbd at both ends; the one of kc-b is seen on kc-a through ssh -L
    qemu-img     reads the image itself, and writes to kc-b's qemu-nbd as nbdcopy does

What is timed is the command that a user runs: for kvm-clone all of it, start of Python and connecting included; for
nbdcopy and qemu-img not the servers and the forwarding that have to be set up before.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arena import CLONE, COPY, DESTINATION, IMAGES, LIMIT_SECONDS, SOURCE, VM, Arena
from processes import run


@dataclass(frozen=True)
class Copied:
    """One copy: how long it took, where it lies on kc-b, and how long kvm-clone's own parts of it took."""

    seconds: float
    path: str = COPY
    copying: float = 0.0
    proving: float = 0.0


@dataclass(frozen=True)
class Method:
    """A way to copy: its name for the command line, and its title for the table."""

    name: str
    title: str
    copy: Callable[[Arena], Copied]
    ours: bool = False


def clone_command(arena: Arena, *flags: str) -> list[str]:
    """kvm-clone as a user runs it, with its result as JSON."""
    program = Path(sys.executable).with_name("kvm-clone")
    hosts = ("-F", str(arena.ssh_config), SOURCE, DESTINATION)
    return [str(program), "clone", *hosts, VM, "--new-name", CLONE, *flags, "-q", "--output", "json"]


def clone_environment(arena: Arena) -> dict[str, str]:
    """No settings but the defaults: neither of the user's environment nor of a file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVM_CLONE_")}
    own = str(arena.lab.state / "no-config")
    return {**environment, "XDG_CONFIG_HOME": own, "XDG_STATE_HOME": own}


def _clone(*flags: str) -> Callable[[Arena], Copied]:
    def copy(arena: Arena) -> Copied:
        done = run(clone_command(arena, *flags), clone_environment(arena), LIMIT_SECONDS)
        result = json.loads(done.output)
        [disk] = result["disks"]
        return Copied(done.seconds, disk["destination"], result["copy_seconds"], result["prove_seconds"])

    return copy


def _cat(arena: Arena) -> Copied:
    write = shlex.quote(f"cat > {COPY}")
    return Copied(arena.run(SOURCE, "sh", "-c", f"cat {shlex.quote(arena.image)} | ssh {DESTINATION} {write}").seconds)


def _scp(arena: Arena) -> Copied:
    return Copied(arena.run(SOURCE, "scp", "-q", arena.image, f"{DESTINATION}:{COPY}").seconds)


def _rsync(arena: Arena) -> Copied:
    return Copied(arena.run(SOURCE, "rsync", "-aS", "--inplace", arena.image, f"{DESTINATION}:{COPY}").seconds)


def _nbdcopy(arena: Arena) -> Copied:
    reading = f"{IMAGES}/reading.sock"
    serve = ("qemu-nbd", "--read-only", "--persistent", "--shared=0", "--format=qcow2", f"--socket={reading}")
    with arena.serving(SOURCE, reading, *serve, arena.image) as source, _written_from_afar(arena) as destination:
        return Copied(arena.run(SOURCE, "nbdcopy", "--flush", "--destination-is-zero", source, destination).seconds)


def _qemu_img(arena: Arena) -> Copied:
    with _written_from_afar(arena) as destination:
        # Without -W each write waits for the one before it, which takes eight times as long through ssh.
        convert = ("qemu-img", "convert", "-n", "-W", "--target-is-zero", "-f", "qcow2", "-O", "raw")
        return Copied(arena.run(SOURCE, *convert, arena.image, destination).seconds)


@contextmanager
def _written_from_afar(arena: Arena) -> Iterator[str]:
    """A new image on kc-b behind qemu-nbd, whose socket ssh forwards to kc-a; its URI there."""
    info = arena.run(SOURCE, "qemu-img", "info", "--output=json", arena.image).output
    size = json.loads(info)["virtual-size"]
    arena.run(DESTINATION, "qemu-img", "create", "-q", "-f", "qcow2", COPY, str(size))
    writing = f"{IMAGES}/writing.sock"
    serve = ("qemu-nbd", "--persistent", "--shared=0", "--discard=unmap", "--format=qcow2", f"--socket={writing}", COPY)
    forward = ("ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{writing}:{writing}", DESTINATION)
    with arena.serving(DESTINATION, writing, *serve), arena.serving(SOURCE, writing, *forward) as uri:
        yield uri


OURS, CAT = "ours", "cat"
"""The two that all others are compared with."""

METHODS = (
    Method(OURS, "kvm-clone --no-verify", _clone("--no-verify", "--route", "direct"), ours=True),
    Method("ours-verify", "kvm-clone, verified", _clone("--route", "direct"), ours=True),
    Method("ours-relay", "kvm-clone --no-verify, relay", _clone("--no-verify", "--route", "relay"), ours=True),
    Method(CAT, "cat | ssh cat", _cat),
    Method("scp", "scp", _scp),
    Method("rsync", "rsync -aS --inplace", _rsync),
    Method("nbdcopy", "nbdcopy", _nbdcopy),
    Method("qemu-img", "qemu-img convert", _qemu_img),
)
