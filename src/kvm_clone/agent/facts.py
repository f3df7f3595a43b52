"""What the agent can say of its host, its directories and its disk images, without changing anything."""

from __future__ import annotations

import grp
import json
import os
import platform
import pwd
import re
import shutil
import stat
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from . import filesystem, image, nbd, qemu, reflink
from .digest import BLOCK
from .disk import DATA, joined, thinned
from .errors import AgentError
from .file import disk_size
from .process import run


def host() -> Dict[str, Any]:
    """The host's name, Python and QEMU tools; a missing tool has the version None."""
    return {
        "hostname": platform.node(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "qemu_img": _version("qemu-img"),
        "qemu_nbd": _version("qemu-nbd"),
        "uid": os.geteuid(),
        "time": time.time(),
    }


def _version(program: str) -> Optional[str]:
    if shutil.which(program) is None:
        return None
    found = re.search(r"\d+(\.\d+)+", run([program, "--version"]))
    return found.group(0) if found else "unknown"


def disk(path: str, image_format: str, live: bool = False) -> Dict[str, Any]:
    """What is known of an image file. `error` is there instead when it cannot be known.

    `data`: how much of it is not known to be zero; a guess with `live`, when a VM may be writing it. `stored`: what a
    fresh copy takes where that is less, for clusters that stay compressed; else 0.
    """
    try:
        about = os.stat(path)
        answer: Dict[str, Any] = {
            "path": path,
            "real": os.path.realpath(path),
            "regular": stat.S_ISREG(about.st_mode),
            "mode": stat.S_IMODE(about.st_mode) & 0o777,
            "user": _name(pwd.getpwuid, about.st_uid),
            "group": _name(grp.getgrgid, about.st_gid),
            "allocated": about.st_blocks * 512,
            "fingerprint": fingerprint(path),
            "virtual_size": disk_size(about.st_size),
        }
        if answer["regular"] and image_format == image.QCOW2:
            answer["image"] = qemu.info(path, image_format, live=live)
            answer["virtual_size"] = answer["image"]["virtual-size"]
        known = answer["regular"] and _alone(answer.get("image", {}))
        answer["data"], answer["stored"] = (
            _content(path, image_format, answer["virtual_size"], live) if known else (0, 0)
        )
    except (OSError, AgentError) as error:
        return {"path": path, "error": getattr(error, "strerror", None) or str(error)}
    return answer


def _alone(image_info: Dict[str, Any]) -> bool:
    """Whether the image can be mapped by itself; the plan refuses others by name, so that nobody needs their map."""
    specific = image_info.get("format-specific", {}).get("data", {})
    return not (image_info.get("backing-filename") or image_info.get("encrypted") or specific.get("data-file"))


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
    # How large a compressed cluster is nobody says; all of them are in the file, with the others.
    stored = data_in(path, image.RAW) if kept else data
    return data, stored if stored < data else 0


def _guessed(path: str, image_format: str, size: int) -> int:
    """The image's content while a VM writes it: by its tables as they are just now, else by what the file holds."""
    if image_format == image.QCOW2:
        try:
            found = qemu.map_extents(path, image_format, 0, size, shared=True)
            return sum(extent.length for extent in found if extent.kind == DATA)
        except AgentError:  # torn in the midst of a change
            pass
    return data_in(path, image.RAW)


def data_held(path: str, image_format: str) -> int:
    """How many bytes of content the staged image has of its own; 0 where it cannot be told, as while it is written."""
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
        found = joined((one.offset, one.end) for one in opened.extents() if (one.kind == DATA) is data)
    finally:
        opened.close()
    return [list(pair) for pair in thinned(found, BLOCK)]


def free(path: str) -> int:
    """Bytes that the path's filesystem has room for."""
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize


def dirty(uri: str, bitmap: str) -> List[List[int]]:
    """The [start, end) pairs in bytes that a dirty bitmap of an NBD export names. Raises AgentError (missing)."""
    export = nbd.connect(uri, nbd.DIRTY_BITMAP + bitmap)
    try:
        return [list(pair) for pair in thinned(list(export.dirty()), BLOCK)]
    finally:
        export.close()


def _name(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def fingerprint(path: str) -> str:
    """Changes whenever the file may have changed: device, inode, size in bytes, mtime and ctime in nanoseconds.

    The inode is 0 where its number does not last: see filesystem.lasting_inode.
    """
    about = os.stat(path)
    inode = filesystem.lasting_inode(about)
    return f"{about.st_dev}:{inode}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"


def backing_files(paths: List[str]) -> List[str]:
    """Every file that these images rest on, themselves included. What cannot be read rests on nothing we know."""
    found = set()
    for path in paths:
        found.add(os.path.realpath(path))
        try:
            argv = ["qemu-img", "info", "--force-share", "--backing-chain", "--output=json", "--", path]
            found.update(os.path.realpath(one["filename"]) for one in json.loads(run(argv)))
        except AgentError:
            continue
    return sorted(found)


_NAME_MAX = 255
"""Bytes of a file's name, on every filesystem that images live on but a few that allow fewer."""

_NO_DIRECTORY = {
    "exists": False,
    "writable": False,
    "free": 0,
    "names": (),
    "more": False,
    "inodes": 0,
    "filesystem": 0,
    "reflink": False,
    "longest": _NAME_MAX,
    "abilities": {},
}


MOST_NAMES = 4096
"""So many of a directory's names are told; a directory may hold millions."""


def directory(path: str, stems: Sequence[str] = (), tried: bool = True) -> Dict[str, Any]:
    """Whether the directory is there and can be written, its free bytes, and whether files share.

    `names`: those in it that begin with one of the stems, in whatever case, MOST_NAMES at most; `more`: there are more.
    `abilities`: see filesystem.abilities; nothing is tried where this user cannot write, nor without `tried`, since a
    few filesystems can be tried only with files that have names.
    """
    if not os.path.isdir(path):
        return {**_NO_DIRECTORY, "path": path}
    space = os.statvfs(path)
    names, more = _names(path, stems) if stems else ([], False)
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
        "names": names,
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
