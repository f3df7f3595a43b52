from __future__ import annotations

import ast
import hashlib
import io
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvm_clone.agent
from kvm_clone import payload
from kvm_clone.version import __version__

AGENT = Path(kvm_clone.agent.__file__).parent


def test_the_package_is_the_agent_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(payload.package())) as archive:
        assert archive.testzip() is None
        content = {name: archive.read(name) for name in archive.namelist()}
    expected = {f"kvm_clone/agent/{file.name}": file.read_bytes() for file in AGENT.glob("*.py")}
    assert content == {"kvm_clone/__init__.py": b"", **expected}


def test_the_same_files_make_the_same_bytes() -> None:
    first = payload.package()
    payload.package.cache_clear()
    assert payload.package() == first


def test_the_preamble_and_the_identity_name_the_package() -> None:
    digest = hashlib.sha256(payload.package()).hexdigest()
    assert payload.preamble() == f"{len(payload.package()):08x}{digest}"
    assert len(payload.preamble()) == 72
    assert payload.identity() == f"{__version__} {digest[:16]}"


def test_the_loader_is_one_line() -> None:
    assert "\n" not in payload.loader()
    assert repr(__version__) in ast.literal_eval(payload.loader().removeprefix("exec(").removesuffix(")"))


@pytest.mark.parametrize("python", ["python3", "/opt/my python/bin/python3", "py'thon"])
def test_the_remote_command_survives_a_shell(python: str) -> None:
    assert shlex.split(payload.remote_command(python)) == ["exec", python, "-I", "-c", payload.loader()]


def test_the_loader_can_be_read_by_pythons_that_it_refuses() -> None:
    program = ast.literal_eval(payload.loader().removeprefix("exec(").removesuffix(")"))
    ast.parse(program, feature_version=(3, 4))
    refusal = program.replace("(3, 9)", "(99, 0)")
    ended = subprocess.run([sys.executable, "-I", "-c", refusal], input=b"", capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"kvm-clone: this host has Python 3.")
