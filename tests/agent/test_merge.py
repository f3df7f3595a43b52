"""What a sync leaves after its commit: overlays written into the images below, and who may have used them."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvm_clone.agent.disks import chain, fingerprint, qemu
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import merge

from .synced import SIZE, Synced
from .tools import MIB, eventually, need, processes

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]


@pytest.fixture(params=["raw", "qcow2"])
def synced(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Synced]:
    need("qemu-img", "qemu-io")
    made = Synced(tmp_path, request.param)
    yield made
    made.stage.release()


def test_a_merge_writes_everything_down_and_lets_nobody_in_until_it_is_over(synced: Synced) -> None:
    synced.stage.merge()
    for path, format_ in ((synced.base, synced.format), (synced.overlay, "qcow2")):
        assert synced.reads(path, format_, "read -P 2 0 64k")
        assert synced.reads(path, format_, "read -P 0 512k 64k")
        assert synced.reads(path, format_, "read -P 1 64k 64k")
        with pytest.raises(subprocess.CalledProcessError):
            synced.write(path, "write -P 9 0 64k", format_)
    synced.stage.merged()
    assert not synced.overlay.exists()
    assert synced.stage.seal() == {"vda": fingerprint.of(str(synced.base))}
    synced.write(synced.base, "write -P 9 0 64k", synced.format)
    assert synced.stage.seal() is None


def test_a_merge_can_be_repeated(synced: Synced) -> None:
    for _ in range(3):
        synced.stage.merge()
        synced.crash()
    synced.stage.merge()
    synced.stage.merged()
    synced.crash()
    synced.stage.merged()
    assert synced.stage.overlays() == []
    assert synced.stage.seal() is not None


@pytest.mark.parametrize("merges", [0, 1])
def test_what_a_guest_wrote_to_an_overlay_is_merged_and_told(synced: Synced, merges: int) -> None:
    for _ in range(merges):
        synced.stage.merge()
    synced.crash()
    synced.write(synced.overlay, "write -P 7 1M 64k")
    synced.stage.merge()
    synced.stage.merged()
    assert synced.reads(synced.base, synced.format, "read -P 7 1M 64k")
    assert synced.stage.seal() is None
    synced.crash()
    assert synced.stage.seal() is None


def test_a_grown_overlay_grows_what_is_below(synced: Synced) -> None:
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", synced.overlay, str(2 * SIZE)], check=True)
    synced.write(synced.overlay, f"write -P 8 {2 * SIZE - 65536} 64k")
    synced.stage.merge()
    assert synced.reads(synced.base, synced.format, f"read -P 8 {2 * SIZE - 65536} 64k")


def test_an_image_that_was_written_since_its_overlay_was_made_is_not_merged_into(synced: Synced) -> None:
    """A guest that was resumed from an older saved state writes below the overlay."""
    synced.crash()
    synced.write(synced.base, "write -P 7 2M 64k", synced.format)
    before = synced.base.read_bytes()
    with pytest.raises(AgentError, match="do not fit together") as caught:
        synced.stage.merge()
    assert caught.value.kind == errors.IN_USE
    assert synced.base.read_bytes() == before
    assert synced.overlay.exists()


def test_a_merge_that_was_cut_off_is_repeated_whatever_it_has_written(synced: Synced) -> None:
    synced.stage.merge()
    synced.crash()
    synced.write(synced.base, "write -P 1 0 4k", synced.format)  # as if the merge had come so far
    synced.stage.merge()
    assert synced.reads(synced.base, synced.format, "read -P 2 0 64k")


PIECE, APART = 4 << 10, 16 << 10


def _room(path: Path) -> int:
    return path.stat().st_blocks * 512


def _in_pieces(path: Path, format_: str, options: dict[str, str]) -> None:
    """An image whose content lies in pieces of 4 KiB, 12 KiB apart."""
    qemu.create(str(path), format_, SIZE, options)
    _write_pieces(path, format_, b"\1", 1)


def _write_pieces(path: Path, format_: str, byte: bytes, step: int) -> None:
    disk = qemu.open_nbd(chain.linear(str(path), format_), writable=True)
    for at in range(0, SIZE, APART * step):
        disk.write(at, memoryview(byte * PIECE))
    disk.flush()
    disk.close()


@pytest.mark.parametrize("over", [{}, {"extended_l2": "on"}, {"cluster_size": "2097152"}], ids=str)
@pytest.mark.parametrize(
    ("format_", "below"),
    [("raw", {}), ("qcow2", {"cluster_size": "4096"}), ("qcow2", {"extended_l2": "on"})],
    ids=str,
)
def test_holes_below_stay_whatever_the_overlays_clusters_are(
    tmp_path: Path, format_: str, below: dict[str, str], over: dict[str, str]
) -> None:
    base, path = tmp_path / "base", tmp_path / "over"
    _in_pieces(base, format_, below)
    before = _room(base)
    qemu.create(str(path), "qcow2", SIZE, over, chain.Node(str(base), format_))
    _write_pieces(path, "qcow2", b"\2", 4)
    for lock in merge.merge(merge.Overlay("vda", str(path), str(base), format_), threading.Event()):
        lock.release()
    assert _room(base) <= before + (64 << 10)
    expected = bytearray(SIZE)
    for at in range(0, SIZE, APART):
        expected[at : at + PIECE] = (b"\1" if at % (4 * APART) else b"\2") * PIECE
    disk = qemu.open_nbd([chain.Node(str(base), format_)], writable=False)
    content = bytearray(SIZE)
    disk.readinto(0, memoryview(content))
    disk.close()
    assert content == expected


def test_a_compressed_overlay_is_left_as_it_is(tmp_path: Path) -> None:
    base, path, other = tmp_path / "base", tmp_path / "over", tmp_path / "other"
    _in_pieces(base, "raw", {})
    _in_pieces(other, "qcow2", {})
    argv = ["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-B", str(base), "-F", "raw"]
    subprocess.run([*argv, str(other), str(path)], check=True)
    before = base.read_bytes()
    with pytest.raises(AgentError, match="compressed"):
        merge.merge(merge.Overlay("vda", str(path), str(base), "raw"), threading.Event())
    assert base.read_bytes() == before
    qemu.open_nbd([chain.Node(str(path), "qcow2")], writable=True).close()  # its lock is gone


def _snapshot(synced: Synced) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "one", synced.overlay], check=True)


def _nothing_below(synced: Synced) -> None:
    synced.base.rename(synced.base.with_suffix(".elsewhere"))


@pytest.mark.parametrize("spoil", [_snapshot, _nothing_below])
def test_an_overlay_that_cannot_be_merged_stays(synced: Synced, spoil: Callable[[Synced], None]) -> None:
    spoil(synced)
    before = synced.overlay.read_bytes()
    with pytest.raises((AgentError, OSError)):
        synced.stage.merge()
    assert synced.overlay.read_bytes() == before
    assert [one["path"] for one in synced.stage.overlays()] == [str(synced.overlay)]


def test_an_overlay_that_another_process_has_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in use, and nothing is merged; when the other has ended, it can be."""
    monkeypatch.setattr(merge, "_PATIENCE_SECONDS", 0.5)
    pool = tmp_path / "open"
    pool.mkdir()
    synced = Synced(pool, "raw")
    other = qemu.open_nbd(chain.linear(str(synced.overlay), "qcow2"), writable=True)
    try:
        with pytest.raises(AgentError) as caught:
            synced.stage.merge()
        assert caught.value.kind == errors.IN_USE
        assert synced.reads(synced.base, "raw", "read -P 1 0 1M")
    finally:
        other.close()
    synced.stage.merge()
    assert synced.reads(synced.base, "raw", "read -P 2 0 64k")
    synced.stage.release()


@pytest.mark.parametrize("disk", ["the overlay before the merge", "what is below after it"])
def test_a_disk_that_was_written_and_given_its_old_mtime(disk: str, synced: Synced) -> None:
    """As by `touch -r`: the ctime tells."""
    merged = "after" in disk
    path, format_ = (synced.base, synced.format) if merged else (synced.overlay, "qcow2")
    if merged:
        synced.stage.merge()
        synced.stage.merged()
        assert synced.stage.seal() is not None
    synced.crash()
    before = path.stat()
    synced.write(path, "write -P 7 0 64k", format_)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint.is_still(str(path), fingerprint.of_stat(before)) == (path.stat().st_size == before.st_size)
    assert not fingerprint.is_untouched(str(path), fingerprint.of_stat(before))
    if not merged:
        synced.stage.merge()
        synced.stage.merged()
    assert synced.stage.seal() is None


LONG = f"60.{os.getpid()}"
"""Seconds, which nobody else sleeps for."""

REAL = {"qemu-img": shutil.which("qemu-img"), "qemu-nbd": shutil.which("qemu-nbd")}

SLOW = """#!/bin/sh
case "$1" in {word}) touch "$0.begun"; {how} ;; esac
exec {real} "$@"
"""


@pytest.mark.parametrize(("name", "word"), [("qemu-img", "map"), ("qemu-nbd", "--discard=unmap")])
@pytest.mark.parametrize("how", ["exec sleep {long}", "kill -STOP $$"])
def test_a_merge_that_takes_long_is_let_go_of(
    how: str, name: str, word: str, synced: Synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C does not wait for it, and the next run finishes it."""
    programs = synced.pool / "bin"
    programs.mkdir()
    program = programs / name
    program.write_text(SLOW.format(how=how.format(long=LONG), word=word, real=REAL[name]))
    program.chmod(0o755)
    said: list[AgentError] = []

    def merging() -> None:
        try:
            synced.stage.merge()
        except AgentError as error:
            said.append(error)

    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        thread = threading.Thread(target=merging)
        thread.start()
        assert eventually((programs / f"{name}.begun").exists)
        started = time.monotonic()
        synced.stage.release()
        assert time.monotonic() - started < 5
        thread.join()
    assert [error.kind for error in said] == [errors.INTERRUPTED]
    assert not processes(str(synced.pool))
    assert not processes(f"sleep\x00{LONG}")
    assert synced.reads(synced.overlay, "qcow2", "read -P 2 0 64k")
    synced.crash()
    synced.stage.merge()
    assert synced.reads(synced.base, synced.format, "read -P 2 0 64k")
    synced.stage.merged()
    assert synced.stage.seal() is not None


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_merge_is_let_go_of_between_two_pieces(pieces: int, synced: Synced, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written by then is in order below, and no program has to be killed."""
    synced.crash()
    for number in range(3):
        synced.write(synced.overlay, f"write -P 7 {number + 1}M 64k")
    copy, copied = merge._copy_down, 0

    def counting(*what: Any) -> None:
        nonlocal copied
        copy(*what)
        copied += 1
        if copied == pieces:
            threading.Thread(target=synced.stage.release).start()
            assert synced.stage._merger._ending.wait(10)

    with monkeypatch.context() as patched:
        patched.setattr(merge, "_copy_down", counting)
        with pytest.raises(AgentError, match="can be repeated") as caught:
            synced.stage.merge()
    assert (caught.value.kind, copied) == (errors.INTERRUPTED, pieces)
    subprocess.run(["qemu-img", "info", "-f", synced.format, synced.base], check=True, capture_output=True)
    if synced.format == "qcow2":
        subprocess.run(["qemu-img", "check", "-f", "qcow2", synced.base], check=True, capture_output=True)
    synced.crash()
    synced.stage.merge()
    for at, byte in ((0, 2), (MIB, 7), (2 * MIB, 7), (3 * MIB, 7)):
        assert synced.reads(synced.base, synced.format, f"read -P {byte} {at} 64k")


@pytest.mark.parametrize("step", ["map_extents", "open_nbd"])
def test_a_path_with_lock_in_it_is_no_lock(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails otherwise is told at once, and not waited out."""
    pool = tmp_path / "blocks"
    pool.mkdir()
    synced = Synced(pool, "raw")
    tries = 0

    def failing(chained: Sequence[chain.Node], *more: object, **how: object) -> NoReturn:
        nonlocal tries
        tries += 1
        raise AgentError(errors.IO, f"qemu-img: Could not open '{chained[0].path}': Input/output error")

    monkeypatch.setattr(qemu, step, failing)
    with pytest.raises(AgentError, match="Input/output error") as caught:
        synced.stage.merge()
    assert (caught.value.kind, tries) == (errors.IO, 1)
    synced.stage.release()
