"""Child processes that cannot outlive the agent, and that end; and the other processes of the host."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

from kvm_clone.agent.protocol.errors import IO, MISSING, NO_SPACE, AgentError

SECONDS = 60.0
"""How long a child may take that only reads metadata: a server that a path leads to may never answer."""

_LOOK_SECONDS, _GRACE_SECONDS = 0.2, 1.0
"""How often killed_by looks, and how long a child may take to end by itself: an image that is closed is in order."""

_NULL = subprocess.DEVNULL

_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
"""PR_SET_PDEATHSIG with SIGKILL, prctl(2); it is kept across execve(2)."""

_mine = threading.local()


def start(argv: Sequence[str], *, before: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
    """Start a child that is killed when the thread that starts it ends.

    `before`: what runs the command, of programs that every host has. `options`: subprocess.Popen's. Raises OSError,
    and AgentError when the program is not there.
    """
    if shutil.which(argv[0]) is None:
        raise AgentError(MISSING, f"the program {argv[0]} is not installed on this host")
    # Not by preexec_fn: between fork and exec a process with threads may hold a lock that nobody releases.
    child = subprocess.Popen([*_watcher(), *before, *argv], **options)
    getattr(_mine, "children", []).append(child)
    return child


@functools.lru_cache(maxsize=None)
def _watcher() -> Tuple[str, ...]:
    """What runs a command so that it is killed when its parent ends: setpriv, or Python where that cannot."""
    setpriv = (shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL")  # the option: util-linux 2.33
    try:
        if subprocess.call([*setpriv, "true"], stdin=_NULL, stdout=_NULL, stderr=_NULL, timeout=SECONDS) == 0:
            return setpriv
    except (OSError, subprocess.TimeoutExpired):
        pass
    return (sys.executable or "python3", "-I", "-S", "-c", _LAUNCHER)


@contextmanager
def killed_by(ending: threading.Event) -> Iterator[None]:
    """What this thread starts in the block is killed once `ending` is set, unless it ends soon by itself."""
    children: List[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if ending.is_set() and not over.wait(_GRACE_SECONDS):
                for child in children:
                    child.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _mine.children = children
    try:
        yield
    finally:
        del _mine.children
        over.set()
        watcher.join()


def other_processes() -> List[int]:
    """The processes of this host but this one and those that descend from it."""
    parents: Dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return [pid for pid in parents if not _descends(pid, parents)]


def _descends(pid: int, parents: Dict[int, int]) -> bool:
    seen: Set[int] = set()
    while pid and pid not in seen:
        if pid == os.getpid():
            return True
        seen.add(pid)
        pid = parents.get(pid, 0)
    return False


def run(argv: Sequence[str], seconds: float = SECONDS) -> str:
    """What the program prints. Raises AgentError with its own last words when it fails or takes too long."""
    child = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = finished(child, argv[0], seconds)
    if child.returncode:
        said = last_words(argv[0], child.returncode, err)
        raise AgentError(NO_SPACE if os.strerror(errno.ENOSPC) in said else IO, said)
    return os.fsdecode(out)


def finished(child: subprocess.Popen[bytes], program: str, seconds: float) -> "tuple[bytes, bytes]":
    """What the child printed on stdout and stderr. Raises AgentError when it has to be killed after `seconds`."""
    try:
        return child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        end(child)
        raise AgentError(IO, f"{os.path.basename(program)} did not end within {seconds:.0f} s") from error


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child. What it has started itself may live on and hold its pipes: nobody waits for that."""
    child.kill()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    child.wait()


def last_words(program: str, status: int, stderr: bytes) -> str:
    """One line that says how a program failed."""
    lines: List[str] = stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else f"ended with status {status}"
    return f"{os.path.basename(program)}: {said.removeprefix(os.path.basename(program) + ': ')}"
