from __future__ import annotations

import ast
import compileall
import hashlib
import importlib.util
import io
import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import kvm_clone.agent
from kvm_clone.hosts import payload
from kvm_clone.version import __version__

AGENT = Path(kvm_clone.agent.__file__).parent


def test_the_package_is_the_agent_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(payload.package())) as archive:
        assert archive.testzip() is None
        content = {name: archive.read(name) for name in archive.namelist()}
    expected = {f"kvm_clone/agent/{file.relative_to(AGENT)}": file.read_bytes() for file in AGENT.rglob("*.py")}
    sources = {name: source for name, source in content.items() if name.endswith(".py")}
    assert sources == {"kvm_clone/__init__.py": b"", **expected}
    assert content.keys() - sources.keys() <= {f"{name}c" for name in expected}


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module, as Python has cached it."""
    path = tmp_path / "said.py"
    path.write_text("said = 'compiled'\n")
    py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP, doraise=True)
    return path


def cache(path: Path) -> Path:
    return Path(importlib.util.cache_from_source(str(path)))


def imported(folder: Path, files: dict[str, bytes]) -> str:
    """What the module says when it is imported out of a zip file, as the agent is."""
    with zipfile.ZipFile(folder / "agent.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    script = f"import sys; sys.path.insert(0, {str(folder / 'agent.zip')!r}); import said; print(said.said)"
    return subprocess.run([sys.executable, "-I", "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout


def test_a_host_with_our_python_does_not_compile(module: Path, tmp_path: Path) -> None:
    compiled = payload.compiled(module, module.read_bytes())
    assert compiled is not None
    source = b"said = 'source'\n"
    assert imported(tmp_path, {"said.py": source, "said.pyc": compiled}) == "compiled\n"
    assert imported(tmp_path, {"said.py": source, "said.pyc": b"\0\0\r\n" + compiled[4:]}) == "source\n"


CACHES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: cache(path).unlink(),
    "of another Python": lambda path: cache(path).write_bytes(b"\0\0\r\n" + cache(path).read_bytes()[4:]),
    "of an older source": lambda path: os.utime(path, (1, 1)),
    "of a source of another size": lambda path: path.write_text("said = 'something else'\n"),
    "cut off": lambda path: os.truncate(cache(path), 10),
    "known by a hash": lambda path: py_compile.compile(
        str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    ),
}


@pytest.mark.parametrize("what", CACHES)
def test_a_cache_that_may_be_anothers_is_left(what: str, module: Path) -> None:
    assert payload.compiled(module, module.read_bytes()) is not None
    CACHES[what](module)
    assert payload.compiled(module, module.read_bytes()) is None


@pytest.mark.parametrize("cached", [False, True])
def test_the_same_files_make_the_same_bytes(cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    if cached:
        assert compileall.compile_dir(AGENT, quiet=2)
    first, second = (payload.package.__wrapped__() for _ in range(2))
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".pyc")]
    assert len(compiled) == (len(list(AGENT.rglob("*.py"))) if cached else 0)


def test_the_preamble_and_the_identity_name_the_package() -> None:
    digest = hashlib.sha256(payload.package()).hexdigest()
    assert payload.preamble() == f"{payload.loader()}{len(payload.package()):08x}{digest}"
    assert payload.identity() == f"{__version__} {digest[:16]}"
    assert repr(__version__) in payload.loader()


@pytest.mark.parametrize("python", ["python3", "/opt/my python/bin/python3", "py'thon"])
def test_the_remote_command_survives_a_shell(python: str) -> None:
    words = shlex.split(payload.remote_command(python))
    assert words[:-2] == ["exec", python, "-I", "-X", "utf8", "-c"]
    assert words[-1] == payload.NAME
    ast.parse(words[-2], feature_version=(3, 4))


SHELLS = ("sh", "bash", "dash", "zsh", "tcsh", "fish", "busybox ash")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_runs_the_loader(shell: str) -> None:
    """The shell gets the command as sshd gives it; the loader then reads exactly itself from its input."""
    program, *applet = shell.split()
    if shutil.which(program) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    ended = subprocess.run(
        [program, *applet, "-c", payload.remote_command(sys.executable)],
        input=payload.preamble().encode()[:-1] + b"x" + payload.package(),
        capture_output=True,
    )
    assert (ended.returncode, ended.stderr) == (1, b"kvm-clone: the agent arrived damaged\n")


def test_the_remote_command_holds_nothing_that_a_shell_expands() -> None:
    inside = payload.remote_command().partition("'")[2].rpartition("'")[0]
    assert not set(inside) & set("'!$`\\\n")


def test_the_loader_can_be_read_by_pythons_that_it_refuses() -> None:
    program = payload.loader()
    ast.parse(program, feature_version=(3, 4))
    refusal = program.replace("(3, 9)", "(99, 0)")
    ended = subprocess.run([sys.executable, "-I", "-c", refusal], input=b"", capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"kvm-clone: this host has Python 3.")
