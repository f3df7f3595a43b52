"""What a test guest does beyond ticking: an archive behind the file system of its boot disk.

The boot image is the same for all guests, and no larger than they need to boot. A guest whose boot disk
goes on behind its file system unpacks the archive that is there and runs its `start`.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kclab import packages
from kclab.command import LabError, run
from kclab.state import REPOSITORY, Lab

SOURCE = REPOSITORY / "lab/guest/workload.c"
COMPILE = ("cc", "-static", "-O2", "-Wall", "-Wextra")
TICK = "tick"
COUNTER = "counter"
FILES = "fs"
MODES = (TICK, COUNTER, FILES)
# Data disks that the workload of a mode needs at least.
DISKS = {TICK: 0, COUNTER: 2, FILES: 1}
WORKLOADS = {COUNTER: "workload counter /dev/vdb /dev/vdc", FILES: "workload files /data"}
MOUNT = "mkdir -p /data && mount -t ext4 /dev/vdb /data || echo 'WORKLOAD-FAILED mount'\n"
# What the power button does first.
UNMOUNT = """\
kill "$(cat /workload.pid)"
for try in $(seq 100); do
  ! umount /data 2>/dev/null || break
  sleep 0.1
done
"""
# The port has no name before the guest has asked for it.
START_AGENT = """\
mkdir -p /run
(
  for try in $(seq 100); do
    for port in /sys/class/virtio-ports/*; do
      name=
      [ ! -e "$port/name" ] || read -r name <"$port/name"
      if [ "$name" = org.qemu.guest_agent.0 ]; then
        exec qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run
      fi
    done
    sleep 0.1
  done
) &
"""
# Prints the variable's text, or makes the variable with a text that nobody else has: its first four bytes say that it
# is kept, and that the firmware and the system both see it.
UEFI_VARIABLE = r"""
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
file=/sys/firmware/efi/efivars/KvmClone-3a1e3c2c-7d4f-4c1b-9a55-0f8f5b1d6e01
if [ ! -e $file ]; then
  IFS= read -r text </proc/sys/kernel/random/uuid
  printf "\007\000\000\000$text" >$file
fi
echo "EFI-VARIABLE $(dd if=$file bs=1 skip=4 2>/dev/null)"
"""
# What the agent runs to power the guest off.
SHUTDOWN = "#!/bin/sh\nexec /etc/acpi/PWRF/00000080\n"


@dataclass(frozen=True)
class Extras:
    """What a guest shall do: one of MODES; whether it runs the QEMU guest agent, and boots by UEFI.

    `volumes`: its definition names its disks by pool and volume.
    """

    mode: str = TICK
    agent: bool = False
    uefi: bool = False
    volumes: bool = False

    @property
    def has_guest(self) -> bool:
        """Tell whether a guest is to do something."""
        return self.mode != TICK or self.agent

    @property
    def any(self) -> bool:
        """Tell whether the guest needs an archive."""
        return self.has_guest or self.uefi

    @property
    def file_system(self) -> str | None:
        """The disk that the guest mounts."""
        return "vdb" if self.mode == FILES else None


def archive(lab: Lab, extras: Extras, modules: Path) -> bytes:
    """Make the archive of a guest; `modules` has kernel modules, named in the order to load them."""
    contents = {f"extras/{path.name}": path.read_bytes() for path in sorted(modules.iterdir())}
    contents["start"] = _start(extras).encode()
    if extras.mode == FILES:
        contents["stop"] = UNMOUNT.encode()
    if extras.mode in WORKLOADS:
        contents["bin/workload"] = _workload(lab).read_bytes()
    if extras.agent:
        contents["sbin/shutdown"] = SHUTDOWN.encode()
        contents |= _agent(lab)
    return _packed(contents)


def _packed(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755
            made.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _start(extras: Extras) -> str:
    script = 'for module in /extras/*.ko; do\n  [ ! -e "$module" ] || insmod "$module"\ndone\n'
    if extras.mode == FILES:
        script += MOUNT
    if extras.mode in WORKLOADS:
        script += f"{WORKLOADS[extras.mode]} &\necho $! >/workload.pid\n"
    script += UEFI_VARIABLE if extras.uefi else ""
    return script + (START_AGENT if extras.agent else "")


def _agent(lab: Lab) -> dict[str, bytes]:
    """Read the guest agent and its libraries, which the first call gathers."""
    recipe = Path(packages.__file__).read_bytes()
    kept = lab.cache / f"agent-{hashlib.sha256(recipe).hexdigest()[:12]}.tar"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=lab.cache) as directory:
            made = Path(directory, "archive")
            made.write_bytes(_packed(packages.guest_agent(Path(directory))))
            made.rename(kept)
    with tarfile.open(kept) as archived:
        opened = [(entry.name, archived.extractfile(entry)) for entry in archived]
        return {name: file.read() for name, file in opened if file is not None}


def _workload(lab: Lab) -> Path:
    """Return the compiled program, which the first call makes."""
    source = SOURCE.read_bytes()
    program = lab.cache / f"workload-{hashlib.sha256(source + repr(COMPILE).encode()).hexdigest()[:12]}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=lab.cache) as directory:
            made = Path(directory, "workload")
            try:
                run(*COMPILE, "-o", str(made), str(SOURCE))
            except LabError as error:
                raise LabError(f"the guest's workload cannot be compiled (run scripts/install lab): {error}") from error
            made.rename(program)
    return program
