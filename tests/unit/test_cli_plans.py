"""Saved plans: what is no plan, or not one of ours, and places where none can be read or written."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from clihelp import Run, in_this_process, own_home, there  # noqa: F401 - fixtures

from kvm_clone.cli import plans
from kvm_clone.client import Request
from kvm_clone.errors import ExitCode, UsageError
from kvm_clone.options import CloneOptions, Route

CLONE = CloneOptions(new_name="copy", pool="fast", route=Route.RELAY, timeout=1.5, bandwidth_limit=7, retries=0)
SAVED = plans.document(Request("kc-a", "kc-b", "web", CLONE), Case().plan(), {})


def test_a_plan_through_a_pipe() -> None:
    source, into = os.pipe()
    writer = threading.Thread(target=plans._save, args=(Path(f"/dev/fd/{into}"), {**SAVED, "padding": "x" * 300_000}))
    writer.start()
    try:
        threading.Timer(0.5, os.close, [into]).start()
        assert plans.read(Path(f"/dev/fd/{source}"))[0] == Request("kc-a", "kc-b", "web", CLONE)
    finally:
        os.close(source)
        writer.join()


def changed(*keys: str, to: Any) -> bytes:
    document = copy.deepcopy(SAVED)
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return json.dumps(document).encode()


NO_PLANS = {
    "nested deep": b"[" * 1_000_000,
    "nested deep within": json.dumps(SAVED).encode()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[1]",
    "a number": b"3",
    "no options": changed("request", "options", to=None),
    "an option more": changed("request", "options", "colour", to="red"),
    "the other command": changed("request", "command", to="sync"),
    "a host that is a list": changed("request", "source", to=["kc-a"]),
    "a VM without a name": changed("request", "vm", to=" "),
    "a number in words": changed("request", "options", "parallel", to="many"),
    "a route of another kind": changed("request", "options", "route", to="scenic"),
    "a pool that is a number": changed("request", "options", "pool", to=7),
}


@pytest.mark.parametrize("what", NO_PLANS)
def test_what_is_no_plan(here: Run, tmp_path: Path, what: str) -> None:
    file = tmp_path / "web.plan"
    file.write_bytes(NO_PLANS[what])
    done = here("apply", str(file))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert done.err.splitlines()[0] == f"kvm-clone: {file} is not a saved plan"


@pytest.mark.parametrize(
    ("option", "value"),
    [("parallel", 0), ("retries", -1), ("bandwidth_limit", 0), ("timeout", 0), ("timeout", -1), ("new_name", "")],
)
def test_options_out_of_range(here: Run, tmp_path: Path, option: str, value: Any) -> None:
    """By a plan, or from Python."""
    file = tmp_path / "web.plan"
    file.write_bytes(changed("request", "options", option, to=value))
    done = here("apply", str(file))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert option in done.err.splitlines()[0]
    with pytest.raises(UsageError, match=option):
        CloneOptions(**{option: value})


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, large, lambda path: path.symlink_to("/dev/zero")])
def test_a_plan_without_end(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "web.plan")
    started = time.monotonic()
    done = there("apply", str(tmp_path / "web.plan"))
    assert time.monotonic() - started < 20
    assert (done.code, done.out, len(done.err.splitlines())) == (ExitCode.USAGE, "", 2)
    assert f"cannot read the plan {tmp_path}/web.plan: " in done.err


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/full")])
def test_a_place_that_takes_no_plan(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """A FIFO that nobody reads is not waited for."""
    make(tmp_path / "web.plan")
    with pytest.raises(UsageError, match=f"cannot write the plan to {tmp_path}/web.plan: "):
        plans._save(tmp_path / "web.plan", SAVED)
