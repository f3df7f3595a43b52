"""What the host has of the things that a definition refers to, without changing anything."""

from __future__ import annotations

import glob
import os
import re
import socket
import stat
import threading
from typing import Any, Dict, List, Optional

MISSING, UNKNOWN = "missing", "unknown"
"""UNKNOWN: a filesystem that does not answer, a directory that may not be searched."""

STALL_SECONDS = 3.0
"""How long one path may take: a network filesystem whose server is gone answers never."""

_STALLS = 3
"""So many stalled paths are given up one by one; then the rest is unknown."""

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}

_HUGE_PAGES = "/sys/kernel/mm/hugepages"
_USB = "/sys/bus/usb/devices"
_USB_LIMIT = 1000


def look(paths: List[str]) -> Dict[str, str]:
    """Return what each path is: file, directory, socket, fifo, char, block, missing or unknown. Links are followed."""
    found: Dict[str, str] = {}
    left = list(dict.fromkeys(paths))
    for _ in range(_STALLS):
        _look_at(left, found)
        left = [path for path in left if path not in found]
        if not left:
            return found
        found[left.pop(0)] = UNKNOWN  # the one that does not answer
    found.update(dict.fromkeys(left, UNKNOWN))
    return found


def _look_at(paths: List[str], found: Dict[str, str]) -> None:
    """Fill `found` in order until everything is known, or a path takes too long: its thread is then left behind."""
    answered = threading.Semaphore(0)
    answers: List[str] = []

    def ask() -> None:
        for path in paths:
            answers.append(kind(path))
            answered.release()

    threading.Thread(target=ask, daemon=True).start()
    for number, path in enumerate(paths):
        if not answered.acquire(timeout=STALL_SECONDS):
            return
        found[path] = answers[number]


def kind(path: str) -> str:
    """Return what one path is. It may take for ever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except (OSError, ValueError):
        return UNKNOWN
    return _KINDS.get(stat.S_IFMT(mode), UNKNOWN)


def resources(addresses: List[str]) -> Dict[str, Any]:
    """Return the host's huge pages, NUMA nodes, CPUs, USB devices, and which of the IP addresses are its own.

    `hugepages`: [total, free] by the size in KiB. `nodes`, `cpus`: ranges such as 0-3,5; None where nothing says.
    """
    return {
        "hugepages": _huge_pages(),
        "default_hugepage": _default_huge_page(),
        "hugetlbfs": any(line.split()[2:3] == ["hugetlbfs"] for line in (_read("/proc/mounts") or "").splitlines()),
        "nodes": _read("/sys/devices/system/node/online"),
        "cpus": _read("/sys/devices/system/cpu/online"),
        "usb": _usb(),
        "addresses": {address: _is_own(address) for address in addresses},
    }


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _huge_pages() -> Dict[str, List[int]]:
    found = {}
    for directory in glob.glob(f"{_HUGE_PAGES}/hugepages-*kB"):
        counts = [_read(f"{directory}/{name}_hugepages") or "0" for name in ("nr", "free")]
        found[re.sub(r"\D", "", os.path.basename(directory))] = [int(count) for count in counts]
    return found


def _default_huge_page() -> int:
    said = re.search(r"Hugepagesize:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return int(said.group(1)) if said else 0


def _usb() -> List[str]:
    """Return each USB device as VENDOR:PRODUCT and as BUS/DEVICE."""
    found = []
    for directory in sorted(glob.glob(f"{_USB}/*"))[:_USB_LIMIT]:
        said = [_read(f"{directory}/{name}") for name in ("idVendor", "idProduct", "busnum", "devnum")]
        if None not in said:
            found += [f"{said[0]}:{said[1]}", f"{said[2]}/{said[3]}"]
    return found


def _is_own(address: str) -> Optional[bool]:
    """Return whether the host can listen on the address; None for a name, which is not resolved: that may take long."""
    try:
        family, kind_, protocol, _, where = socket.getaddrinfo(
            address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
    except (OSError, UnicodeError):
        return None
    try:
        with socket.socket(family, kind_, protocol) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True
