"""Fixtures of the agent's suites."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_clone.agent import stream

from .tools import MIB, lacking, need


@pytest.fixture(params=["splice", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How content moves: by the kernel, or through Python as on 3.9."""
    if request.param == "buffered":
        monkeypatch.setattr(stream, "_splice", None)
    return str(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    need("mount", "umount")
    if os.geteuid() != 0:
        lacking("mounting a small filesystem needs root")
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * MIB}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
