"""The lock on the operations on one VM, and what ends with it.

Whatever changes the destination passes through the process that holds the lock: files are removed by it, and libvirt is
reached through it (relay.py).
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, Callable, Dict, List, Protocol, TypeVar, cast

from kvm_clone.agent import names
from kvm_clone.agent.protocol.errors import LOCKED, AgentError
from kvm_clone.agent.staging.files import make_durable
from kvm_clone.agent.staging.lock import OperationLock

_Step = TypeVar("_Step", bound=Callable[..., Any])


class Fence(Protocol):
    """Something that reaches beyond this process and may be used only while the lock is held."""

    def close(self) -> None:
        """Let nothing more through, and return when what is under way has ended."""


def one_at_a_time(step: _Step) -> _Step:
    """Calls run side by side, and the end of the operation must not overtake a step that is under way."""

    @functools.wraps(step)
    def waiting(self: Hold, *arguments: Any, **options: Any) -> Any:
        with self._turn:
            return step(self, *arguments, **options)

    return cast(_Step, waiting)


class Hold:
    """The lock on the operations on one VM, and what its holder alone may do."""

    def __init__(self, name: str, about: Dict[str, Any]) -> None:
        """Raises AgentError (locked) when another process holds it."""
        self.name = name
        self._lock = OperationLock(names.lock_path(name), {"pid": os.getpid(), **about})
        self._fences: List[Fence] = []
        self._turn = threading.RLock()
        self._over = False

    @property
    def is_over(self) -> bool:
        """Whether this process has nothing more to do with the operation."""
        return self._over

    @property
    def is_held(self) -> bool:
        """Whether the lock is still ours: its file may have been removed, and another one locked in its place."""
        return not self._over and self._lock.is_held

    def check(self) -> None:
        """Raises AgentError (locked) when somebody else may be at work here."""
        if not self.is_held:
            raise AgentError(LOCKED, f"the lock on operations on {self.name} is not ours any more")

    def add_fence(self, fence: Fence) -> None:
        """Take care that it is closed before the lock is released."""
        self.check()
        self._fences.append(fence)

    @one_at_a_time
    def remove(self, files: List[Dict[str, str]]) -> List[Dict[str, str]]:
        """Remove files; for each its `path` and what came of it: `removed`, `missing`, or the `error`.

        `files`: `path`, and as `identity` device and inode of the file that was looked at: another one stays.
        """
        self.check()
        return [{"path": one["path"], **_removed(one["path"], one["identity"])} for one in files]

    def renew(self) -> None:
        """Say that this process lives, for those who do not see its lock."""

    def abandon(self) -> None:
        """The controller is gone."""
        self.release()

    def close_fences(self) -> None:
        """Let nothing more through to libvirt, and wait until what is under way has ended."""
        fences, self._fences = self._fences, []
        for fence in fences:
            fence.close()

    @one_at_a_time
    def release(self) -> None:
        """Release the lock."""
        self.close_fences()
        self._over = True
        self._lock.release()


def _removed(path: str, identity: str) -> Dict[str, str]:
    try:
        about = os.lstat(path)
        if f"{about.st_dev}:{about.st_ino}" != identity:
            return {"result": "error", "error": "it is another file by now"}
        os.unlink(path)
        make_durable(os.path.dirname(path))
    except FileNotFoundError:
        return {"result": "missing"}
    except OSError as error:
        return {"result": "error", "error": str(error.strerror)}
    return {"result": "removed"}
