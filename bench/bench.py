"""Compare kvm-clone with the other ways to bring a disk from one host to another.

Needs root, and room on /dev/shm for about twice the data, and for three times what is synced. All methods copy the same
qcow2 disk from kc-a to kc-b, one after the other in every round. Each copy is compared with the source: a wrong one
ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import again
import delta
from arena import STATE, Arena, arena, size_in_bytes
from methods import METHODS, Copied, Method
from peaks import Watch
from processes import ENDING_SIGNALS, BenchError, ignore_ending_signals
from report import Report

_SLACK = 256 << 20
"""Bytes on tmpfs for the lab's own files and the images' metadata."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    names = ",".join(method.name for method in METHODS)
    parser = argparse.ArgumentParser("bench/bench.py", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--size", default="4G", help="of the disk as the guest sees it; default 4G")
    parser.add_argument("--data", default="1.5G", help="content of the disk; default 1.5G")
    parser.add_argument("--methods", default=names, metavar="A,B", help=f"default {names}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--no-again", dest="again", action="store_false", help="leave out the second runs")
    parser.add_argument("--no-delta", dest="delta", action="store_false", help="leave out what sync costs")
    parser.add_argument("--delta-data", metavar="A,B", help=f"of the disks that are synced; default {_delta_default()}")
    parser.add_argument("--keep-lab", action="store_true", help="leave the lab up, with its VM")
    asked = parser.parse_args(argv)
    known = {method.name: method for method in METHODS}
    chosen = asked.methods.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no method {', '.join(unknown)}: there are {names}")
    if asked.rounds < 1:
        parser.error("--rounds must be 1 or more")
    asked.methods = list(dict.fromkeys(known[name] for name in chosen))
    try:
        asked.size_bytes, asked.data_bytes = size_in_bytes(asked.size), size_in_bytes(asked.data)
        asked.delta_bytes = _delta_sizes(asked.delta_data or _delta_default()) if asked.delta else []
    except BenchError as error:
        parser.error(str(error))
    return asked


def _delta_default() -> str:
    """The larger of two sizes if there is room for the source and two replicas: what is fixed counts for less in it."""
    large, small = "3.5G", "1.5G"
    return large if shutil.disk_usage(STATE.parent).free >= 3 * size_in_bytes(large) + _SLACK else small


def _delta_sizes(text: str) -> list[int]:
    return [size_in_bytes(one) for one in text.split(",")]


def measure(asked: argparse.Namespace) -> tuple[Report, str]:
    """Run everything: the comparison, and the table of second runs. Raises BenchError."""
    runs: dict[Method, list[Copied]] = {method: [] for method in asked.methods}
    needed = max(2 * asked.data_bytes, 3 * max(asked.delta_bytes, default=0)) + _SLACK
    with arena(asked.size, asked.data, needed, keep=asked.keep_lab) as place:
        for number in range(1, asked.rounds + 1):
            for method in asked.methods:
                copied = _checked_copy(place, method)
                runs[method].append(copied)
                print(f"round {number}: {method.name} {copied.seconds:.2f} s", file=sys.stderr, flush=True)
        peaks = {method: _peaks(place, method) for method in asked.methods if method.ours}
        second = again.measure(place, asked.rounds) if asked.again else ""
        for data in asked.delta_bytes:
            second += "\n" + delta.measure(place.resized(data * 2, data), asked.rounds, data)
        if asked.delta:
            second += "\n" + delta.measure_running(place, asked.rounds)
        place.clear()
    return Report(asked.size_bytes, asked.data_bytes, runs, peaks), second


def _checked_copy(place: Arena, method: Method) -> Copied:
    place.clear()
    copied = method.copy(place)
    place.check(copied.path)
    return copied


def _peaks(place: Arena, method: Method) -> dict[str, int]:
    """One more run, which nobody times: looking at processes costs time itself."""
    place.clear()
    watch = Watch(place.first_processes())
    with watch.watching():
        copied = method.copy(place)
    place.check(copied.path)
    return watch.peaks()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    ignore_ending_signals()  # once is enough
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; the exit code."""
    asked = arguments(argv)
    for number in ENDING_SIGNALS:
        signal.signal(number, _interrupt)
    if os.geteuid() != 0:
        print("bench: must run as root, as the lab must", file=sys.stderr)
        return 2
    try:
        report, second = measure(asked)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report.text() + second)
    if asked.json:
        asked.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
