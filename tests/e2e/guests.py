"""What the lab's test guests do, as seen from outside: their ticks, and what is on their disks."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from labclient import Lab

TICK = re.compile(r"TICK (\d+\.\d+) (\d+)")
FAILED = "WORKLOAD-FAILED"
POLL_SECONDS = 0.005

SECTOR = 512
BLOCK = 4096
COUNTER_AT = 1 << 20
BLOCKS_AT = 2 << 20
BLOCKS_LENGTH = 8 << 20
FILES = 24


@dataclass(frozen=True)
class Tick:
    """One TICK line; `seen` is this machine's monotonic clock, `guest` the guest's."""

    seen: float
    guest: float
    count: int


class Ticks:
    """The TICK lines that a guest prints while the context is open.

    A guest's clocks stand still while its processor does, so that only `seen` shows every pause.
    """

    def __init__(self, lab: Lab, host: str, serial: str) -> None:
        self._file = lab.outside(host, serial)
        self._ticks: list[Tick] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._text = ""

    def __enter__(self) -> Ticks:
        self._stream = self._file.open(errors="replace")
        self._text = self._stream.read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._stream.close()

    @property
    def seen(self) -> list[Tick]:
        """All until now."""
        return list(self._ticks)

    def wait(self, more: int = 1, seconds: float = 30) -> Tick:
        """Wait until the guest has ticked so many times more; the last of these."""
        wanted = len(self._ticks) + more
        deadline = time.monotonic() + seconds
        while len(self._ticks) < wanted:
            if FAILED in self._text:
                raise AssertionError(self._text)
            if time.monotonic() > deadline:
                raise AssertionError(f"no {more} ticks within {seconds} s; the guest printed {self._text[-300:]!r}")
            time.sleep(POLL_SECONDS)
        return self._ticks[wanted - 1]

    def longest_pause(self, since: float = 0) -> float:
        """Most seconds from one tick to the next, or to now, that ended after a moment: 0.1 without any pause."""
        moments = [tick.seen for tick in self.seen] + [time.monotonic()]
        pauses = [later - earlier for earlier, later in itertools.pairwise(moments) if later >= since]
        return max(pauses, default=0.0)

    def _follow(self) -> None:
        """Read what is appended; what the file held already is not seen now."""
        rest = self._text.rpartition("\n")[2]
        while not self._stopped.wait(POLL_SECONDS):
            new = self._stream.read()
            self._text += new
            *lines, rest = (rest + new).split("\n")
            now = time.monotonic()
            self._ticks += [Tick(now, float(m[1]), int(m[2])) for line in lines if (m := TICK.match(line))]


def raw_copy(lab: Lab, host: str, path: str, to: Path) -> Path:
    """Copy a disk image, as raw, to this machine; a VM that has it must not write to it meanwhile."""
    image = lab.outside(host, path)
    kind = "raw" if image.suffix == ".raw" else "qcow2"
    subprocess.run(["qemu-img", "convert", "-U", "-f", kind, "-O", "raw", str(image), str(to)], check=True)
    return to


def assert_counter(disks: Sequence[Path]) -> int:
    """Check that raw images of all disks of a counter guest are of one moment; the count of the first one.

    The count is written to one disk after the other, after the block of the round on all of them.
    """
    counts = [_count(disk) for disk in disks]
    assert all(earlier - later in (0, 1) for earlier, later in itertools.pairwise(counts)), counts
    assert counts[0] - counts[-1] <= 1, counts
    for disk in disks:
        _assert_blocks(disk, counts[0])
    return counts[0]


def _count(disk: Path) -> int:
    with disk.open("rb") as file:
        file.seek(COUNTER_AT)
        match = re.match(rb"count (\d+)\n", file.read(SECTOR))
    assert match, f"no count on {disk}"
    return int(match[1])


def _assert_blocks(disk: Path, count: int) -> None:
    """Check the block of each round that none has overwritten, and none that has only begun may have."""
    slots = min(disk.stat().st_size - BLOCKS_AT, BLOCKS_LENGTH) // BLOCK
    with disk.open("rb") as file:
        for number in range(max(1, count - slots + 2), count + 1):
            file.seek(BLOCKS_AT + number % slots * BLOCK)
            wanted = f"block of round {number}\n".encode().ljust(SECTOR, b"\0")
            assert file.read(BLOCK) == wanted * (BLOCK // SECTOR), f"{disk}: round {number} of {count}"


def needs_replay(disk: Path) -> bool:
    """Tell whether a raw image of a file system is one that was in use, not unmounted or frozen."""
    return "needs_recovery" in _tool("dumpe2fs", "-h", str(disk)).stdout


def assert_clean(disk: Path) -> None:
    """Check a raw image of a file system, without changing it."""
    done = _tool("e2fsck", "-fn", str(disk))
    assert done.returncode == 0, done.stdout + done.stderr


def assert_file_system(disk: Path, directory: Path) -> int:
    """Check a raw image of the disk of a guest of mode `fs`; its last round.

    What a machine that boots from it would do is done to the image: replay the journal. The files are
    copied to the directory.
    """
    done = _tool("e2fsck", "-p", str(disk))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert_clean(disk)
    directory.mkdir()
    _tool("debugfs", "-R", f"rdump / {directory}", str(disk))
    return assert_files(directory)


def _tool(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program of e2fsprogs, which are not in every user's PATH."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})


def assert_files(directory: Path) -> int:
    """Check what a guest's files say of themselves, in a copy of its file system; its last round."""
    last = int((directory / "last").read_text())
    rounds = {int(path.name.removeprefix("round-")) for path in directory.glob("round-*")}
    # The next round may have begun, and deleted one.
    missing = set(range(max(1, last - FILES + 2), last + 1)) - rounds
    assert not missing, f"rounds {sorted(missing)} of {last} are missing"
    for path in [*directory.glob("round-*"), *directory.glob("state-*")]:
        head, _, content = path.read_bytes().partition(b"\n")
        assert head == b"%08x %d" % (zlib.crc32(content), len(content)), path.name
    return last
