"""Peak memory of kvm-clone's processes: the controller's family, and the agents' families on the lab's hosts.

An agent does not show on its command line what it is for; but the control agent of a host is always its first one,
and the sender or receiver comes later.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arena import DESTINATION, SOURCE
from processes import children

LIMIT = 64 << 20
"""Bytes that no process of ours should need."""

_INTERVAL_SECONDS = 0.05
_AGENT = ["-I", "-c"]
_LOADER = "exec("


@dataclass(frozen=True)
class Process:
    """One process as seen at one moment; `peak` in bytes."""

    pid: int
    started: int
    words: tuple[str, ...]
    peak: int

    @property
    def program(self) -> str:
        """Its name, without the directory."""
        return Path(self.words[0]).name

    @property
    def is_agent(self) -> bool:
        """Whether it runs our loader."""
        return list(self.words[1:3]) == _AGENT and len(self.words) > 3 and self.words[3].startswith(_LOADER)


class Watch:
    """Looks at all processes again and again. `hosts`: the first process of each host, by its name."""

    def __init__(self, hosts: Mapping[str, int]) -> None:
        self._hosts = hosts
        self._seen: dict[str, dict[tuple[int, int], Process]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def peaks(self) -> dict[str, int]:
        """The highest peak of each role, in bytes."""
        found: dict[str, int] = {}
        for place, processes in self._seen.items():
            agents = sorted(process.started for process in processes.values() if process.is_agent)
            for process in processes.values():
                number = agents.index(process.started) if process.is_agent else -1
                role = _role(process, place, number)
                found[role] = max(found.get(role, 0), process.peak)
        return found

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL_SECONDS):
            family = children()
            self._look(family, os.getpid(), "", ours=True)
            for name, first in self._hosts.items():
                self._look(family, first, name, ours=False)

    def _look(self, family: Mapping[int, list[int]], parent: int, place: str, *, ours: bool) -> None:
        """Note the processes below `parent` that are ours; what an agent or the controller has started is."""
        words = _words(parent)
        for pid in family.get(parent, []):
            process = _process(pid)
            # A child that still shows its parent's command line is about to become another program.
            if process is None or process.words == words:
                continue
            counts = ours or process.is_agent
            if counts:
                self._seen.setdefault(place, {})[pid, process.started] = process
            self._look(family, pid, place, ours=counts)


def _role(process: Process, place: str, number: int) -> str:
    if not process.is_agent:
        program = "controller" if process.program.startswith(("python", "kvm-clone")) else process.program
        return f"{program} on {place}" if place else program
    stream = {SOURCE: "sender", DESTINATION: "receiver"}[place]
    kind = {0: "control agent", 1: stream}.get(number, f"agent {number + 1}")
    return f"{kind} on {place}"


def _words(pid: int) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1])
    return ()


def _process(pid: int) -> Process | None:
    """The process, or None when it is gone or none with a command line and memory of its own."""
    words = _words(pid)
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return Process(pid, started, words, int(peak) << 10) if words and peak else None
