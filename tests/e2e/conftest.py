"""The lab as a fixture: two libvirt hosts that all end-to-end tests of one process share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from labclient import REPOSITORY, Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Give the lab, up; it is taken down at the end if it was down before."""
    if os.geteuid() != 0:
        _unavailable("the lab needs root")
    state = _state()
    here = Lab(state)
    was_up = (state / "ssh_config").exists()
    done = here.command("up", check=False)
    if done.returncode != 0:
        _unavailable(f"lab/lab up: {done.stderr.strip()}")
    try:
        yield here
    finally:
        if not was_up:
            here.command("down")


def _state() -> Path:
    """The lab's directory: each process of pytest-xdist has a lab of its own, beside the one for people."""
    state = Path(os.environ.get("KVM_CLONE_LAB_STATE") or REPOSITORY / ".lab").resolve()
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return state.with_name(f"{state.name}-{worker}") if worker else state


def _unavailable(reason: str) -> None:
    """Skip; but where nobody reads the reasons of skipped tests, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
