"""Fixtures of the agent's suites."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvm_clone.agent import names
from kvm_clone.agent.process import start
from kvm_clone.agent.protocol import stream

from .tools import MIB, SshServer, ending, eventually, lacking, need

PLAINFS = Path(__file__).parent.with_name("plainfs.py")


@pytest.fixture(params=["splice", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How content moves: by the kernel, or through Python as on 3.9."""
    if request.param == "buffered":
        monkeypatch.setattr(stream, "_splice", None)
    return str(request.param)


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that our locks lie in, of this test's own."""
    directory = tmp_path / "locks"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(names, "_lock_directory", lambda: str(directory))
    return directory


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that every user may look into; pytest's own ones are for their owner alone."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


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


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a filesystem that lacks what the options of tests/plainfs.py say."""
    need("umount")
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        lacking("mounting a filesystem of our own needs root and /dev/fuse")
    made: list[Path] = []

    def make(*options: str) -> Path:
        directory = tmp_path / f"plain{len(made)}"
        directory.mkdir()
        subprocess.run([sys.executable, str(PLAINFS), *(f"--{one}" for one in options), str(directory)], check=True)
        made.append(directory)
        return directory

    try:
        yield make
    finally:
        for directory in made:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """An ssh server of our own on this machine, which lets us in."""
    with _serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SshServer, Path]]:
    """Another one, and the file of shell commands that each login runs first."""
    directory = tmp_path_factory.mktemp("login")
    (directory / "rc").touch()
    force = f'. {directory}/rc; eval "$SSH_ORIGINAL_COMMAND"'
    with _serving(directory, ForceCommand=force) as server:
        yield server, directory / "rc"


@contextmanager
def _serving(directory: Path, **more: str) -> Iterator[SshServer]:
    need("ssh", "ssh-keygen")
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        lacking("sshd is not installed")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        **more,
    }
    argv = [program, "-D", "-e", "-f", "/dev/null", *(f"-o{key}={value}" for key, value in options.items())]
    with (directory / "log").open("wb") as log, ending(start(argv, stderr=log)):
        assert eventually(lambda: _listens(port)), (directory / "log").read_text()
        key = " ".join((directory / "host.pub").read_text().split()[:2])
        ssh = ["ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
        ssh += ["-o", f"IdentityFile={directory / 'user'}", "-p", str(port)]
        yield SshServer([*ssh, "--", f"{getpass.getuser()}@127.0.0.1"], f"[127.0.0.1]:{port} {key}\n")


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True
