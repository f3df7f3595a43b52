"""Files of ours beside others' files: removed durably, and never anything that is no file of ours."""

from __future__ import annotations

import os
import stat

from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError


def make_durable(directory: str) -> None:
    """Make the directory's entries durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_file(path: str) -> None:
    """Remove a file of ours, durably, if it is there. Raises OSError; AgentError (unsupported) for what is no file."""
    try:
        check_regular(path, os.lstat(path))
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    make_durable(os.path.dirname(path))


def check_regular(path: str, about: os.stat_result) -> None:
    """Raises AgentError (unsupported) for anything but a regular file, which we make alone."""
    if not stat.S_ISREG(about.st_mode):
        raise AgentError(UNSUPPORTED, f"{path} is no regular file, and none of ours; it was left as it is")
