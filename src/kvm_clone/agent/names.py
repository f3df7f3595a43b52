"""The names that we give to files on a host, and the directory that our locks lie in."""

from __future__ import annotations

import hashlib
import os
import re
import stat

from kvm_clone.agent.protocol.errors import PERMISSION, AgentError

PREFIX = ".kvm-clone-"
"""Begins the name of every file that we stage."""

OPERATION = re.compile(r"[0-9a-zA-Z][0-9a-zA-Z-]{0,63}")
DISK = re.compile(r"[0-9a-zA-Z_][0-9a-zA-Z_.-]{0,63}")
"""What an operation, and a disk's target, look like: both become parts of file names."""

JOURNAL, _PART, _MARK = ".journal", ".part", ".mark"


def key_of(name: str) -> str:
    """A VM's name as a part of file names: names hold spaces, quotes and anything but a slash."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def journal_path(directory: str, name: str) -> str:
    """Where the journal of an operation on the VM `name` lies when its first disk lands in `directory`."""
    return os.path.join(directory, f"{PREFIX}{key_of(name)}{JOURNAL}")


def is_journal(name: str) -> bool:
    """Whether a file of this name is a journal of ours."""
    return name.startswith(PREFIX) and name.endswith(JOURNAL)


def part_path(operation: str, disk: str, final: str) -> str:
    """The temporary name of a disk, in the directory where it will live."""
    return os.path.join(os.path.dirname(final), f"{PREFIX}{operation}-{disk}{_PART}")


def mark_path(operation: str, directory: str) -> str:
    """The name of the empty file by which another host sees that it shares this directory with us."""
    return os.path.join(directory, f"{PREFIX}{operation}{_MARK}")


def overlay_path(operation: str, disk: str, base: str) -> str:
    """The final name of an overlay that a sync merges into the image `base` after its commit."""
    return os.path.join(os.path.dirname(base), f"{PREFIX[1:]}{operation}-{disk}.qcow2")


def is_plain(path: str) -> bool:
    """Whether this is an absolute path without detours."""
    return path.startswith("/") and ".." not in path.split("/") and "\0" not in path


def lock_directory() -> str:
    """Where locks lie on this host, made if need be: a directory that nobody else can put anything into.

    Raises AgentError (permission) when what is there is not ours.
    """
    path = _lock_directory()
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise AgentError(PERMISSION, f"cannot make {path} for our locks: {error.strerror}") from error
    if not _is_ours_alone(path):
        raise AgentError(PERMISSION, f"{path} {_NOT_OURS}: remove it")
    return path


_NOT_OURS = "is not ours alone, so that locks in it mean nothing"


def _is_ours_alone(path: str) -> bool:
    about = os.lstat(path)
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def lock_trouble() -> str:
    """Why there can be no locks on this host, nothing where there can be. Makes nothing."""
    path = _lock_directory()
    if not os.path.lexists(path):
        parent = os.path.dirname(path)
        return "" if os.access(parent, os.W_OK | os.X_OK) else f"{path} cannot be made"
    if not _is_ours_alone(path):
        return f"{path} {_NOT_OURS}"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"no file can be made in {path}"


def _lock_directory() -> str:
    user = os.geteuid()
    own = (f"/run/user/{user}", os.environ.get("XDG_RUNTIME_DIR", ""))
    parents = ("/run", "/var/run") if user == 0 else own
    for parent in parents:
        if parent and os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK):
            return os.path.join(parent, "kvm-clone")
    return f"/tmp/kvm-clone-{user}"  # noqa: S108 - whose it is is looked at


def lock_path(name: str) -> str:
    """Where the lock on operations on the VM `name` lies. Raises AgentError as `lock_directory` does."""
    return os.path.join(lock_directory(), f"{key_of(name)}.lock")


def source_lock_path(domain: str) -> str:
    """Where the lock on backup jobs of the running domain (by its UUID) lies. Raises AgentError likewise."""
    return os.path.join(lock_directory(), f"source-{key_of(domain)}.lock")
