"""What an operation does to a directory, and that undoing it leaves the directory as it was."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import names
from kvm_clone.agent.disks import filesystem, qemu, reflink
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import leftovers, records, stage
from kvm_clone.agent.staging.hold import Hold
from kvm_clone.agent.staging.lock import WriterLock
from kvm_clone.agent.staging.stage import Stage

from .tools import KIB, MIB, ending, eventually, lacking, need, processes, python

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("locks")]

NAME = 'a VM\'s "name", with $(everything) but a slash'
RAW = {"format": "raw", "size": MIB + 1, "options": {}, "mode": 0o640, "user": "root", "group": "root"}
QCOW2 = {**RAW, "format": "qcow2", "size": MIB, "options": {"cluster_size": "4096", "compat": "1.1"}}


@pytest.fixture
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with files of others in it; see ANYWHERE."""
    options = getattr(request, "param", None)
    root = tmp_path if options is None else request.getfixturevalue("plain")(*options)
    directory: Path = root / "the pool's -directory"
    directory.mkdir()
    (directory / "other.qcow2").write_bytes(b"not ours")
    (directory / ".kvm-clone-0123456789abcdef.journal").write_bytes(b"another VM's")
    return directory


ANYWHERE = pytest.mark.parametrize(
    "pool", [None, ("no-links",), ("no-links", "no-owners", "no-modes", "dense")], ids=str, indirect=True
)
"""With hard links, by which a file can have both of its names, and without, where it has one at any time."""


def seen(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns, entry.read_bytes()) for entry in directory.iterdir()
    }


ABOUT = {"source": {"host": "elsewhere"}}


def begin(pool: Path, operation: str = "0f", discards: str = "") -> Stage:
    return Stage(str(pool), NAME, operation, ABOUT, directories=[str(pool)], discards=discards)


def finish_earlier(pool: Path, operation: str = "dead") -> None:
    """End an operation that has committed and whose run is gone."""
    Stage(str(pool), NAME, operation, {}, directories=[str(pool)], finishing=True).finish()


def recover(pool: Path, operation: str = "0f") -> list[str]:
    return leftovers.recover(str(pool), NAME, operation, [str(pool)])


def settle(pool: Path, *, committed: bool, operation: str = "dead") -> None:
    leftovers.record_outcome(str(pool), NAME, operation, [str(pool)], committed=committed)


def part_path(staged: Stage, disk: str, final: Path) -> str:
    return names.part_path(staged.operation, disk, str(final))


def test_a_whole_operation(pool: Path, locks: Path) -> None:
    need("qemu-img")
    before = seen(pool)
    staged = begin(pool)
    for disk, spec in (("vda", RAW), ("vdb", QCOW2)):
        final = str(pool / f"{disk}.img")
        part = staged.create(disk, final, spec)
        about = os.stat(part)
        assert os.path.dirname(part) == str(pool)
        assert about.st_mode & 0o777 == 0o640
        assert about.st_blocks * 512 < 512 * KIB
        staged.note(records.COPIED, {"disk": disk, "bytes": 0})
        staged.publish(disk, final)
        assert os.path.samestat(about, os.stat(final))
        assert not os.path.exists(part)
    staged.note(records.DEFINE, {"uuid": "u"})
    staged.note(records.COMMITTED, {})
    staged.finish()
    assert os.stat(pool / "vda.img").st_size == MIB + 1
    image = qemu.info(str(pool / "vdb.img"), "qcow2")
    assert (image["virtual-size"], image["cluster-size"]) == (MIB, 4096)
    after = seen(pool)
    assert set(after) - set(before) == {"vda.img", "vdb.img"}
    assert {name: after[name] for name in before} == before
    assert not list(locks.iterdir())


def defining(pool: Path) -> list[tuple[str, bool]]:
    """The operations on our VM that may have committed, and whether that is certain."""
    found = leftovers.staged([str(pool)], NAME)
    return [(entry["operation"], entry["committed"]) for entry in found if entry["defining"]]


Step = Callable[[Stage, Path], object]
STEPS: list[Step] = [
    lambda staged, pool: staged.create("vda", str(pool / "a name.img"), RAW),
    lambda staged, pool: staged.create("vdb", str(pool / "-n'\".qcow2"), QCOW2),
    lambda staged, pool: staged.note(records.COPIED, {"disk": "vda", "bytes": 1}),
    lambda staged, pool: staged.note(records.PROVEN, {"disk": "vda"}),
    lambda staged, pool: staged.publish("vda", str(pool / "a name.img")),
    lambda staged, pool: staged.publish("vdb", str(pool / "-n'\".qcow2")),
]


@ANYWHERE
@pytest.mark.parametrize("count", range(len(STEPS) + 1))
@pytest.mark.parametrize("how", ["undo", "abandon", "the next one"])
def test_undo_after_any_step(how: str, count: int, pool: Path, locks: Path) -> None:
    before = seen(pool)
    staged = begin(pool)
    for step in STEPS[:count]:
        step(staged, pool)
    if how == "undo":
        assert staged.undo() == []
    elif how == "abandon":
        staged.abandon()
    else:
        staged.release()
        assert defining(pool) == []
        begin(pool, "10", "0f").finish()
    assert seen(pool) == before
    assert not list(locks.iterdir())


class PowerCutError(BaseException):
    """The process ends here and does nothing more."""


CALLS = ["open", "truncate", "chmod", "chown", "link", "_rename", "unlink", "fsync", "write"]


@ANYWHERE
@pytest.mark.parametrize("call", CALLS)
def test_undo_after_a_crash_before_any_system_call(call: str, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen(pool)
    crashes = 0
    has_links = "plain" not in str(pool)
    for survived in range(100):
        staged = begin(pool, f"{survived:02x}")
        if not crash(staged, pool, call, survived, monkeypatch):
            assert staged.undo() == []
            break
        crashes += 1
        staged.release()
        begin(pool, "ff", staged.operation).undo()
        assert seen(pool) == before
    assert crashes > 0 or call == ("_rename" if has_links else "unlink")
    assert seen(pool) == before


def crash(staged: Stage, pool: Path, call: str, survived: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do the steps, but end before system call number `survived`; whether it came to that."""
    module = filesystem if call == "_rename" else os
    real, left = getattr(module, call), survived

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if not left:
            raise PowerCutError
        left -= 1
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, call, failing)
        try:
            for step in STEPS:
                step(staged, pool)
        except PowerCutError:
            return True
    return False


def test_create_refuses_a_name_that_is_taken(pool: Path) -> None:
    (pool / "dangling").symlink_to(pool / "nowhere")
    before = seen_names(pool)
    staged = begin(pool)
    for name in ("other.qcow2", "dangling"):
        with pytest.raises(AgentError) as caught:
            staged.create("vda", str(pool / name), RAW)
        assert caught.value.kind == errors.EXISTS
    staged.undo()
    assert seen_names(pool) == before


def seen_names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


@ANYWHERE
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_publish_never_overwrites(kind: str, pool: Path) -> None:
    final = pool / "disk.img"
    staged = begin(pool)
    staged.create("vda", str(final), RAW)
    if kind == "file":
        final.write_bytes(b"came in between")
    else:
        final.mkdir()
    about = os.lstat(final)
    with pytest.raises(AgentError, match=r"disk\.img") as caught:
        staged.publish("vda", str(final))
    assert caught.value.kind == errors.EXISTS
    assert staged.undo() == []
    assert os.path.samestat(os.lstat(final), about)
    if kind == "file":
        assert final.read_bytes() == b"came in between"
    assert seen_names(pool) == {"other.qcow2", ".kvm-clone-0123456789abcdef.journal", "disk.img"}


def test_publish_takes_a_link_to_nothing_for_something(pool: Path) -> None:
    final = pool / "disk.img"
    staged = begin(pool)
    staged.create("vda", str(final), RAW)
    final.symlink_to(pool / "nowhere")
    with pytest.raises(AgentError, match=r"disk\.img") as caught:
        staged.publish("vda", str(final))
    assert caught.value.kind == errors.EXISTS
    assert staged.undo() == []
    assert final.is_symlink()


@ANYWHERE
def test_undo_leaves_a_file_that_took_the_place_of_ours(pool: Path) -> None:
    final = pool / "disk.img"
    staged = begin(pool)
    staged.create("vda", str(final), RAW)
    staged.publish("vda", str(final))
    held = final.open("rb")  # keeps the inode's number from being used again
    final.unlink()
    final.write_bytes(b"another one's")
    assert staged.undo() == []
    held.close()
    assert final.read_bytes() == b"another one's"


HOLDER = """
import sys, time
from kvm_clone.agent import names
from kvm_clone.agent.staging import stage
pool, locks, name, then = sys.argv[1:]
names._lock_directory = lambda: locks
spec = {"format": "raw", "size": 4096, "options": {}, "mode": 0o600, "user": "root", "group": "root"}
staged = stage.Stage(pool, name, "dead", {"source": {"host": "elsewhere"}}, directories=[pool])
for disk in ("vda", "vdb"):
    staged.create(disk, f"{pool}/{disk}.img", spec)
staged.publish("vda", f"{pool}/vda.img")
for record in then.split():
    staged.note(record, {"disk": "vda"} if record in ("copied", "proven") else {})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(pool: Path, locks: Path) -> Iterator[subprocess.Popen[bytes]]:
    with ending(python(HOLDER, pool, locks, NAME, "")) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process


def dead(pool: Path, locks: Path, then: str) -> None:
    """Leave behind what a killed holder leaves."""
    with ending(python(HOLDER, pool, locks, NAME, then)) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_live_holder_is_named(holder: subprocess.Popen[bytes], pool: Path) -> None:
    before = seen(pool)
    acts: list[Callable[[], object]] = [
        lambda: begin(pool),
        lambda: settle(pool, committed=True),
        lambda: recover(pool, "dead"),
        lambda: finish_earlier(pool),
    ]
    for act in acts:
        with pytest.raises(AgentError, match=f"pid {holder.pid}, operation dead, source .*elsewhere") as caught:
            act()
        assert caught.value.kind == errors.LOCKED
    assert seen(pool) == before
    other = Stage(str(pool), "another VM", "10", {}, directories=[str(pool)])
    other.finish()


@ANYWHERE
def test_a_dead_holders_leftovers_are_undone(pool: Path, locks: Path) -> None:
    before = seen(pool)
    dead(pool, locks, "")
    assert len(seen(pool)) == len(before) + 3
    staged = begin(pool, "10", "dead")
    staged.create("vda", str(pool / "vda.img"), RAW)
    staged.undo()
    assert seen(pool) == before


@pytest.mark.parametrize(("then", "committed"), [("define", False), ("define committed", True)])
def test_what_may_have_been_committed_is_left_to_whoever_asks_libvirt(
    then: str, committed: bool, pool: Path, locks: Path
) -> None:
    dead(pool, locks, then)
    left = seen(pool)
    assert defining(pool) == [("dead", committed)]
    with pytest.raises(AgentError, match="libvirt has to be asked") as caught:
        begin(pool, discards="dead")
    assert caught.value.kind == errors.UNSUPPORTED
    assert seen(pool) == left


def test_what_has_committed_is_kept(pool: Path, locks: Path) -> None:
    before = seen_names(pool)
    dead(pool, locks, "define")
    settle(pool, committed=True)
    assert defining(pool) == [("dead", True)]
    finish_earlier(pool)
    assert leftovers.staged([str(pool)], NAME) == []
    assert "vda.img" in seen_names(pool) - before
    begin(pool).finish()


@pytest.mark.parametrize("then", ["", "copied", "proven"])
def test_finish_leaves_what_has_not_committed(then: str, pool: Path, locks: Path) -> None:
    dead(pool, locks, then)
    left = contents(pool)
    with pytest.raises(AgentError, match="libvirt has to be asked") as caught:
        finish_earlier(pool)
    assert caught.value.kind == errors.UNSUPPORTED
    assert contents(pool) == left


@pytest.mark.parametrize("how", ["recover", "the next one"])
def test_what_was_withdrawn_can_be_undone(how: str, pool: Path, locks: Path) -> None:
    before = seen(pool)
    dead(pool, locks, "define")
    with pytest.raises(AgentError, match="libvirt has to be asked"):
        recover(pool, "dead")
    settle(pool, committed=False)
    assert defining(pool) == []
    if how == "recover":
        assert recover(pool, "dead") == []
    else:
        begin(pool, discards="dead").finish()
    assert seen(pool) == before
    assert not list(locks.iterdir())


def test_nothing_is_staged_at_first(pool: Path) -> None:
    assert leftovers.staged([str(pool)], NAME) == []
    staged = begin(pool)
    (found,) = leftovers.staged([str(pool), str(pool)], NAME)
    assert (found["operation"], found["active"], found["defining"]) == ("0f", True, False)
    staged.finish()
    assert leftovers.staged([str(pool)], NAME) == []


def test_abandon_after_define_leaves_everything(pool: Path, locks: Path) -> None:
    staged = begin(pool)
    for step in STEPS:
        step(staged, pool)
    staged.note(records.DEFINE, {"uuid": "u"})
    with pytest.raises(AgentError, match="libvirt has to be asked"):
        staged.undo()
    left = seen_names(pool)
    staged.abandon()
    assert seen_names(pool) == left
    assert not list(locks.iterdir())
    assert defining(pool) == [("0f", False)]


def test_undo_past_the_commit_point(pool: Path) -> None:
    before = seen(pool)
    staged = begin(pool)
    for step in STEPS:
        step(staged, pool)
    staged.note(records.DEFINE, {"uuid": "u"})
    assert staged.undo(past_commit=True) == []
    assert seen(pool) == before


@pytest.fixture
def stuck(pool: Path) -> Iterator[Callable[[Path], None]]:
    """Make a file that even root cannot remove."""
    need("chattr")
    made: list[Path] = []

    def make(path: Path) -> None:
        if subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode:
            lacking("the filesystem or the user cannot make a file immutable")
        made.append(path)

    yield make
    for path in made:
        subprocess.run(["chattr", "-i", str(path)], check=False, capture_output=True)


@pytest.mark.parametrize("how", ["undo", "recover", "the next one", "abandon"])
def test_undo_goes_on_past_a_failure_and_keeps_the_journal(
    how: str, pool: Path, locks: Path, stuck: Callable[[Path], None]
) -> None:
    before = seen(pool)
    staged = begin(pool)
    parts = [Path(staged.create(disk, str(pool / f"{disk}.img"), RAW)) for disk in ("vda", "vdb", "vdc")]
    stuck(parts[1])
    if how == "undo":
        (said,) = staged.undo()
        assert str(parts[1]) in said
    elif how == "abandon":
        staged.abandon()
    elif how == "recover":
        staged.release()
        (said,) = recover(pool)
        assert str(parts[1]) in said
    else:
        staged.release()
        with pytest.raises(AgentError, match=parts[1].name):
            begin(pool, "10", "0f")
    assert [part.exists() for part in parts] == [False, True, False]
    assert not list(locks.iterdir())
    subprocess.run(["chattr", "-i", str(parts[1])], check=True)
    begin(pool, "11", "0f").finish()
    assert seen(pool) == before


def test_no_room_for_an_image(small: Path) -> None:
    fill(small, but=3)
    staged = begin(small)
    with pytest.raises(AgentError) as caught:
        staged.create("vda", str(small / "disk.img"), QCOW2)
    assert caught.value.kind == errors.NO_SPACE
    assert staged.undo() == []
    assert seen_names(small) == {"filler"}


def test_no_room_for_the_journal(small: Path, locks: Path) -> None:
    fill(small, but=0)
    with pytest.raises(AgentError, match=names.journal_path(str(small), NAME)) as caught:
        begin(small)
    assert caught.value.kind == errors.NO_SPACE
    assert seen_names(small) == {"filler"}
    assert not list(locks.iterdir())


def fill(directory: Path, but: int) -> None:
    """Leave `but` blocks."""
    space = os.statvfs(directory)
    (directory / "filler").write_bytes(bytes((space.f_bavail - but) * space.f_frsize))


def test_a_directory_that_is_not_there(tmp_path: Path, locks: Path) -> None:
    with pytest.raises(AgentError, match="nowhere") as caught:
        begin(tmp_path / "nowhere")
    assert caught.value.kind == errors.MISSING
    assert not list(locks.iterdir())


def test_an_operation_that_is_over(pool: Path) -> None:
    before = seen(pool)
    staged = begin(pool)
    staged.finish()
    for step in STEPS[:5]:
        with pytest.raises(AgentError):
            step(staged, pool)
    assert staged.undo() == []
    staged.finish()
    staged.abandon()
    assert seen(pool) == before


def test_a_damaged_journal_is_left_alone(pool: Path, locks: Path) -> None:
    begin(pool).release()
    path = Path(names.journal_path(str(pool), NAME))
    path.write_bytes(b"damaged\n" + path.read_bytes())
    before = seen(pool)
    for act in (
        lambda: begin(pool),
        lambda: recover(pool),
        lambda: settle(pool, committed=False),
    ):
        with pytest.raises(AgentError, match="damaged"):
            act()
    (found,) = leftovers.staged([str(pool)], NAME)
    assert "damaged" in found["error"]
    assert seen(pool) == before
    assert not list(locks.iterdir())


def test_abandon_waits_for_a_step_under_way(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run side by side, and the controller may go away in the midst of one."""
    before = seen(pool)
    staged = begin(pool)
    begun, go_on = threading.Event(), threading.Event()
    real = qemu.create

    def slowly(*arguments: Any) -> None:
        begun.set()
        go_on.wait(10)
        real(*arguments)

    monkeypatch.setattr(qemu, "create", slowly)
    steps = threading.Thread(target=lambda: staged.create("vda", str(pool / "disk.img"), QCOW2))
    steps.start()
    begun.wait(10)
    end = threading.Thread(target=staged.abandon)
    end.start()
    end.join(0.3)
    go_on.set()
    steps.join()
    end.join()
    assert seen(pool) == before
    with pytest.raises(AgentError, match="over"):
        staged.create("vdb", str(pool / "second.img"), RAW)
    assert seen(pool) == before


def test_owner_and_mode(pool: Path) -> None:
    if os.geteuid() != 0:
        lacking("giving files away needs root")
    staged = begin(pool)
    for user, expected in (("daemon", 1), ("nobody-has-this-name", 0)):
        part = staged.create(user, str(pool / user), {**RAW, "mode": 0o604, "user": user, "group": user})
        about = os.stat(part)
        assert (about.st_uid, about.st_gid, about.st_mode & 0o7777) == (expected, expected, 0o604)
    staged.undo()


def test_a_killed_holder_frees_its_lock_even_while_its_child_lives(pool: Path, locks: Path) -> None:
    dead(pool, locks, "")
    assert eventually(lambda: not processes(str(pool)))
    begin(pool, discards="dead").undo()


def resumed(pool: Path, operation: str = "0f", *, keep: bool = False) -> Stage:
    return Stage(str(pool), NAME, operation, ABOUT, directories=[str(pool)], resume=True, keep=keep)


def summary(pool: Path) -> dict[str, Any]:
    (found,) = leftovers.staged([str(pool)], NAME)
    return found


@pytest.mark.parametrize(
    "told, found",
    [
        ([[0, 4096]], [(0, 4096)]),
        ([[0, 4096], [8192, MIB]], [(0, 4096), (8192, MIB)]),
        ([[8192, MIB]], [(8192, MIB)]),
        ([[0, 4096], [8192, 1 << 40]], [(0, 4096), (8192, RAW["size"])]),
        ([], []),
    ],
)
def test_ranges_are_durable(told: list[list[int]], found: list[tuple[int, int]], pool: Path) -> None:
    staged = begin(pool)
    staged.create("vda", str(pool / "a.img"), RAW)
    staged.note(records.DURABLE, records.durable("vda", told))
    staged.release()
    state = summary(pool)["disks"]["vda"]
    assert state["ranges"] == found
    assert state["durable"] == sum(end - start for start, end in found)


@pytest.mark.parametrize("what", ["overlay", "copy"])
def test_what_may_stay_unchanged_is_durable_when_it_is_made(
    what: str, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pool / "base.img"
    base.write_bytes(bytes(MIB))
    monkeypatch.setattr(reflink, "clone", lambda source, fd: os.write(fd, Path(source).read_bytes()))
    synced: set[int] = set()
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    spec = {**QCOW2, "backing": [str(base), "raw"]} if what == "overlay" else {**RAW, "size": MIB, "copy_of": str(base)}
    staged = begin(pool)
    part = staged.create("vda", str(pool / "a.img"), spec)
    assert os.stat(part).st_ino in synced
    staged.undo()


FINALS = {"vda": "a name.img", "vdb": "-n'\".qcow2"}
SPECS = {"vda": RAW, "vdb": QCOW2}
HALFWAY: list[Step] = [
    *STEPS[:2],
    lambda staged, pool: staged.note(records.DURABLE, {"disk": "vda", "end": 4096}),
    lambda staged, pool: staged.note(records.DURABLE, {"disk": "vda", "end": MIB + 1}),
    lambda staged, pool: staged.note(records.DURABLE, {"disk": "vda", "end": 8192}),  # what a mended range reports
    *STEPS[2:],
]
DURABLE = [0, 0, 0, 4096, MIB + 1, MIB + 1, MIB + 1, MIB + 1, MIB + 1, MIB + 1]


def end_it(staged: Stage, pool: Path) -> None:
    """Whatever is there already, end with both disks published."""
    for disk, name in FINALS.items():
        if not os.path.exists(part_path(staged, disk, pool / name)):
            staged.create(disk, str(pool / name), SPECS[disk])
        staged.publish(disk, str(pool / name))
    staged.note(records.DEFINE, {"uuid": "u", "remove": []})
    staged.note(records.COMMITTED, {})
    staged.finish()


@ANYWHERE
@pytest.mark.parametrize("count", range(len(HALFWAY) + 1))
def test_resume_after_any_step(count: int, pool: Path, locks: Path) -> None:
    before = seen(pool)
    first = begin(pool)
    for step in HALFWAY[:count]:
        step(first, pool)
    inodes = {disk: about.st_ino for disk, about in files_of(first, pool).items()}
    first.release()
    disks = summary(pool)["disks"]
    assert {disk: state["durable"] for disk, state in disks.items()} == dict(
        [("vda", DURABLE[count]), ("vdb", 0)][:count]
    )
    again = resumed(pool)
    assert [name for name in FINALS.values() if (pool / name).exists()] == []
    assert {disk: about.st_ino for disk, about in files_of(again, pool).items()} == inodes
    assert summary(pool)["disks"] == disks
    end_it(again, pool)
    after = seen(pool)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(FINALS.values())
    assert not list(locks.iterdir())


@pytest.mark.parametrize("lasting", [True, False])
def test_a_published_file_is_known_again_where_inode_numbers_do_not_last(
    lasting: bool, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT gives a file another number when the kernel has forgotten it, as after a reboot."""
    if not lasting:
        here = filesystem.kind(pool.stat().st_dev)
        monkeypatch.setattr(filesystem, "_PASSING_INODES", (here,))
    first, final = begin(pool), pool / FINALS["vda"]
    first.create("vda", str(final), RAW)
    first.publish("vda", str(final))
    first.release()
    shutil.copy2(final, pool / "same")
    about = final.stat()
    os.utime(pool / "same", ns=(about.st_atime_ns, about.st_mtime_ns))
    (pool / "same").rename(final)
    again = resumed(pool)
    assert final.exists() == lasting, "where numbers last it is another one's file"
    assert os.path.exists(part_path(again, "vda", final)) != lasting
    again.undo()
    assert final.exists() == lasting


def files_of(staged: Stage, pool: Path) -> dict[str, os.stat_result]:
    """Each disk's file, staged or published."""
    found = {}
    for disk, name in FINALS.items():
        for path in (str(pool / name), part_path(staged, disk, pool / name)):
            if os.path.exists(path):
                found[disk] = os.stat(path)
    return found


@ANYWHERE
@pytest.mark.parametrize("call", ["link", "_rename", "unlink", "fsync", "write", "ftruncate", "open"])
@pytest.mark.parametrize("then", ["resume", "undo"])
def test_a_crash_while_resuming(then: str, call: str, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen(pool)
    for survived in range(50):
        first = begin(pool, f"{survived:02x}")
        for step in HALFWAY:
            step(first, pool)
        first.release()
        with open(names.journal_path(str(pool), NAME), "ab") as file:
            file.write(b"a torn ta")
        crashed = dies(functools.partial(resumed, pool, f"{survived:02x}"), call, survived, monkeypatch)
        if then == "undo":
            assert recover(pool, f"{survived:02x}") == []
        else:
            again = resumed(pool, f"{survived:02x}")
            assert [name for name in FINALS.values() if (pool / name).exists()] == []
            assert set(files_of(again, pool)) == set(FINALS)
            end_it(again, pool)
            for name in FINALS.values():
                (pool / name).unlink()
        assert seen(pool) == before
        if not crashed:
            assert survived or call == ("unlink" if "plain" in str(pool) else "_rename"), (
                "only this is not called at all"
            )
            return
    raise AssertionError("resuming takes no end")


def dies(act: Callable[[], Stage], call: str, survived: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Act, but end before system call number `survived`; whether it came to that. What is locked is let go."""
    module = filesystem if call == "_rename" else os
    real, left = getattr(module, call), survived

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise PowerCutError
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, call, failing)
        try:
            staged = act()
        except PowerCutError:
            return True
    staged.release()
    return False


def contents(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


@pytest.mark.parametrize(
    ("prepare", "kind"),
    [
        (lambda pool: None, errors.MISSING),
        (lambda pool: begin(pool, "another").release(), errors.LOCKED),
        (lambda pool: Path(names.journal_path(str(pool), NAME)).write_bytes(b""), errors.MISSING),
        (lambda pool: begin(pool).note(records.DEFINE, {"uuid": "u"}), errors.LOCKED),
    ],
    ids=["nothing", "another operation's", "an empty one", "a living one"],
)
def test_what_cannot_be_resumed(prepare: Callable[[Path], object], kind: str, pool: Path) -> None:
    held = prepare(pool)
    before = contents(pool)
    with pytest.raises(AgentError) as caught:
        resumed(pool)
    assert (caught.value.kind, contents(pool)) == (kind, before)
    del held


def test_a_resumed_attempt_is_not_resumed_in_the_midst_of_its_commit(pool: Path) -> None:
    staged = begin(pool)
    for step in STEPS:
        step(staged, pool)
    staged.note(records.DEFINE, {"uuid": "u"})
    staged.release()
    before = contents(pool)
    with pytest.raises(AgentError, match="libvirt has to be asked"):
        resumed(pool)
    assert contents(pool) == before
    settle(pool, committed=False, operation="0f")
    end_it(resumed(pool), pool)


def test_a_receiver_that_outlives_its_operation_is_waited_for(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = begin(pool)
    part = staged.create("vda", str(pool / "vda.img"), RAW)
    staged.release()
    writer = WriterLock(part)
    threading.Timer(0.3, writer.release).start()
    resumed(pool).release()
    writer = WriterLock(part)
    monkeypatch.setattr(stage, "_LINGERING", 0.1)
    left = contents(pool)
    with pytest.raises(AgentError, match="receiver of the interrupted attempt still writes") as caught:
        resumed(pool)
    assert caught.value.kind == errors.LOCKED
    assert contents(pool) == left
    writer.release()
    resumed(pool).undo()


def test_resume_leaves_a_file_that_took_the_place_of_ours(pool: Path) -> None:
    staged = begin(pool)
    for step in STEPS:
        step(staged, pool)
    staged.release()
    final = pool / FINALS["vda"]
    held = final.open("rb")  # keeps the inode's number from being used again
    final.unlink()
    final.write_bytes(b"another one's")
    resumed(pool).undo()
    held.close()
    assert final.read_bytes() == b"another one's"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_abandon_keeps_what_is_to_be_kept(keep: bool, resume: bool, pool: Path, locks: Path) -> None:
    before = seen_names(pool)
    staged = Stage(str(pool), NAME, "0f", {}, directories=[str(pool)], keep=keep)
    staged.create("vda", str(pool / "disk.img"), RAW)
    if resume:
        staged.release()
        staged = resumed(pool, keep=keep)
    left = seen_names(pool)
    staged.abandon()
    assert seen_names(pool) == (left if keep else before)
    assert not list(locks.iterdir())


@pytest.mark.parametrize("how", ["finish", "finish of an earlier one"])
def test_finish_removes_staged_files_that_were_not_part_of_it(how: str, pool: Path) -> None:
    before = seen_names(pool)
    staged = begin(pool)
    for disk in ("vda", "gone"):
        staged.create(disk, str(pool / f"{disk}.img"), RAW)
    staged.publish("vda", str(pool / "vda.img"))
    staged.note(records.DEFINE, {"uuid": "u"})
    if how == "finish":
        staged.note(records.COMMITTED, {})
        staged.finish()
    else:
        staged.release()
        settle(pool, committed=True, operation="0f")
        finish_earlier(pool, "0f")
    assert seen_names(pool) - before == {"vda.img"}


def test_settling_again_and_otherwise(pool: Path, locks: Path) -> None:
    """What libvirt says last counts: a VM may be undefined after its commit was settled."""
    dead(pool, locks, "define")
    for committed in (True, True, False):
        settle(pool, committed=committed)
        assert (summary(pool)["defining"], summary(pool)["committed"]) == (committed, committed)
    left = contents(pool)
    settle(pool, committed=True)  # nothing is open any more
    with pytest.raises(AgentError, match="libvirt has to be asked"):
        finish_earlier(pool)
    assert contents(pool) == left
    assert recover(pool, "dead") == []
    with pytest.raises(FileNotFoundError):
        settle(pool, committed=True)


def test_what_is_staged_beside_journals_that_say_nothing(pool: Path) -> None:
    for name, content in (("empty", b""), ("torn", b"0000"), ("damaged", b"damaged\n" * 2)):
        Path(names.journal_path(str(pool), name)).write_bytes(content)
    staged = begin(pool)
    staged.create("vda", str(pool / "vda.img"), RAW)
    found = leftovers.staged([str(pool), str(pool), str(pool / "nowhere")])
    assert [entry["name"] for entry in found if "error" not in entry] == [NAME]
    # The empty one and the torn ones, of which the pool has one of its own, are nothing.
    assert [(entry["path"], "damaged" in entry["error"]) for entry in found if "error" in entry] == [
        (names.journal_path(str(pool), "damaged"), True)
    ]
    staged.undo()


def test_what_a_define_says_is_to_be_removed(pool: Path) -> None:
    staged = begin(pool)
    staged.note(records.DEFINE, {"uuid": "u", "remove": ["/old"]})
    assert summary(pool)["remove"] == ["/old"]
    staged.note(records.WITHDRAWN, {})
    staged.note(records.DEFINE, {"uuid": "u", "remove": ["/new"]})
    assert summary(pool)["remove"] == ["/new"]
    staged.undo(past_commit=True)


def test_remove_files(pool: Path) -> None:
    (pool / "directory").mkdir()
    (pool / "link").symlink_to(pool / "other.qcow2")
    (pool / "old").write_bytes(b"x")
    held = Hold(NAME, {})
    paths = [str(pool / name) for name in ("old", "missing", "directory", "link")]
    answers = held.remove([{"path": path, "identity": file_id(path)} for path in paths])
    assert [answer["path"] for answer in answers] == paths
    assert [answer["result"] for answer in answers] == ["removed", "missing", "error", "removed"]
    assert answers[2]["error"]
    assert seen_names(pool) >= {"other.qcow2", "directory"}
    assert not {"old", "link"} & seen_names(pool)
    assert held.remove([]) == []
    held.release()


def file_id(path: str) -> str:
    """Device and inode, as what is to be removed is named by."""
    if not os.path.lexists(path):
        return ""
    about = os.lstat(path)
    return f"{about.st_dev}:{about.st_ino}"


# What is told of a directory that holds much.


def test_so_many_journals_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "MOST_JOURNALS", 3)
    torn = b"torn\n" * 3
    for number in range(3):
        (tmp_path / f".kvm-clone-{number}.journal").write_bytes(torn)
    (tmp_path / ".kvm-clone-x.part").touch()
    (tmp_path / "other.journal").touch()
    assert [Path(one["path"]).name for one in leftovers.staged([str(tmp_path)])] == [
        f".kvm-clone-{number}.journal" for number in range(3)
    ]
    (tmp_path / ".kvm-clone-3.journal").write_bytes(torn)
    *found, last = leftovers.staged([str(tmp_path)])
    assert len(found) == 3
    assert (last["path"], "more than 3 journals" in last["error"]) == (str(tmp_path), True)


def test_a_directory_that_cannot_be_looked_into_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    [said] = leftovers.staged([str(tmp_path / "loop"), str(tmp_path / "file"), str(tmp_path / "missing")])
    assert (said["path"], said["error"]) == (str(tmp_path / "loop"), "Too many levels of symbolic links")
    assert leftovers.staged([str(tmp_path / "loop")], "web") == []
