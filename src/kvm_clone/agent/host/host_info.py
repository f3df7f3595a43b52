"""What the agent can say of its host, its directories and its disk images, without changing anything."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import platform
import pwd
import re
import shutil
import stat
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from kvm_clone.agent import names
from kvm_clone.agent.digests.digest import BLOCK
from kvm_clone.agent.disks import chain, device, filesystem, fingerprint, header, image, nbd, qemu, reflink
from kvm_clone.agent.disks.disk import DATA, joined, thinned
from kvm_clone.agent.disks.file import disk_size
from kvm_clone.agent.host.this_host import this_host
from kvm_clone.agent.protocol.errors import AgentError, from_exception


def host() -> Dict[str, Any]:
    """The host's name, Python and QEMU tools; a missing tool has the version None."""
    return {
        "identity": identity(),
        "hostname": platform.node(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "qemu_img": _version("qemu-img"),
        "qemu_nbd": _version("qemu-nbd"),
        "uid": os.geteuid(),
        "time": time.time(),
        "locks": names.lock_trouble(),
    }


LIBVIRT_SOCKETS = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")
"""The monolithic daemon's (or its proxy's), then the modular one's, which serves storage calls too."""


def identity() -> Dict[str, str]:
    """What distinguishes two hosts, or shows that they are one.

    `boot`: of the running kernel, drawn by it at its start. `libvirt`: the file of libvirt's socket, by device, inode
    and ctime: hosts that share a kernel (containers) have one each. `machine`: /etc/machine-id. Empty where unknown.
    """
    found = {"boot": _line("/proc/sys/kernel/random/boot_id"), "machine": this_host().machine, "libvirt": ""}
    for path in LIBVIRT_SOCKETS:
        with contextlib.suppress(OSError):
            about = os.stat(path)
            found["libvirt"] = f"{about.st_dev}:{about.st_ino}:{about.st_ctime_ns}"
            break
    return found


def _line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(256).strip()
    except OSError:
        return ""


def fingerprints(paths: List[str]) -> List[Optional[str]]:
    """The fingerprint of each file, None of one that is not there or cannot be looked at."""
    found: List[Optional[str]] = []
    for path in paths:
        try:
            found.append(fingerprint.of(path))
        except OSError:
            found.append(None)
    return found


def image_fingerprint(path: str, image_format: str = image.RAW) -> str:
    """The fingerprint of an image with all that it rests on; of format raw, of the file alone.

    Raises as chain.layers does.
    """
    return chain.fingerprint_of(chain.layers(path, image_format))


def marks(operation: str, directories: List[str]) -> List[Optional[str]]:
    """For each directory the one that an agent of the operation has marked, if they are the same (names.mark_path).

    Raises AgentError when that cannot be established.
    """
    return [_marked(names.mark_path(operation, directory)) for directory in directories]


def _marked(path: str) -> Optional[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a link is none of ours
            return None
        raise from_exception(error, f"looking for {path}") from error
    try:
        return os.fsdecode(os.read(fd, 4096)) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def _version(program: str) -> Optional[str]:
    if shutil.which(program) is None:
        return None
    found = re.search(r"\d+(\.\d+)+", qemu.version(program))
    return found.group(0) if found else "unknown"


def disk(path: str, image_format: str, live: bool = False) -> Dict[str, Any]:
    """What is known of an image file. `error` is there instead when it cannot be known.

    `layers`: [path, format] of each image that it rests on, the nearest first. `data`: how much of what the guest sees
    is not known to be zero; a guess with `live`, when a VM may be writing it. `stored`: what a fresh copy takes where
    that is less, for clusters that stay compressed; else 0. A raw device is not read: all of it may be data.
    """
    try:
        about = os.stat(path)
        answer: Dict[str, Any] = {
            "path": path,
            "real": os.path.realpath(path),
            "regular": stat.S_ISREG(about.st_mode),
            "device": device.is_device(about),
            "mode": stat.S_IMODE(about.st_mode) & 0o777,
            "user": _name(pwd.getpwuid, about.st_uid),
            "group": _name(grp.getgrgid, about.st_gid),
            "allocated": about.st_blocks * 512,
            "fingerprint": fingerprint.of(path),
            "virtual_size": disk_size(about.st_size),
            "layers": [],
        }
        if answer["device"]:
            answer.update(_device(path, about, live))
        holds = answer["regular"] or answer["device"]
        if holds and image_format == image.QCOW2:
            answer.update(_image(path, live))
        known = holds and not {"data_file", "encrypted"} & answer.keys()
        answer["data"], answer["stored"] = (
            _content(path, image_format, answer["virtual_size"], live) if known else (0, 0)
        )
    except (OSError, AgentError) as error:
        return {"path": path, "error": getattr(error, "strerror", None) or str(error)}
    return answer


def _device(path: str, about: os.stat_result, live: bool) -> Dict[str, Any]:
    """What a device has otherwise than a file: its node's owner and mode say nothing of a copy in a file."""
    if not live:
        device.check_counted(path, about)
    return {"virtual_size": device.size(about), "mode": 0o600, "user": "root", "group": "root"}


def _image(path: str, live: bool) -> Dict[str, Any]:
    """What a qcow2 image says of itself; the plan refuses one with a data file or encryption, and nobody opens it."""
    about = header.read(path)
    if about.data_file or about.encrypted:
        refused: Dict[str, Any] = {"data_file": about.data_name or "another file"} if about.data_file else {}
        return {**refused, **({"encrypted": True} if about.encrypted else {})}
    found = chain.layers(path, image.QCOW2)
    info = qemu.info(path, image.QCOW2, live=live)
    return {
        "image": info,
        "virtual_size": info["virtual-size"],
        "layers": [list(node) for node in found[1:]],
        "fingerprint": chain.fingerprint_of(found),
    }


def _content(path: str, image_format: str, size: int, live: bool) -> Tuple[int, int]:
    """`data` and `stored` of `disk`."""
    if live:
        return _guessed(path, image_format, size), 0
    data = kept = 0
    opened = image.open_for_reading(path, image_format)
    try:
        for extent in opened.extents():
            data += extent.length if extent.kind == DATA else 0
            kept += extent.length if extent.compressed else 0
    finally:
        opened.close()
    # How large a compressed cluster is nobody says; all of them are in the files, with the others.
    stored = _held_by(path, image_format) if kept else data
    return data, stored if stored < data else 0


def _held_by(path: str, image_format: str) -> int:
    """How many bytes the files of the image and of all that it rests on hold."""
    return sum(data_in(node.path, image.RAW) for node in chain.linear(path, image_format))


def _guessed(path: str, image_format: str, size: int) -> int:
    """The image's content while a VM writes it: by its tables as they are just now, else by what the file holds."""
    if image_format == image.QCOW2:
        try:
            found = qemu.map_extents(chain.linear(path, image_format), 0, size, shared=True)
            return sum(extent.length for extent in found if extent.kind == DATA)
        except AgentError:  # torn in the midst of a change
            pass
    return _held_by(path, image_format)


def data_held(path: str, image_format: str) -> int:
    """How many bytes of content the staged image has of its own; 0 where that is not known, as while it is written."""
    try:
        return data_in(path, image_format, own=True)
    except (AgentError, OSError):
        return 0


def data_in(path: str, image_format: str, ranges: Optional[List[List[int]]] = None, own: bool = False) -> int:
    """How many bytes of the image's content in [start, end) pairs (None: in all) are not known to be zero.

    `own`: only what lies in the image itself, and not in one that it rests on.
    """
    opened = image.open_for_reading(path, image_format)
    try:
        parts = ranges if ranges is not None else [[0, opened.size]]
        data = (extent for extent in opened.within(parts) if extent.kind == DATA)
        return sum(extent.length for extent in data if not (own and extent.layer))
    finally:
        opened.close()


def ranges_of(path: str, image_format: str, data: bool) -> List[List[int]]:
    """Where the image is known to be zero, or with `data` where it is not, as [start, end) pairs in bytes.

    Where there are very many, what lies between them is counted in.
    """
    opened = image.open_for_reading(path, image_format)
    try:
        found = thinned(((one.offset, one.end) for one in opened.extents() if (one.kind == DATA) is data), BLOCK)
    finally:
        opened.close()
    return [list(pair) for pair in joined(found)]


def free(path: str) -> int:
    """Bytes that the path's filesystem has room for."""
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize


def dirty(uri: str, bitmap: str) -> List[List[int]]:
    """The [start, end) pairs in bytes that a dirty bitmap of an NBD export names. Raises AgentError (missing)."""
    export = nbd.connect(uri, nbd.DIRTY_BITMAP + bitmap)
    try:
        return [list(pair) for pair in thinned(export.dirty(), BLOCK)]
    finally:
        export.close()


def _name(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


_NAME_MAX = 255
"""Bytes of a file's name, on every filesystem that images live on but a few that allow fewer."""

_NO_DIRECTORY = {
    "exists": False,
    "writable": False,
    "free": 0,
    "names": [],
    "more": False,
    "inodes": 0,
    "filesystem": 0,
    "reflink": False,
    "longest": _NAME_MAX,
    "abilities": {},
}


MOST_NAMES = 4096
"""So many of a directory's names are reported; a directory may hold millions."""


def directory(path: str, stems: Sequence[str] = (), tried: bool = True) -> Dict[str, Any]:
    """Whether the directory is there and can be written, its free bytes, and whether files share.

    `names`: those in it that begin with one of the stems, in whatever case, MOST_NAMES at most; `more`: there are more.
    `abilities`: see filesystem.abilities; nothing is tried where this user cannot write, nor without `tried`, since a
    few filesystems can be tried only with files that have names.
    """
    if not os.path.isdir(path):
        return {**_NO_DIRECTORY, "path": path}
    space = os.statvfs(path)
    found, more = _names(path, stems) if stems else ([], False)
    writable = os.access(path, os.W_OK | os.X_OK)
    return {
        "path": path,
        "exists": True,
        "writable": writable,
        "free": free(path),
        # Filesystems that make inodes as they go say that they have none.
        "inodes": space.f_favail if space.f_files else 1 << 40,
        "filesystem": os.stat(path).st_dev,
        "reflink": reflink.works_in(path),
        "names": found,
        "more": more,
        "longest": min(_NAME_MAX, space.f_namemax or _NAME_MAX),
        "abilities": filesystem.abilities(path) if writable and tried else {},
    }


def _names(path: str, stems: Sequence[str]) -> Tuple[List[str], bool]:
    """`names` and `more` of `directory`; any name may be in one that this user can write and not read."""
    try:
        return filesystem.names_in(path, stems, MOST_NAMES)
    except PermissionError:
        return [], True
