"""Any sequence of runs and crashes: what is promised of the destination holds at every instant."""

from __future__ import annotations

import functools
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvm_clone.agent import names, transfer
from kvm_clone.agent.digests.service import DigestService
from kvm_clone.agent.disks import chain, fingerprint, image, qemu
from kvm_clone.agent.disks.disk import Ranges
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import leftovers, merge, records
from kvm_clone.agent.staging.directory import DirectoryStore
from kvm_clone.agent.staging.stage import Stage
from kvm_clone.agent.transfer import Job, Receiver, Sender

from . import volumes
from .naive_hash import BY_SHA256
from .tools import KIB, arriving, make_raw, noise, read, through_pipe
from .volumes import Volumes

pytestmark = pytest.mark.timeout(60)

BLOCK, BLOCKS = 4096, 6
SIZE = BLOCK * BLOCKS
DISKS = {"vda": "vda.raw", "vdb": "vdb.raw"}
WITH_VARIABLES = {"vda": "vda.raw", "nvram": "web_VARS.fd"}
"""The assets of a VM, with their final names: two disks, and a disk and what is no disk."""

FOREIGN = {"other.raw": b"not ours", ".kvm-clone-0123456789abcdef.journal": b"another VM's", "old.raw": b"the old VM's"}


class PowerCutError(BaseException):
    """The process ends here and does nothing more."""


class World:
    """Two hosts: the source's disks, the destination's directory, and what libvirt there has defined.

    `run` is what a controller does, step by step; a crash comes before the step that `steps_left` counts down to, and
    a copy stops after `cut` of its bytes.
    """

    def __init__(self, root: Path, store: str, assets: dict[str, str]) -> None:
        self.source = root / "source"
        self.pool = root / "pool"
        self.store = store
        self.assets = assets
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
        for disk in self.assets:
            held = [number for number in range(BLOCKS) if chance.random() < 0.6]
            make_raw(self.source / disk, SIZE, [(at * BLOCK, noise(BLOCK, chance.randrange(8))) for at in held])

    def content(self) -> dict[str, bytes]:
        return {disk: (self.source / disk).read_bytes() for disk in self.assets}

    def final(self, disk: str) -> Path:
        return self.pool / self.assets[disk]

    def step(self) -> None:
        if not self.steps_left:
            raise PowerCutError
        self.steps_left -= 1

    def stage(self, operation: str, **how: Any) -> Stage:
        return Stage(str(self.pool), "web", operation, {}, directories=[str(self.pool)], **how)

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
        found = next(iter(leftovers.staged([str(self.pool)], "web")), None)
        found = None if found and "error" in found else found
        if found and found["defining"]:
            committed = self.defined is not None and self.defined[0] == found["operation"]
            self.step()
            leftovers.record_outcome(str(self.pool), "web", found["operation"], [str(self.pool)], committed=committed)
            self.step()
            if committed:
                self.stage(found["operation"], finishing=True).finish()
                return
        elif self.defined:
            return
        earlier = found["operation"] if found else ""
        found = None if start_over else found
        self.operations += 1
        operation = found["operation"] if found else f"{self.operations:02x}"
        self.held = self.stage(operation, resume=found is not None, discards=earlier, keep=True)
        kept = {disk: state for disk, state in (found["disks"] if found else {}).items() if state["durable"]}
        self._fill(self.held, kept, cut)
        self._commit(self.held, operation)

    def _fill(self, staged: Stage, kept: dict[str, Any], cut: float) -> None:
        spec = {"format": "raw", "size": SIZE, "options": {}, "mode": 0o600, "user": "root", "group": "root"}
        spec["store"] = self.store
        for disk in self.assets:
            self.step()
            durable = kept[disk]["durable"] if disk in kept else 0
            part = kept[disk]["part"] if disk in kept else staged.create(disk, str(self.final(disk)), spec)
            differs = digests(self.source / disk, durable) != digests(Path(part), durable)
            ranges = [[0 if differs else durable, SIZE]] if disk in kept else None
            job = Job(str(self.source / disk), "raw", fresh=ranges is None, ranges=ranges)
            self.step()
            self._copy(staged, disk, job, Job(part, "raw", durable=[[0, durable]]), cut)
            assert Path(part).read_bytes() == (self.source / disk).read_bytes()
            staged.note(records.COPIED, {"disk": disk, "bytes": SIZE})

    def _copy(self, staged: Stage, disk: str, source: Job, target: Job, cut: float) -> None:
        content = through_pipe(lambda out: Sender(out, [source], 1, 0).run())
        whole = cut >= 1

        def durable(ranges: list[Ranges | None]) -> None:
            assert ranges[0] is not None
            staged.note(records.DURABLE, records.durable(disk, ranges[0]))

        failing = suppress(*([] if whole else [AgentError]))
        with arriving(content if whole else content[: int(len(content) * cut)]) as incoming, failing:
            Receiver(incoming, [target], lambda _: None, durable).run()
        if not whole:
            raise PowerCutError

    def _commit(self, staged: Stage, operation: str) -> None:
        for disk in self.assets:
            self.step()
            self.published[disk] = self.content()[disk]
            staged.publish(disk, str(self.final(disk)))
        self.step()
        staged.note(records.DEFINE, {"uuid": "u", "remove": []})
        self.step()
        self.defined = (operation, self.content())
        self.step()
        staged.note(records.COMMITTED, {})
        self.step()
        staged.finish()

    def check(self) -> None:
        """What holds whenever nothing runs."""
        assert {name: (self.pool / name).read_bytes() for name in FOREIGN} == FOREIGN
        for disk in self.assets:
            if self.defined or (self.store == DirectoryStore.kind and self.final(disk).exists()):
                assert self.final(disk).read_bytes() == self.published[disk]
        if self.defined:
            assert self.defined[1] == self.published


HOW = [BY_SHA256.method, BY_SHA256.key.hex()]


def digests(path: Path, end: int) -> list[list[Any]]:
    return DigestService().segments(str(path), "raw", HOW, [[0, end]], lambda _: None)


RUNS = st.lists(
    st.tuples(
        st.integers(0, 14),  # the step that it dies before
        st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0, 1.0]),  # of the first copy that gets through
        st.booleans(),  # whether the source changed before it
        st.integers(0, 9).map(lambda number: number == 9),  # whether it starts over
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 99), RUNS)
def test_any_sequence_of_runs_and_crashes(seed: int, runs: list[tuple[int, float, bool, bool]]) -> None:
    ends_well_in_the_end(seed, runs, None)


@pytest.mark.parametrize(
    ("store", "assets"),
    [(Volumes.kind, DISKS), (DirectoryStore.kind, WITH_VARIABLES), (Volumes.kind, WITH_VARIABLES)],
    ids=["volumes", "variables", "variables in volumes"],
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 99), RUNS)
def test_any_sequence_of_runs_and_crashes_with_other_stores_and_assets(
    store: str, assets: dict[str, str], seed: int, runs: list[tuple[int, float, bool, bool]]
) -> None:
    with volumes.known():
        ends_well_in_the_end(seed, runs, None, store, assets)


def test_any_sequence_of_runs_and_crashes_without_hard_links(plain: Callable[..., Path]) -> None:
    root = plain("no-links", "no-owners", "no-modes", "dense")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 99), RUNS)
    def run(seed: int, runs: list[tuple[int, float, bool, bool]]) -> None:
        ends_well_in_the_end(seed, runs, root)

    run()


def ends_well_in_the_end(
    seed: int,
    runs: list[tuple[int, float, bool, bool]],
    root: Path | None,
    store: str = DirectoryStore.kind,
    assets: dict[str, str] = DISKS,
) -> None:
    """After any runs and crashes the next ones make the clone and leave nothing; in a new directory below `root`."""
    with tempfile.TemporaryDirectory(dir=root) as directory, pytest.MonkeyPatch.context() as patched:
        locks = Path(directory) / "locks"
        locks.mkdir(mode=0o700)
        patched.setattr(names, "_lock_directory", lambda: str(locks))
        patched.setattr(transfer, "DURABLE_BYTES", 1)
        world = World(Path(directory), store, assets)
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
        assert {entry.name for entry in world.pool.iterdir()} == {*FOREIGN, *assets.values()}
        assert not list(locks.iterdir())


CLUSTER, CLUSTERS = 64 * KIB, 4
STEPS_OF_A_SYNC = 11


class Replica:
    """A VM at the destination that is brought to its source's state through an overlay on its one disk.

    `defined` is the file that libvirt has for it, `by` the operation that defined it, `seal` what it was sealed with.
    `state` is what its guest has to find at every instant. A merge stops after `merged` of its clusters.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.pool, self.source = root / "pool", root / "source"
        self.pool.mkdir()
        (self.pool / "other.raw").write_bytes(b"not ours")
        self.base = self.pool / "base.raw"
        self.write_source(seed)
        self.base.write_bytes(self.source.read_bytes())
        self.state = self.source.read_bytes()
        self.defined, self.by = self.base, "clone"
        self.seal: dict[str, str] | None = {"vda": fingerprint.of(str(self.base))}
        self.operations = 0
        self.steps_left = 1 << 30
        self.merged = CLUSTERS
        self.held: Stage | None = None

    def write_source(self, seed: int) -> None:
        """Clusters of data and of zeros, by chance; the disk may have grown."""
        chance = random.Random(seed)
        size = max(CLUSTERS + seed % 2, self.source.stat().st_size // CLUSTER if self.source.exists() else 0) * CLUSTER
        held = [at for at in range(0, size, CLUSTER) if chance.random() < 0.6]
        make_raw(self.source, size, [(at, noise(CLUSTER, chance.randrange(5))) for at in held])

    @property
    def format(self) -> str:
        return "raw" if self.defined == self.base else "qcow2"

    def guest_finds(self) -> bytes:
        with closing(image.open_for_reading(str(self.defined), self.format)) as disk:
            return read(disk)

    def guest_writes(self) -> None:
        """The VM is started, writes, and is shut off."""
        with closing(qemu.open_nbd(chain.linear(str(self.defined), self.format), writable=True)) as disk:
            disk.write(CLUSTER // 2, memoryview(b"a guest's"))
            disk.flush()
        self.state = self.state[: CLUSTER // 2] + b"a guest's" + self.state[CLUSTER // 2 + 9 :]

    @property
    def is_unused(self) -> bool:
        if self.seal is None or self.defined != self.base:
            return False
        return fingerprint.is_untouched(str(self.base), self.seal["vda"])

    def step(self) -> None:
        self.check()
        if not self.steps_left:
            raise PowerCutError
        self.steps_left -= 1

    def check(self) -> None:
        """What holds at every instant."""
        assert self.guest_finds() == self.state
        assert (self.pool / "other.raw").read_bytes() == b"not ours"

    def stage(self, operation: str, about: dict[str, Any], **how: Any) -> Stage:
        return Stage(str(self.pool), "web", operation, about, directories=[str(self.pool)], **how)

    def run(self, crash_at: int, cut: float = 1.0, merged: int = CLUSTERS, *, force: bool = False) -> str:
        """How it ended."""
        self.steps_left, self.merged = crash_at, merged
        try:
            return self._run(cut, force)
        except PowerCutError:
            if self.held is not None:
                self.held.release()
            return "power cut"
        finally:
            self.held = None

    def _run(self, cut: float, force: bool) -> str:
        found = next(iter(leftovers.staged([str(self.pool)], "web")), None)
        if found and found["defining"]:
            committed = self.by == found["operation"]
            self.step()
            leftovers.record_outcome(str(self.pool), "web", found["operation"], [str(self.pool)], committed=committed)
            self.step()
            if committed:
                self.held = self.stage(found["operation"], {}, finishing=True)
                return self._after_commit(self.held)
        if not self.is_unused and not force:
            return "refused"
        if self.is_unused and not found and self.state == self.source.read_bytes():
            return "nothing to do"
        earlier = found["operation"] if found else ""
        found = None if force else found
        self.operations += 1
        operation = found["operation"] if found else f"{self.operations:02x}"
        about = {"kind": "sync"}
        self.held = self.stage(operation, about, resume=found is not None, discards=earlier, keep=True)
        kept = found["disks"].get("vda") if found else None
        size = self.source.stat().st_size
        usable = kept is not None and kept["durable"] and kept["backing"] == str(self.base) and kept["size"] == size
        self._fill(self.held, usable, cut)
        return self._commit(self.held, operation)

    def overlay(self, staged: Stage) -> Path:
        return self.pool / f"kvm-clone-{staged.operation}-vda.qcow2"

    def _fill(self, staged: Stage, usable: bool, cut: float) -> None:
        size, final = self.source.stat().st_size, str(self.overlay(staged))
        owner = {"mode": 0o600, "user": "root", "group": "root"}
        spec = {"format": "qcow2", "size": size, "options": {}, "backing": [str(self.base), "raw"], **owner}
        self.step()
        part = names.part_path(staged.operation, "vda", final) if usable else staged.create("vda", final, spec)
        self.step()
        ranges = self._differing(part)
        if ranges:
            content = through_pipe(functools.partial(_send, Job(str(self.source), "raw", False, ranges)))
            content = content if cut >= 1 else content[: int(len(content) * cut)]
            with arriving(content) as incoming, suppress(*([] if cut >= 1 else [AgentError])):
                note = functools.partial(self._durable, staged)
                Receiver(incoming, [Job(part, "qcow2", False)], lambda _: None, note).run()
            if cut < 1:
                raise PowerCutError
        assert self._differing(part) == []

    def _durable(self, staged: Stage, ranges: list[Ranges | None]) -> None:
        assert ranges[0] is not None
        staged.note(records.DURABLE, records.durable("vda", ranges[0]))

    def _differing(self, part: str) -> list[list[int]]:
        wanted = self.source.read_bytes()
        with closing(image.open_for_reading(part, "qcow2")) as disk:
            there = read(disk)
        assert len(there) == len(wanted)
        starts = range(0, len(wanted), CLUSTER)
        return [[at, at + CLUSTER] for at in starts if there[at : at + CLUSTER] != wanted[at : at + CLUSTER]]

    def _commit(self, staged: Stage, operation: str) -> str:
        final = self.overlay(staged)
        self.step()
        staged.publish("vda", str(final))
        self.step()
        overlay = {"disk": "vda", "path": str(final), "base": str(self.base), "base_format": "raw"}
        images = {"vda": [str(final), fingerprint.of(str(final))]}
        staged.note(records.DEFINE, {"uuid": "u", "remove": [], "merge": [overlay], "images": images})
        self.step()
        self.defined, self.by, self.seal = final, operation, None
        self.state = self.source.read_bytes()
        self.step()
        staged.note(records.COMMITTED, {})
        return self._after_commit(staged)

    def _after_commit(self, staged: Stage) -> str:
        self.step()
        overlays = staged.overlays()
        if overlays and self.defined != self.base:
            staged.merge()
            self.step()
            self.defined = self.base
            self.step()
        if overlays:
            staged.merged()
        self.step()
        self.seal = staged.seal()
        self.step()
        staged.finish()
        return "done"

    def merging(self, overlay: merge.Overlay, size: int, ending: threading.Event) -> None:
        """What a merge writes, or as much of it as comes before the power is cut."""
        if self.merged < CLUSTERS:
            with closing(image.open_for_reading(overlay.path, "qcow2")) as disk, self.base.open("r+b") as base:
                base.truncate(disk.size)
                base.write(read(disk)[: self.merged * CLUSTER])
            self.check()
            raise PowerCutError
        WRITE_DOWN(overlay, size, ending)


WRITE_DOWN = merge.write_down


def _send(job: Job, out: int) -> None:
    Sender(out, [job], 1, 0).run()


@contextmanager
def replica(seed: int) -> Iterator[Replica]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        locks = Path(directory) / "locks"
        locks.mkdir(mode=0o700)
        patched.setattr(names, "_lock_directory", lambda: str(locks))
        patched.setattr(transfer, "DURABLE_LEAST", 1)
        found = Replica(Path(directory), seed)
        patched.setattr(merge, "write_down", found.merging)
        yield found
        assert not list(locks.iterdir())


def ends_well(found: Replica, *, force: bool) -> None:
    """The next runs bring it to the source's state, and leave nothing."""
    for _ in range(2):  # the first may only finish what was begun
        found.run(1 << 30, force=force)
        found.check()
    assert found.state == found.source.read_bytes() == found.base.read_bytes()
    assert {entry.name for entry in found.pool.iterdir()} == {"base.raw", "other.raw"}
    assert found.is_unused
    assert found.run(1 << 30) == "nothing to do"


@pytest.mark.parametrize("crash_at", range(STEPS_OF_A_SYNC + 1))
def test_a_sync_that_ends_at_any_step_is_gone_on_with(crash_at: int) -> None:
    with replica(1) as found:
        found.write_source(3)
        assert (found.run(crash_at) == "power cut") == (crash_at < STEPS_OF_A_SYNC)
        found.check()
        ends_well(found, force=False)


@pytest.mark.parametrize("merged", range(CLUSTERS))
def test_a_merge_that_ends_anywhere_is_gone_on_with(merged: int) -> None:
    with replica(2) as found:
        found.write_source(5)
        assert found.run(1 << 30, merged=merged) == "power cut"
        found.check()
        ends_well(found, force=False)


SYNCS = st.lists(
    st.tuples(
        st.integers(0, STEPS_OF_A_SYNC + 2),  # the step that it dies before
        st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0, 1.0]),  # of the copy that gets through
        st.sampled_from([0, 2, CLUSTERS, CLUSTERS, CLUSTERS]),  # of the merge
        st.sampled_from(["", "", "the source changes", "the guest writes"]),  # before it
        st.integers(0, 4).map(lambda number: number == 4),  # whether it is forced
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.integers(0, 99), SYNCS)
def test_any_sequence_of_syncs_and_crashes(seed: int, runs: list[tuple[int, float, int, str, bool]]) -> None:
    """What the guest of the replica has written is lost to none but --force."""
    with replica(seed) as found:
        for number, (crash_at, cut, merged, before, force) in enumerate(runs):
            if before == "the source changes":
                found.write_source(seed + number + 1)
            elif before == "the guest writes":
                found.guest_writes()
                found.check()
            used = b"a guest's" in found.state
            found.run(crash_at, cut, merged, force=force)
            found.check()
            assert force or not used or b"a guest's" in found.state
        ends_well(found, force=True)
