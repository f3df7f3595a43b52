"""The files of a source's backup jobs: QEMU's scratch, and the socket that the job is read from."""

from __future__ import annotations

import os
import stat
from typing import List

from kvm_clone.agent.names import PREFIX
from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError, from_exception

SUFFIX = ".scratch"
SOCKETS = "/var/lib/libvirt/qemu"
"""Where QEMU may make the socket of a backup job: libvirt gives this directory to QEMU's user."""

_SOCKET_PREFIX, _SOCKET_SUFFIX = "kvm-clone-", ".sock"


def remove(paths: List[str]) -> None:
    """Remove what a backup job of ours has left, if it is there. Raises AgentError for what has no name of ours."""
    for path in paths:
        if not is_ours(path):
            raise AgentError(UNSUPPORTED, f"{path} has no name of ours; it was left as it is")
        try:
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
                raise AgentError(UNSUPPORTED, f"{path} is neither a file nor a socket; it was left as it is")
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise from_exception(error, f"removing {path}") from error


def is_ours(path: str) -> bool:
    """Whether a backup job's file of ours may have this path."""
    directory, name = os.path.split(path)
    scratch = name.startswith(PREFIX) and name.endswith(SUFFIX)
    socket = directory == SOCKETS and name.startswith(_SOCKET_PREFIX) and name.endswith(_SOCKET_SUFFIX)
    return path.startswith("/") and (scratch or socket)
