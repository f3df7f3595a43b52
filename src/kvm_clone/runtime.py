"""A private directory of this process for sockets, and the removal of those that dead processes left."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "kvm-clone-"


def make_directory() -> Path:
    """A new directory that only we can enter. Its path is short: a socket's name has 107 bytes at most."""
    root = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    if not root.is_dir() or len(str(root)) > 40:
        root = Path("/tmp")  # noqa: S108 - mkdtemp makes the directory ours alone
    _remove_stale(root)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def _remove_stale(root: Path) -> None:
    for path in root.glob(f"{_PREFIX}[0-9]*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and _is_our_directory(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_our_directory(path: Path) -> bool:
    try:
        about = path.lstat()
    except FileNotFoundError:  # another process is removing it too
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()
