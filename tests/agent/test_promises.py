"""Any sequence of runs and crashes: what is promised of the destination holds at every instant."""

from __future__ import annotations

import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_clone.agent import journal, stage, transfer
from kvm_clone.agent.errors import AgentError
from kvm_clone.agent.server import digest_disk
from kvm_clone.agent.stage import Stage
from kvm_clone.agent.transfer import Job, Receiver, Sender

from .tools import arriving, make_raw, noise, through_pipe

pytestmark = pytest.mark.timeout(60)

BLOCK, BLOCKS = 4096, 6
SIZE = BLOCK * BLOCKS
DISKS = ("vda", "vdb")
FOREIGN = {"other.raw": b"not ours", ".kvm-clone-0123456789abcdef.journal": b"another VM's", "old.raw": b"the old VM's"}


class PowerCutError(BaseException):
    """The process ends here and does nothing more."""


class World:
    """Two hosts: the source's disks, the destination's directory, and what libvirt there has defined.

    `run` is what a controller does, step by step; a crash comes before the step that `steps_left` counts down to, and
    a copy stops after `cut` of its bytes.
    """

    def __init__(self, root: Path) -> None:
        self.source = root / "source"
        self.pool = root / "pool"
        self.pool.mkdir()
        self.source.mkdir()
        for name, content in FOREIGN.items():
            (self.pool / name).write_bytes(content)
        self.operations = 0
        self.published: dict[str, bytes] = {}
        self.defined: tuple[str, dict[str, bytes]] | None = None
        self.steps_left = 1 << 30
        self.held: Stage | None = None

    def write_source(self, seed: int) -> None:
        """Blocks of data and of hole, by chance."""
        chance = random.Random(seed)
        for disk in DISKS:
            held = [number for number in range(BLOCKS) if chance.random() < 0.6]
            make_raw(self.source / disk, SIZE, [(at * BLOCK, noise(BLOCK, chance.randrange(8))) for at in held])

    def content(self) -> dict[str, bytes]:
        return {disk: (self.source / disk).read_bytes() for disk in DISKS}

    def final(self, disk: str) -> Path:
        return self.pool / f"{disk}.raw"

    def step(self) -> None:
        if not self.steps_left:
            raise PowerCutError
        self.steps_left -= 1

    def run(self, crash_at: int, cut: float, *, start_over: bool = False) -> bool:
        """Whether it came to its end."""
        self.steps_left = crash_at
        try:
            self._run(cut, start_over)
        except PowerCutError:
            if self.held is not None:
                self.held.release()  # what the kernel does for the dead
            return False
        finally:
            self.held = None
        return True

    def _run(self, cut: float, start_over: bool) -> None:
        found = next(iter(stage.staged([str(self.pool)], "web")), None)
        found = None if found and "error" in found else found
        if found and found["defining"]:
            committed = self.defined is not None and self.defined[0] == found["operation"]
            self.step()
            stage.settle(str(self.pool), "web", committed=committed)
            self.step()
            if committed:
                stage.finish(str(self.pool), "web")
                return
        elif self.defined:
            return
        found = None if start_over else found
        self.operations += 1
        operation = found["operation"] if found else f"{self.operations:02x}"
        self.held = Stage(str(self.pool), "web", operation, {}, resume=found is not None, keep=True)
        kept = {disk: state for disk, state in (found["disks"] if found else {}).items() if state["durable"]}
        self._fill(self.held, kept, cut)
        self._commit(self.held, operation)

    def _fill(self, staged: Stage, kept: dict[str, Any], cut: float) -> None:
        spec = {"format": "raw", "size": SIZE, "options": {}, "mode": 0o600, "user": "root", "group": "root"}
        for disk in DISKS:
            self.step()
            part = staged.part_path(disk, str(self.final(disk)))
            durable = kept[disk]["durable"] if disk in kept else 0
            if disk not in kept:
                staged.create(disk, str(self.final(disk)), spec)
            differs = digests(self.source / disk, durable) != digests(Path(part), durable)
            ranges = [[0 if differs else durable, SIZE]] if disk in kept else None
            job = Job(str(self.source / disk), "raw", fresh=ranges is None, ranges=ranges)
            self.step()
            self._copy(staged, disk, job, Job(part, "raw", durable=durable), cut)
            assert Path(part).read_bytes() == (self.source / disk).read_bytes()
            staged.note(journal.COPIED, {"disk": disk, "bytes": SIZE})

    def _copy(self, staged: Stage, disk: str, source: Job, target: Job, cut: float) -> None:
        content = through_pipe(lambda out: Sender(out, [source], 1, 0).run())
        whole = cut >= 1

        def durable(ends: list[int]) -> None:
            staged.note(journal.DURABLE, {"disk": disk, "end": ends[0]})

        failing = suppress(*([] if whole else [AgentError]))
        with arriving(content if whole else content[: int(len(content) * cut)]) as incoming, failing:
            Receiver(incoming, [target], lambda _: None, durable).run()
        if not whole:
            raise PowerCutError

    def _commit(self, staged: Stage, operation: str) -> None:
        for disk in DISKS:
            self.step()
            self.published[disk] = self.content()[disk]
            staged.publish(disk, str(self.final(disk)))
        self.step()
        staged.note(journal.DEFINE, {"uuid": "u", "remove": []})
        self.step()
        self.defined = (operation, self.content())
        self.step()
        staged.note(journal.COMMITTED, {})
        self.step()
        staged.finish()

    def check(self) -> None:
        """What holds whenever nothing runs."""
        assert {name: (self.pool / name).read_bytes() for name in FOREIGN} == FOREIGN
        for disk in DISKS:
            if self.defined or self.final(disk).exists():
                assert self.final(disk).read_bytes() == self.published[disk]
        if self.defined:
            assert self.defined[1] == self.published


def digests(path: Path, end: int) -> list[list[Any]]:
    return digest_disk(str(path), "raw", lambda _: None, [[0, end]])


RUNS = st.lists(
    st.tuples(
        st.integers(0, 14),  # the step that it dies before
        st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0, 1.0]),  # of the first copy that gets through
        st.booleans(),  # whether the source changed before it
        st.integers(0, 9).map(lambda number: number == 9),  # whether it starts over
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 99), RUNS)
def test_any_sequence_of_runs_and_crashes(seed: int, runs: list[tuple[int, float, bool, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        locks = Path(directory) / "locks"
        locks.mkdir()
        patched.setattr(stage, "_LOCK_DIRECTORIES", (str(locks),))
        patched.setattr(transfer, "DURABLE_BYTES", 1)
        world = World(Path(directory))
        world.write_source(seed)
        for number, (crash_at, cut, changes, start_over) in enumerate(runs):
            if changes:
                world.write_source(seed + number + 1)
            world.run(crash_at, cut, start_over=start_over)
            world.check()
        for _ in range(2):  # the first may only finish what was begun
            assert world.run(1 << 30, 1.0)
            world.check()
        assert world.defined
        assert {entry.name for entry in world.pool.iterdir()} == {*FOREIGN, *(world.final(disk).name for disk in DISKS)}
        assert not list(locks.iterdir())
