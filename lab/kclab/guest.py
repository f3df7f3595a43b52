"""The boot disk of the test guests: a Debian cloud kernel, busybox and a small init, on FAT with syslinux.

UEFI finds nothing to boot there and starts its shell, which runs startup.nsh: the kernel is a program of UEFI, too.

The guest prints `GUEST-UP <first line of its second disk>` on its serial port, then writes a counter to
that disk once a second, and powers off when asked by ACPI. What else it may do is in `kclab.extras`.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kclab import extras, packages
from kclab.command import LabError, run, which
from kclab.extras import Extras
from kclab.state import Lab

# In the order of their dependencies.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "button",
    "evdev",
)
APPLETS = ("sh", "mount", "umount", "mkdir", "cat", "insmod", "seq", "sleep", "dd", "tar", "acpid", "poweroff")
# For what is in `kclab.extras`, with what these depend on.
EXTRA_MODULES = ("crc32c_generic", "ext4", "virtio_console", "efivarfs")
KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
FAT_KIB = 24 * 1024
KERNEL = "vmlinuz.efi"
COMMAND_LINE = "console=ttyS0 quiet panic=1 mitigations=off"
SYSLINUX = f"""\
DEFAULT guest
PROMPT 0
LABEL guest
  KERNEL {KERNEL}
  APPEND initrd=initrd.gz {COMMAND_LINE}
"""
STARTUP = f"FS0:\\{KERNEL} initrd=\\initrd.gz {COMMAND_LINE}\r\n"
# The counter goes to one sector after another of the second MiB, so that the first line stays.
INIT = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for name in @MODULES@; do
  [ ! -e "/modules/$name.ko" ] || insmod "/modules/$name.ko"
done
text='(no data disk)'
[ ! -b /dev/vdb ] || IFS= read -r text </dev/vdb
echo "GUEST-UP $text" >/dev/ttyS0
if [ -b /dev/vda ] && read -r sectors </sys/block/vda/size && [ "$sectors" -gt @SECTORS@ ]; then
  cd /
  dd if=/dev/vda bs=512 skip=@SECTORS@ 2>/dev/null | tar x
  [ ! -e /start ] || . /start >/dev/ttyS0 2>&1
fi
acpid -d -f >/dev/null 2>&1 &
while [ -e /workload.pid ]; do
  sleep 60
done
count=0
while :; do
  sleep 1
  count=$((count + 1))
  [ ! -b /dev/vdb ] || echo "tick $count" |
    dd of=/dev/vdb bs=512 seek=$((2048 + count % 2048)) conv=sync,notrunc,fsync 2>/dev/null
done
"""
POWER_BUTTON = "#!/bin/sh\n[ ! -e /stop ] || . /stop\nexec /bin/poweroff -f\n"


def boot_disk(lab: Lab) -> Path:
    """Return the cached qcow2 boot disk, which the first call makes; `extra_modules` tells what lies beside it."""
    recipe = (INIT, SYSLINUX, STARTUP, MODULES, EXTRA_MODULES, APPLETS, POWER_BUTTON)
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    image = lab.cache / f"guest-{key}.qcow2"
    with lab.locked():
        if not image.exists():
            if platform.machine() != "x86_64":
                raise LabError("the guest image is for x86_64 only: use --no-boot-disk on this machine")
            with tempfile.TemporaryDirectory(dir=lab.cache) as directory:
                _build(Path(directory), image)
    return image


def extra_modules(image: Path) -> Path:
    """Return the directory of the kernel modules for `kclab.extras`, which fit the boot disk's kernel."""
    return image.with_suffix(".modules")


def _build(directory: Path, image: Path) -> None:
    kernel, modules = _kernel(directory)
    files = {
        KERNEL: kernel.read_bytes(),
        "initrd.gz": gzip.compress(_initramfs(modules), 6),
        "syslinux.cfg": SYSLINUX.encode(),
        "startup.nsh": STARTUP.encode(),
    }
    fat = directory / "guest.fat"
    run("mkfs.vfat", "-C", "-n", "GUEST", str(fat), str(FAT_KIB))
    run("syslinux", "--install", str(fat))
    for name, content in files.items():
        (directory / name).write_bytes(content)
        run("mcopy", "-i", str(fat), str(directory / name), f"::{name}")
    made = directory / "guest.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(fat), str(made))
    _keep_extra_modules(directory / "modules", modules, extra_modules(image))
    made.rename(image)


def _keep_extra_modules(made: Path, modules: Path | None, kept: Path) -> None:
    made.mkdir()
    for number, (name, content) in enumerate(_with_dependencies(modules, EXTRA_MODULES) if modules else ()):
        (made / f"{number:02}-{name}.ko").write_bytes(content)
    shutil.rmtree(kept, ignore_errors=True)
    made.rename(kept)


def _kernel(directory: Path) -> tuple[Path, Path | None]:
    """Find a kernel and its modules: those of the distribution's package, else this machine's own."""
    for package in _kernel_packages():
        root = packages.unpack(package, directory)
        if root is not None:
            return _newest(root / "boot", root)
    if list(Path("/boot").glob("vmlinuz-*")):
        return _newest(Path("/boot"), Path("/"))
    raise LabError(
        "no kernel for the guest: neither can apt-get download "
        f"{' or '.join(KERNEL_PACKAGES)} (try apt-get update), nor is there a /boot/vmlinuz-*"
    )


def _kernel_packages() -> list[str]:
    """List the versioned packages that the distribution's meta packages stand for."""
    if which("apt-cache") is None:
        return []
    found = [
        re.findall(r"Depends: (linux-image-\d\S*)", run("apt-cache", "depends", meta, check=False).stdout)
        for meta in KERNEL_PACKAGES
    ]
    return [names[0] for names in found if names]


def _newest(boot: Path, root: Path) -> tuple[Path, Path | None]:
    kernel = max(boot.glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    version = kernel.name[len("vmlinuz-") :]
    places = (root / "lib/modules" / version, root / "usr/lib/modules" / version)
    return kernel, next((place for place in places if place.is_dir()), None)


def _initramfs(modules: Path | None) -> bytes:
    archive = _Cpio()
    for directory in ("bin", "dev", "proc", "sys", "modules", "etc", "etc/acpi", "etc/acpi/PWRF"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    busybox = which("busybox")
    if busybox is None:
        raise LabError("busybox is missing: run scripts/install lab")
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    for applet in APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    # The kernel opens it for init before devtmpfs is mounted.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    init = INIT.replace("@MODULES@", " ".join(MODULES)).replace("@SECTORS@", str(FAT_KIB * 2))
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    archive.add("etc/acpi/PWRF/00000080", stat.S_IFREG | 0o755, POWER_BUTTON.encode())
    for name in MODULES:
        content = _module(modules, name) if modules else None
        if content is not None:
            archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, content)
    return archive.finish()


def _with_dependencies(modules: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Read modules in the order to load them, without those that every guest has loaded."""
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = _module_path(modules, name)
        if path is None or name in found or name in MODULES:
            return
        for needed in run("modinfo", "-F", "depends", str(path)).stdout.strip().split(","):
            add(needed)
        found[name] = _unpacked(path)

    for name in names:
        add(name)
    return list(found.items())


def _module(modules: Path, name: str) -> bytes | None:
    """Read a kernel module, unpacked for busybox; None when it is not there (built in)."""
    path = _module_path(modules, name)
    return None if path is None else _unpacked(path)


def _module_path(modules: Path, name: str) -> Path | None:
    """Find a module's file; what the kernel calls a_b may be in a file of the name a-b."""
    return next(modules.rglob(f"{name.replace('_', '[-_]')}.ko*"), None)


def _unpacked(path: Path) -> bytes:
    if path.suffix == ".zst":
        with tempfile.TemporaryDirectory() as directory:
            run("zstd", "-d", "-q", "-o", f"{directory}/module", str(path))
            return Path(directory, "module").read_bytes()
    unpack: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
    return unpack.get(path.suffix, bytes)(path.read_bytes())


class _Cpio:
    """A writer of the kernel's initramfs format ("newc")."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: Sequence[int] = (0, 0)) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file, device node, name size, checksum
        fields = [self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + encoded), _padded(content)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def copy_boot_disk(lab: Lab, path: Path, wanted: Extras) -> None:
    """Give a VM its own boot disk, with the extras behind what it boots from."""
    image = boot_disk(lab)
    if not wanted.any:
        shutil.copyfile(image, path)
    else:
        with tempfile.TemporaryDirectory(dir=lab.cache) as directory:
            raw = Path(directory, "raw")
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
            with raw.open("ab") as file:
                file.write(extras.archive(lab, wanted, extra_modules(image)))
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    os.chmod(path, 0o600)
