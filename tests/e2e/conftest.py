"""The lab as a fixture: two libvirt hosts that every end-to-end test shares."""

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
    state = Path(os.environ.get("KVM_CLONE_LAB_STATE") or REPOSITORY / ".lab").resolve()
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


def _unavailable(reason: str) -> None:
    """Skip; but where nobody reads the reasons of skipped tests, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
