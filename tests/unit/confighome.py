"""A home of its own and a configuration file, for the suites that read and write one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvm_clone.settings import config


@pytest.fixture(name="home", autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a configuration, in an environment without one."""
    for name in [name for name in os.environ if name.startswith(config.ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(name="file")
def config_file(tmp_path: Path) -> Path:
    """Where a configuration file may be written."""
    return tmp_path / "config.yaml"


def write(file: Path, text: str) -> Path:
    """Write exactly this text: line endings are the point of some tests."""
    file.write_bytes(text.encode())
    return file


def read(file: Path) -> str:
    """The text with its line endings."""
    return file.read_bytes().decode()
