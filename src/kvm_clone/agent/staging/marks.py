"""Files by which a host that sees a directory of ours knows that it is the same directory."""

from __future__ import annotations

import os
from typing import List

from kvm_clone.agent import names
from kvm_clone.agent.protocol.errors import from_exception
from kvm_clone.agent.staging.files import unlink_file
from kvm_clone.agent.staging.records import Record


def make(operation: str, directory: str) -> None:
    """Make the mark, a file that holds the directory's path. Raises AgentError."""
    path = names.mark_path(operation, directory)
    try:
        unlink_file(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, os.fsencode(directory))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_exception(error, f"marking {directory}") from error


def remove(operation: str, directories: List[str]) -> None:
    """Remove the operation's marks in these directories. Raises OSError, AgentError."""
    for directory in directories:
        unlink_file(names.mark_path(operation, directory))


def remove_all(begin: Record) -> None:
    """Remove the marks that a journal's `begin` names. Raises OSError, AgentError."""
    remove(begin["operation"], begin.get("marks", []))
