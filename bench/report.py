"""What the benchmark has found, as tables for people and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from methods import CAT, OURS, Copied, Method
from peaks import LIMIT

from kvm_clone.version import __version__

MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """All runs of every method, and the peak memory by role of each method of ours; sizes in bytes."""

    size: int
    data: int
    runs: Mapping[Method, Sequence[Copied]]
    peaks: Mapping[Method, Mapping[str, int]]

    def text(self) -> str:
        """The tables."""
        parts = [self._conditions(), self._times()]
        if any(method.ours for method in self.runs):
            parts.append(self._own_parts())
        if self.peaks:
            parts.append(self._memory())
        return "\n\n".join(parts)

    def _conditions(self) -> str:
        rounds = max(len(runs) for runs in self.runs.values())
        return (
            f"kvm-clone {__version__}, {os.cpu_count()} CPUs: one qcow2 disk of {self.size / MIB:.0f} MiB with "
            f"{self.data / MIB:.0f} MiB of data, tmpfs to tmpfs over ssh; rounds: {rounds}, interleaved"
        )

    def _times(self) -> str:
        head = ["seconds", "min", "median", "max", "MiB/s", f"/ {OURS}", f"/ {CAT}"]
        rows = []
        for method in self.runs:
            seconds = self._seconds(method)
            rate = self.data / MIB / median(seconds)
            rows.append(
                [
                    f"{method.name}: {method.title}",
                    *(f"{value:.2f}" for value in (min(seconds), median(seconds), max(seconds))),
                    f"{rate:.0f}",
                    *(_ratio_text(self._ratio(method, base)) for base in (OURS, CAT)),
                ]
            )
        legend = (
            f"/ {OURS}: median divided by that of kvm-clone --no-verify; above 1 is slower than we are.\n"
            f"/ {CAT}: median divided by that of cat | ssh cat; above 1 is slower than it is.\n"
            "nbdcopy and qemu-img: without the set-up of their servers and forwarding. Only kvm-clone defines a VM."
        )
        return f"{_table(head, rows)}\n{legend}"

    def _own_parts(self) -> str:
        head = ["of these, medians", "copy", "prove", "the rest"]
        rows = []
        for method, runs in self.runs.items():
            if method.ours:
                rest = median(run.seconds - run.copying - run.proving for run in runs)
                copying, proving = median(run.copying for run in runs), median(run.proving for run in runs)
                rows.append([method.name, f"{copying:.2f}", f"{proving:.2f}", f"{rest:.2f}"])
        return _table(head, rows)

    def _memory(self) -> str:
        roles = sorted({role for peaks in self.peaks.values() for role in peaks})
        rows = []
        for role in roles:
            peaks = [found.get(role) for found in self.peaks.values()]
            over = any(peak is not None and peak > LIMIT for peak in peaks)
            shown = ["" if peak is None else f"{peak / MIB:.1f}" for peak in peaks]
            rows.append([role, *shown, f"over {LIMIT // MIB}" if over else ""])
        head = ["peak RSS, MiB", *(method.name for method in self.peaks), ""]
        return f"{_table(head, rows)}\nFrom one more run of each, not timed."

    def as_dict(self) -> dict[str, Any]:
        """For --json: times in seconds, sizes in bytes."""
        return {
            "version": __version__,
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
            "size": self.size,
            "data": self.data,
            "methods": {method.name: self._method(method) for method in self.runs},
            "peak_rss": {method.name: dict(sorted(found.items())) for method, found in self.peaks.items()},
        }

    def _method(self, method: Method) -> dict[str, Any]:
        seconds = self._seconds(method)
        runs = self.runs[method]
        parts = {"copy": [run.copying for run in runs], "prove": [run.proving for run in runs]} if method.ours else {}
        return {
            "title": method.title,
            "seconds": seconds,
            "median": median(seconds),
            "to_ours": self._ratio(method, OURS),
            "to_cat": self._ratio(method, CAT),
            **parts,
        }

    def _seconds(self, method: Method) -> list[float]:
        return [run.seconds for run in self.runs[method]]

    def _ratio(self, method: Method, base: str) -> float | None:
        """The method's median over the base's, None when the base was not run."""
        bases = [other for other in self.runs if other.name == base]
        return median(self._seconds(method)) / median(self._seconds(bases[0])) if bases else None


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
