"""Children of the agent: what they print, and that they end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm_clone.agent import process
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .tools import ending, eventually, processes, python

pytestmark = pytest.mark.timeout(60)


def test_output_that_is_not_utf_8() -> None:
    assert os.fsencode(process.run(["printf", r"a\377b\303\244"])) == b"a\xffb\xc3\xa4"


def test_last_words_that_are_not_utf_8() -> None:
    with pytest.raises(AgentError, match="sh: a\ufffdb") as caught:
        process.run(["sh", "-c", r"printf 'first\na\377b\n' >&2; exit 1"])
    assert caught.value.kind == errors.IO


@pytest.mark.parametrize(("said", "kind"), [("No space left on device", errors.NO_SPACE), ("what else", errors.IO)])
def test_how_it_failed(said: str, kind: str) -> None:
    with pytest.raises(AgentError, match=said) as caught:
        process.run(["sh", "-c", f"echo {said} >&2; exit 1"])
    assert caught.value.kind == kind


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(AgentError, match="not installed") as caught:
        process.run(["kvm-clone-no-such-program"])
    assert caught.value.kind == errors.MISSING


SLEEPERS = {
    "a child": 'exec sleep "$1"',
    "a child that leaves one of its own": 'sleep "$1" & wait',
    "a child that prints without end": "while :; do echo line; sleep 0.01; done",
    "a child that ignores signals": "trap '' TERM INT HUP; while :; do sleep 0.1; done",
}


@pytest.mark.parametrize("which", SLEEPERS)
def test_a_child_that_does_not_end(which: str) -> None:
    mark = f"4711.{random.randrange(10**9)}"
    started = time.monotonic()
    try:
        with pytest.raises(AgentError, match=r"^sh did not end within 0 s") as caught:
            process.run(["sh", "-c", SLEEPERS[which], "sh", mark], 0.3)
        took, left = time.monotonic() - started, len(processes(mark))
    finally:
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)  # a grandchild is nobody's that we could end
    assert caught.value.kind == errors.IO
    assert took < 5
    assert left == (1 if "of its own" in which else 0)


def ended_after(act: Callable[[], object], seconds: float) -> float:
    """How long the act takes when its children's end is asked for after so long; seconds."""
    ending = threading.Event()
    timer = threading.Timer(seconds, ending.set)
    started = time.monotonic()
    timer.start()
    try:
        with process.killed_by(ending):
            act()
    finally:
        timer.cancel()
        timer.join()
    return time.monotonic() - started


def test_a_child_is_killed_when_its_end_is_asked_for() -> None:
    mark = f"4711.{random.randrange(10**9)}"

    def act() -> None:
        for _ in range(2):  # one that is started after that is killed too
            with pytest.raises(AgentError, match="sleep: ended with status -9"):
                process.run(["sleep", mark])

    assert ended_after(act, 0.1) < 10
    assert not processes(mark)


def test_a_child_that_ends_soon_is_not_killed() -> None:
    ended_after(lambda: process.run(["sleep", "0.5"]), 0.0)


def test_a_child_of_another_thread_or_time_is_not_killed() -> None:
    earlier = process.start(["sleep", "60"])
    others = []

    def act() -> None:
        thread = threading.Thread(target=lambda: others.append(process.run(["sleep", "2.5"])))
        thread.start()
        with pytest.raises(AgentError, match="-9"):
            process.run(["sleep", "60"])
        thread.join()

    try:
        ended_after(act, 0.0)
        later = process.run(["sleep", "1.5"])
        assert (earlier.poll(), others, later) == (None, [""], "")
    finally:
        process.end(earlier)


def test_what_is_not_told_otherwise_has_a_limit() -> None:
    assert process.run.__defaults__ == (process.SECONDS,)
    assert 0 < process.SECONDS <= 120


PARENT = """
import sys, time
from kvm_clone.agent import process
process.start(["sleep", sys.argv[1]])
print("ready", flush=True)
time.sleep(60)
"""


def programs(directory: Path, setpriv: str | None) -> str:
    """A PATH with the programs that the parent and its child need, and that setpriv."""
    for name in ("sleep", "true", "sh", *(["setpriv"] if setpriv == "the host's" else [])):
        (directory / name).symlink_to(shutil.which(name) or pytest.fail(name))
    if setpriv not in (None, "the host's"):
        (directory / "setpriv").write_text(f"#!/bin/sh\n{setpriv}\n")
        (directory / "setpriv").chmod(0o755)
    return str(directory)


def sleeping(mark: str) -> bool:
    """Whether what watches the child has made way for it."""
    return any(Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0") for pid in processes(mark))


@pytest.mark.parametrize("setpriv", ["the host's", None, "echo unknown option >&2; exit 1"])
def test_a_child_dies_with_its_parent(setpriv: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on hosts whose setpriv is older than util-linux 2.33, and on those that have none."""
    mark = f"4711.{random.randrange(10**9)}"
    monkeypatch.setenv("PATH", programs(tmp_path, setpriv))
    with ending(python(PARENT, mark)) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        assert eventually(lambda: sleeping(mark))
        parent.kill()
        parent.wait()
        assert eventually(lambda: not processes(mark))


def test_a_setpriv_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(process, "SECONDS", 0.5)
    process._watcher.cache_clear()
    try:
        assert process._watcher()[1:3] == ("-I", "-S")
    finally:
        process._watcher.cache_clear()
