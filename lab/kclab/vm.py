"""Virtual machines to clone: their disks, definition and start."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from kclab import disk, guest, host
from kclab.command import LabError, run
from kclab.disk import Disk
from kclab.extras import DISKS, Extras
from kclab.state import Host

IMAGES = "/var/lib/libvirt/images"
# A directory that libvirt makes on every host, so that a clone's serial port works there too.
SERIAL_LOGS = "/var/log/libvirt/qemu"
DEFAULT_DISK = Disk("qcow2", 64 << 20, 8 << 20)
MEMORY_MIB = 96
UEFI_MEMORY_MIB = 256
BIOS = "<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>"
# libvirt chooses the loader, and makes the file of the variables at the first start.
UEFI = (
    "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type>"
    "<firmware><feature enabled='no' name='secure-boot'/></firmware><boot dev='hd'/></os>"
)
CHANNEL = """
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"""
UNDEFINE = ("--managed-save", "--snapshots-metadata", "--checkpoints-metadata", "--nvram")


@dataclass(frozen=True)
class Vm:
    """A defined VM; paths are the host's own, `serial_here` is the same file seen from outside."""

    host: str
    name: str
    uuid: str
    state: str
    disks: dict[str, str]
    serial: str
    serial_here: str

    def report(self) -> str:
        """For people."""
        lines = [f"{self.name}: {self.state} on {self.host}, uuid {self.uuid}"]
        lines += [f"disk {target}: {path}" for target, path in self.disks.items()]
        return "\n".join([*lines, f"serial: {self.serial}", f"serial on this machine: {self.serial_here}"])

    def fields(self) -> dict[str, object]:
        """For programs."""
        return asdict(self)


def make(where: Host, name: str, disks: list[Disk], boot: bool, start: bool, extras: Extras) -> Vm:
    """Make the disks of a VM and define it, in place of one that has its name; no disks: those it needs."""
    disks = disks or [DEFAULT_DISK] * max(1, DISKS[extras.mode])
    _check_name(name)
    _check_extras(extras, disks, boot)
    _remove_existing(where, name)
    safe = safe_name(name)
    serial = f"{SERIAL_LOGS}/{safe}-serial.log"
    seen_serial = _outside(where, serial)
    seen_serial.unlink(missing_ok=True)
    placed: dict[str, tuple[str, str]] = {}
    if boot:
        path = f"{IMAGES}/{safe}-vda.qcow2"
        guest.copy_boot_disk(where.lab, _outside(where, path), extras)
        placed["vda"] = (path, "qcow2")
    for number, wanted in enumerate(disks, start=len(placed)):
        target = f"vd{chr(ord('a') + number)}"
        path = f"{IMAGES}/{safe}-{target}.{wanted.format}"
        disk.make(wanted, _outside(where, path), name, target, target == extras.file_system)
        placed[target] = (path, wanted.format)
    uuid = str(where.lab.derived_uuid(f"{where.name} vm {name}"))
    _virsh(where, "define", "/dev/stdin", stdin=_definition(where, name, uuid, placed, serial, extras))
    _virsh(where, "pool-refresh", "default")
    if start:
        _virsh(where, "start", uuid)
    state = "running" if start else "shut off"
    paths = {target: path for target, (path, _) in placed.items()}
    return Vm(where.name, name, uuid, state, paths, serial, str(seen_serial))


def safe_name(name: str) -> str:
    """Make a file name of any VM name; one that had to be changed gets a hash, so that two never meet."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:60]
    if plain == name:
        return plain
    return f"{plain or 'vm'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_name(name: str) -> None:
    if not name or "/" in name or any(ord(letter) < 32 for letter in name):
        raise LabError(f"bad VM name {name!r}: libvirt wants some characters, but no / and no control character")


def _check_extras(extras: Extras, disks: list[Disk], boot: bool) -> None:
    if extras.has_guest and not boot:
        raise LabError("a VM without a boot disk has no guest for --guest and --guest-agent")
    if len(disks) < DISKS[extras.mode]:
        raise LabError(f"--guest {extras.mode} needs {DISKS[extras.mode]} data disks: give --disk as often, or never")


def _outside(where: Host, path: str) -> Path:
    """Where a file under the host's own directories lies on this machine."""
    return Path(f"{where.root}{path}")


def _remove_existing(where: Host, name: str) -> None:
    found = _virsh(where, "domuuid", f"--domain={name}", check=False)
    if found is not None:
        _virsh(where, "destroy", found, check=False)
        _virsh(where, "undefine", found, *UNDEFINE)
    disks = re.compile(re.escape(safe_name(name)) + r"-vd[a-z]\.(qcow2|raw)(\.raw)?")
    for path in _outside(where, IMAGES).iterdir():
        if disks.fullmatch(path.name):
            path.unlink()


def _virsh(where: Host, *argv: str, stdin: str = "", check: bool = True) -> str | None:
    """Return what a virsh command on the host prints, or None when it failed and need not succeed."""
    done = run(*host.entered(where, "virsh", "-q", "-c", "qemu:///system", *argv), check=False, stdin=stdin)
    if done.returncode == 0:
        return done.stdout.strip()
    if check:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"virsh {argv[0]} on {where.name}: {lines[-1]}")
    return None


def _definition(
    where: Host, name: str, uuid: str, disks: dict[str, tuple[str, str]], serial: str, extras: Extras
) -> str:
    drives = "".join(
        f"""
    <disk type='{"volume" if extras.volumes else "file"}' device='disk'>
      <driver name='qemu' type='{kind}' discard='unmap'/>
      {_source(path, extras)}
      <target dev='{target}' bus='virtio'/>
    </disk>"""
        for target, (path, kind) in disks.items()
    )
    # The boot ROM of the network card would only make the start slower.
    card = """
    <interface type='network'>
      <source network='default'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>"""
    networks = (_virsh(where, "net-list", "--name") or "").split()
    return f"""\
<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{UEFI_MEMORY_MIB if extras.uefi else MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  {UEFI if extras.uefi else BIOS}
  <features><acpi/></features>
  <clock offset='utc'/>
  <devices>{drives}{card if "default" in networks else ""}{CHANNEL if extras.agent else ""}
    <serial type='file'><source path={quoteattr(serial)}/><target port='0'/></serial>
    <console type='file'><source path={quoteattr(serial)}/><target type='serial' port='0'/></console>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def _source(path: str, extras: Extras) -> str:
    if extras.volumes:
        return f"<source pool='default' volume={quoteattr(Path(path).name)}/>"
    return f"<source file={quoteattr(path)}/>"
