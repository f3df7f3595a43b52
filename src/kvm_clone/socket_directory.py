"""A private directory of this process for sockets, and the removal of those that dead processes left."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvm_clone.errors import UsageError

_PREFIX = "kvm-clone-"
_USUAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - mkdtemp makes the directory ours alone
_PLAIN = re.compile("/[A-Za-z0-9/._+-]*")
_LONGEST = 40


def make_directory() -> Path:
    """A new directory that only we can enter. Raises UsageError where none can be made.

    Its path is short, as a socket's name has 107 bytes at most, and means nothing to ssh, to a shell or in a URI.
    """
    refusals = []
    for root in _roots():
        _remove_stale(root)
        try:
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
        except OSError as error:
            refusals.append(f"{root}: {error.strerror}")
    raise UsageError(
        f"no directory for sockets can be made ({'; '.join(refusals)})",
        remedy="let XDG_RUNTIME_DIR name a directory that can be written to, with a short path without odd characters",
    )


def _roots() -> Iterator[Path]:
    for text in (os.environ.get("XDG_RUNTIME_DIR", ""), os.environ.get("TMPDIR", ""), *_USUAL):
        if len(text) <= _LONGEST and _PLAIN.fullmatch(text):
            yield Path(text)


def _remove_stale(root: Path) -> None:
    try:
        found = list(root.glob(f"{_PREFIX}[0-9]*-*"))
    except OSError:  # what is wrong with it is reported where a directory is made in it
        return
    for path in found:
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and _is_our_directory(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_our_directory(path: Path) -> bool:
    try:
        about = path.lstat()
    except FileNotFoundError:  # another process is removing it too
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()
