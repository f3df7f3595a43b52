"""What bringing a replica up to date costs: kvm-clone sync beside rsync's delta, and a running VM's at two sizes.

In every round the same pieces of 64 KiB, 1 % of the content, are changed in the source; both replicas are then brought
up to date, one after the other, and compared with the source. The wire is what kc-b's network card got and sent.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arena import COPY, DESTINATION, LIMIT_SECONDS, SOURCE, VM, Arena
from methods import clone_command, clone_environment
from processes import BenchError, Done, run

MIB = 1 << 20
PIECE = 64 << 10
CHANGED = 0.01

RSYNC = "rsync -I --no-whole-file --inplace"

RUNNING = "bench-run"
SIZES = ("qcow2:256M:64M", "qcow2:2560M:640M")
"""A running VM's data disks: the second has ten times of everything."""

_WRITING_SECONDS = 3.0
_BOOT_SECONDS = 60.0
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Synced:
    """One run: its time, the content it sent and the bytes that crossed the network."""

    seconds: float
    sent: int
    wire: int


def measure(arena: Arena, rounds: int, data: int) -> str:
    """Deltas of a stopped VM beside rsync's; the table."""
    arena.clear()
    _ours(arena, "clone")
    arena.run(SOURCE, "rsync", "-aS", "--inplace", arena.image, f"{DESTINATION}:{COPY}")
    ways: dict[str, Callable[[], Synced]] = {
        "kvm-clone sync": lambda: _ours(arena, "sync"),
        RSYNC: lambda: _rsync(arena),
        "kvm-clone sync, nothing changed": lambda: _ours(arena, "sync"),
    }
    found: dict[str, list[Synced]] = {title: [] for title in ways}
    changed = 0
    for number in range(1, rounds + 1):
        changed = _change(arena, number, data)
        for title, work in ways.items():
            found[title].append(work())
            print(f"round {number}: {title} {found[title][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    lines = [
        "",
        f"{_heading(changed, data):<50} {'seconds':>8} {'MiB sent':>9} {'wire':>6} {'/ rsync':>8}",
    ]
    by_rsync = statistics.median(one.seconds for one in found[RSYNC])
    for title, runs in found.items():
        middle = [statistics.median(getattr(one, name) for one in runs) for name in ("seconds", "sent", "wire")]
        wire = f"{middle[2] / changed:.2f}" if middle[1] else ""
        lines.append(f"{title:<50} {middle[0]:>8.2f} {middle[1] / MIB:>9.1f} {wire:>6} {middle[0] / by_rsync:>8.2f}")
    lines.append("wire: bytes that kc-b's network card got and sent, divided by the bytes that were changed.")
    lines.append("/ rsync: seconds divided by rsync's; below 1 is faster than it is.")
    return "\n".join(lines)


def measure_running(arena: Arena, rounds: int) -> str:
    """A running VM's incremental sync at two sizes of its disks; the table."""
    lines = ["", f"{'running VM, sync --track, by bitmap':<50} {'seconds':>8} {'MiB sent':>9} {'pause':>6}"]
    medians = []
    for spec in SIZES:
        arena.clear()
        serial = arena.make_running(RUNNING, spec)
        _wait_for_boot(serial)
        _ours(arena, "clone", "--track", vm=RUNNING)
        runs = []
        pause = 0.0
        for number in range(1, rounds + 1):
            time.sleep(_WRITING_SECONDS)
            with _watched(serial) as pauses:
                runs.append(_ours(arena, "sync", "--track", vm=RUNNING, method="bitmap"))
            pause = max(pause, *pauses)
            print(f"round {number}: {spec} {runs[-1].seconds:.2f} s", file=sys.stderr, flush=True)
        medians.append(statistics.median(one.seconds for one in runs))
        sent = statistics.median(one.sent for one in runs) / MIB
        arena.remove_running(RUNNING)
        lines.append(f"{spec:<50} {medians[-1]:>8.2f} {sent:>9.1f} {pause:>6.2f}")
    lines.append(
        "pause: the longest time in seconds, of all rounds, in which the guest, which counts every 0.1 s, did not."
    )
    lines.append(f"ten times the disk takes {medians[1] / medians[0]:.2f} times the time")
    return "\n".join(lines)


def _heading(changed: int, data: int) -> str:
    return f"{changed / MIB:.1f} MiB of {data / MIB:.0f} MiB changed"


def _change(arena: Arena, seed: int, data: int) -> int:
    """Change pieces of the source's image that hold data, by chance; how many bytes."""
    image = str(arena.outside(SOURCE, arena.image))
    mapped = json.loads(run(["qemu-img", "map", "--output=json", "-f", "qcow2", image], {}, LIMIT_SECONDS).output)
    pieces = [
        at
        for extent in mapped
        if extent["data"]
        for at in range(-(-extent["start"] // PIECE) * PIECE, extent["start"] + extent["length"] - PIECE + 1, PIECE)
    ]
    chance = random.Random(seed)
    chosen = sorted(chance.sample(pieces, min(len(pieces), int(data * CHANGED) // PIECE)))
    pattern = seed % 255 + 1
    commands = [word for at in chosen for word in ("-c", f"write -P {pattern} {at} {PIECE}")]
    run(["qemu-io", "-f", "qcow2", *commands, image], {}, LIMIT_SECONDS)
    return len(chosen) * PIECE


def _ours(arena: Arena, command: str, *flags: str, vm: str = VM, method: str = "") -> Synced:
    name = "--new-name" if command == "clone" else "--target-name"
    argv = _as(clone_command(arena, "--route", "direct", *flags), {"clone": command, VM: vm, "--new-name": name})
    before = _traffic(arena)
    done = run(argv, clone_environment(arena), LIMIT_SECONDS)
    wire = _traffic(arena) - before
    result = json.loads(done.output)
    methods = {disk["method"] for disk in result["disks"]}
    if method and methods != {method}:
        raise BenchError(f"not by {method} but by {', '.join(sorted(methods))}: {result['hint']}")
    if vm == VM:
        for disk in result["disks"]:
            arena.check(disk["destination"])
    return Synced(done.seconds, result["bytes_sent"], wire)


def _as(argv: Sequence[str], changes: dict[str, str]) -> list[str]:
    return [changes.get(word, word) for word in argv]


def _rsync(arena: Arena) -> Synced:
    before = _traffic(arena)
    command = ("rsync", "-aI", "--no-whole-file", "--inplace", "--stats", arena.image, f"{DESTINATION}:{COPY}")
    done: Done = arena.run(SOURCE, *command)
    wire = _traffic(arena) - before
    arena.check(COPY)
    literal = next(line for line in done.output.splitlines() if line.startswith("Literal data:"))
    return Synced(done.seconds, int(literal.split()[2].replace(",", "")), wire)


def _traffic(arena: Arena) -> int:
    """Bytes that kc-b's network card has got and sent so far."""
    links = json.loads(arena.run(DESTINATION, "ip", "-json", "-statistics", "link", "show").output)
    own = [link["stats64"] for link in links if link["ifname"] != "lo"]
    return sum(one["rx"]["bytes"] + one["tx"]["bytes"] for one in own)


@contextmanager
def _watched(serial: Path) -> Iterator[list[float]]:
    """The seconds between what the guest prints, complete when the context has ended."""
    pauses = [0.0]
    over = threading.Event()

    def watch() -> None:
        size, seen = serial.stat().st_size, time.monotonic()
        while not over.wait(_POLL_SECONDS):
            now = time.monotonic()
            pauses[-1] = max(pauses[-1], now - seen)
            if serial.stat().st_size != size:
                size, seen = serial.stat().st_size, now
                pauses.append(0.0)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield pauses
    finally:
        over.set()
        watching.join()


def _wait_for_boot(serial: Path) -> None:
    """Wait until the guest says that it is up. Raises BenchError."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while "TICK" not in (serial.read_text(errors="replace") if serial.exists() else ""):
        if time.monotonic() > deadline:
            raise BenchError("the guest did not come up")
        time.sleep(0.1)
