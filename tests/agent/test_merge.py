"""What a sync leaves after its commit: overlays written into the images below, and who may have used them."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm_clone.agent import errors, facts, journal, merge, qemu, stage
from kvm_clone.agent.errors import AgentError

from .tools import need

pytestmark = pytest.mark.timeout(60)

NAME = "web"
SIZE = 4 << 20


class Synced:
    """A VM of one disk, whose sync has just committed."""

    def __init__(self, pool: Path, format_: str) -> None:
        self.pool = pool
        self.base, self.overlay, self.format = pool / "web.img", pool / "kvm-clone-op-vda.qcow2", format_
        subprocess.run(["qemu-img", "create", "-q", "-f", format_, self.base, str(SIZE)], check=True)
        self.write(self.base, "write -P 1 0 1M", format_)
        self.stage = stage.Stage(str(pool), NAME, "op", {}, keep=True)
        spec = {
            "format": "qcow2",
            "size": SIZE,
            "options": {},
            "mode": 0o600,
            "user": pwd.getpwuid(os.geteuid())[0],
            "group": grp.getgrgid(os.getegid())[0],
            "backing": [str(self.base), format_],
        }
        part = self.stage.create("vda", str(self.overlay), spec)
        self.write(Path(part), "write -P 2 0 64k", "write -z 512k 64k")
        self.stage.publish("vda", str(self.overlay))
        merge = [{"disk": "vda", "path": str(self.overlay), "base": str(self.base), "base_format": format_}]
        images = {"vda": [str(self.overlay), facts.fingerprint(str(self.overlay))]}
        self.stage.note(journal.DEFINE, {"uuid": "", "remove": [], "forget": [], "images": images, "merge": merge})
        self.stage.note(journal.COMMITTED, {})

    def write(self, path: Path, *commands: str) -> None:
        """Commands of qemu-io; the last word may be the image's format."""
        *words, last = commands
        words, format_ = (words, last) if last in ("raw", "qcow2") else ([*commands], "qcow2")
        argv = ["qemu-io", "-f", format_, *(one for word in words for one in ("-c", word)), str(path)]
        subprocess.run(argv, check=True, capture_output=True)

    def reads(self, path: Path, format_: str, command: str) -> bool:
        """Whether qemu-io finds the pattern."""
        argv = ["qemu-io", "-r", "-f", format_, "-c", command, str(path)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        return "failed" not in done.stdout + done.stderr

    def crash(self) -> None:
        """End this process's part of it, and take it up as the next run does."""
        self.stage.release()
        self.stage = stage.Stage(str(self.pool), NAME, "op", {}, finishing=True)


@pytest.fixture(params=["raw", "qcow2"])
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Synced]:
    need("qemu-img", "qemu-io")
    monkeypatch.setattr(stage, "_LOCK_DIRECTORIES", (str(tmp_path),))
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
    assert synced.stage.seal() == {"vda": facts.fingerprint(str(synced.base))}
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
    disk = qemu.open_nbd(str(path), format_, writable=True)
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
    qemu.create(str(path), "qcow2", SIZE, over, (str(base), format_))
    _write_pieces(path, "qcow2", b"\2", 4)
    for lock in merge.merge(merge.Overlay("vda", str(path), str(base), format_)):
        lock.release()
    assert _room(base) <= before + (64 << 10)
    expected = bytearray(SIZE)
    for at in range(0, SIZE, APART):
        expected[at : at + PIECE] = (b"\1" if at % (4 * APART) else b"\2") * PIECE
    disk = qemu.open_nbd(str(base), format_, writable=False)
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
        merge.merge(merge.Overlay("vda", str(path), str(base), "raw"))
    assert base.read_bytes() == before
    qemu.open_nbd(str(path), "qcow2", writable=True).close()  # its lock is gone


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
    other = qemu.open_nbd(str(synced.overlay), "qcow2", writable=True)
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
