"""Running the command line: in this process, which is quick, and as a process of its own, as users do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvm_clone import cli


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that is all of stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.document) == ["error"]
        error: dict[str, Any] = self.document["error"]
        return error


Run = Callable[..., Done]


@pytest.fixture(name="home", autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without settings, who does not wait for hosts."""
    for name in [name for name in os.environ if name.startswith("KVM_CLONE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KVM_CLONE_CONNECT_RETRIES", "0")
    return tmp_path


@pytest.fixture(name="here")
def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvm-clone", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(end.value.code or 0), out, err)

    return run


MODULE = ("-m", "kvm_clone.cli")


def there(*words: str | bytes, python: tuple[str, ...] = MODULE, **options: Any) -> Done:
    """Run the command line as a process of its own."""
    kept = {"capture_output": True, "stdin": subprocess.DEVNULL, "timeout": 60, "text": True}
    done = subprocess.run([sys.executable, *python, *words], check=False, **{**kept, **options})
    return Done(done.returncode, done.stdout or "", done.stderr or "")


@pytest.fixture(name="nobody")
def port_that_refuses() -> Iterator[str]:
    """The address of a port that is taken and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"ssh://root@127.0.0.1:{taken.getsockname()[1]}"
