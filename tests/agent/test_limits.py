"""Agents on hosts with tight limits: an answer or one line, and an end."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvm_clone.agent import __main__ as entry
from kvm_clone.agent.host import peer
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.wire import pack_frame
from kvm_clone.hosts import payload

from .test_loader import WHOLE, Agent, Frame
from .tools import ending, lacking, make_qcow2, make_raw, need

pytestmark = pytest.mark.timeout(60)

NOBODY = 54321
"""A user who has no other process: root is held to no number of them."""


@contextmanager
def limited(limits: str, *frames: Frame, user: bool = False, python: str = sys.executable) -> Iterator[Agent]:
    """An agent under the shell's limits."""
    need("bash")
    argv = ["bash", "-c", f"{limits}; {payload.remote_command(python)}"]
    if user:
        need("setpriv")
        argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *argv]
    pipe = subprocess.PIPE
    with ending(subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, cwd="/")) as process:
        running = Agent(process)
        running.write(WHOLE + b"".join(map(pack_frame, frames)))
        yield running


LOADERS = {
    "no file may grow": "ulimit -f 0",
    "files of 10 KiB": "ulimit -f 10",
    "20 MB of memory": "ulimit -v 20000",
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_cannot_load_says_so_in_one_line(name: str) -> None:
    system = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    with limited(LOADERS[name], {"mode": "control"}, python=system) as running:
        status, said = running.end()
    assert status == 1
    assert said.startswith("kvm-clone: the agent cannot run here: ")
    assert said.count("\n") == 1


CALLS: list[tuple[str, Frame]] = [
    ("host", {}),
    ("disk", {"path": "{}/disk", "image_format": "qcow2"}),
    ("directory", {"path": "{}"}),
    ("lock_image", {"path": "{}/disk", "image_format": "raw"}),
    ("stage", {"directory": "{}", "name": "{}", "operation": "0f", "about": {}, "directories": []}),
    ("ranges_of", {"path": "{}/disk", "image_format": "qcow2", "data": True}),
    ("probe", {"ssh": ["ssh", "-F", "/dev/null", "-p", "1", "--", "127.0.0.1"], "known_hosts": "x"}),
    ("staged", {"directories": ["{}"]}),
    ("ping", {}),
]

LIMITS = [*(f"ulimit -n {count}" for count in (6, 8, 9, 10, 12, 16)), "ulimit -v 45000", "ulimit -v 80000"]


@pytest.mark.parametrize("limits", LIMITS)
def test_an_agent_answers_every_call(limits: str, tmp_path: Path) -> None:
    make_qcow2(tmp_path / "disk", 1 << 20)
    where = {"{}": str(tmp_path), "{}/disk": str(tmp_path / "disk")}
    name = f"limited {uuid.uuid4()}"
    with limited(limits, {"mode": "control"}) as running:
        running.ready()
        for call, about in CALLS:
            given = {key: where.get(value, value) if isinstance(value, str) else value for key, value in about.items()}
            given.update({"name": name} if "name" in given else {})
            given.update({"directories": [str(tmp_path)]} if "directories" in given else {})
            answer = running.call(call, **given)
            assert answer["id"] == 1
            kind = answer.get("error", {}).get("kind", errors.LIMIT)
            assert kind in (errors.LIMIT, errors.IO), answer
        status, said = running.end()
    assert status == 0, said
    assert "Traceback" not in said
    assert {entry.name for entry in tmp_path.iterdir()} == {"disk"}


def test_an_agent_that_may_have_no_thread_answers() -> None:
    system = shutil.which("python3", path="/usr/bin:/bin")
    if system is None:
        lacking("there is no python3 that another user may run")
    with limited("ulimit -u 1", {"mode": "control"}, user=True, python=system) as running:
        running.ready()
        for call in ("ping", "host", "nonsense"):
            error = running.call(call)["error"]
            assert error["kind"] == errors.LIMIT
            assert "can't start new thread" in error["message"]
        assert running.end() == (0, "")


@pytest.mark.parametrize("limits", ["ulimit -u 1", "ulimit -n 6"])
def test_a_receiver_under_limits_ends_with_one_error(limits: str, tmp_path: Path) -> None:
    system = shutil.which("python3", path="/usr/bin:/bin")
    if system is None:
        lacking("there is no python3 that another user may run")
    staged = make_raw(tmp_path / "staged", 1 << 20)
    request = {"mode": "receive", "vm": "limited", "jobs": 4 * [{"path": str(staged), "format": "raw"}]}
    with limited(limits, request, user="-u" in limits, python=system) as running:
        running.stdin.close()
        answers = running.stdout.read()
        status, said = running.end()
    assert status == 3
    assert "Traceback" not in said
    assert answers.count(b'{"error":{"kind":"limit"') + said.count("the host's limits forbid it") == 1


@pytest.mark.parametrize("looks", [["x", None, "x", ""], [None, None, "x", None, "y"]], ids=str)
def test_a_receiver_that_cannot_look_at_its_operation_looks_again(
    looks: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(looks)

    def holder_of(_: str) -> str:
        found = left.pop(0)
        if found is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return found

    ends: list[int] = []
    monkeypatch.setattr(entry, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(entry, "holder_of", holder_of)
    monkeypatch.setattr(os, "_exit", ends.append)
    entry._exit_with_operation("lock")
    assert (left, ends) == ([], [entry.FAILED])


def test_a_probe_that_cannot_start_ssh_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peer.probe(["ssh", "--", "nobody"], "") == {
        "error": "the program ssh is not installed on this host",
        "rate": 0.0,
    }
