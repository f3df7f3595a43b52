"""How the controller's side of a real clone ends, and under which names and paths it works."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from clonekit import (
    PROGRAM,
    Done,
    assert_equal,
    assert_nothing_left,
    environment,
    kvm_clone,
    parts,
    remove,
    running,
    wait_for_copy,
    wait_until,
    wipe,
)
from labclient import Lab, Vm

from kvm_clone import Client, CloneOptions, SshOptions
from kvm_clone.errors import ExitCode, KvmCloneError
from kvm_clone.options import Route

pytestmark = pytest.mark.e2e

NAME = "größe 漢"


@pytest.fixture(scope="module")
def vm(lab: Lab) -> Iterator[Vm]:
    yield lab.vm("kc-a", NAME, ["qcow2:64M:14M", "raw:16M:2M"], boot=False)
    remove(lab, "kc-a", NAME)


@pytest.fixture(autouse=True)
def tidy(lab: Lab) -> Iterator[None]:
    yield
    wipe(lab)
    assert_nothing_left(lab)


def run(lab: Lab, *argv: str, variables: dict[str, str] | None = None, **options: object) -> Done:
    """A command with an environment and streams of its own."""
    kept = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 120}
    own = {**environment(), **(variables or {})}
    done = subprocess.run([*PROGRAM, *argv], env=own, check=False, **{**kept, **options})  # type: ignore[call-overload]
    return Done(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def onto(path: str, *descriptors: int) -> Callable[[], None]:
    def make() -> None:
        for one in descriptors:
            os.dup2(os.open(path, os.O_WRONLY), one)

    return make


def shut(*descriptors: int) -> Callable[[], None]:
    def make() -> None:
        for one in descriptors:
            os.close(one)

    return make


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        (onto("/dev/full", 1), ExitCode.OUTPUT),
        (shut(1), ExitCode.OUTPUT),
        (shut(0, 1, 2), ExitCode.OUTPUT),
        (onto("/dev/full", 2), ExitCode.DONE),
        (shut(2), ExitCode.DONE),
    ],
    ids=["stdout is full", "stdout is closed", "all are closed", "stderr is full", "stderr is closed"],
)
def test_a_clone_that_cannot_be_told_of_is_done(
    lab: Lab, vm: Vm, tmp_path: Path, streams: Callable[[], None], code: int
) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path)}
    argv = ("clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", NAME)
    done = run(lab, *argv, variables=state, preexec_fn=streams)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert "Exception ignored" not in done.err
    assert_equal(lab, vm)
    [one] = run(lab, "status", "--output", "json", variables=state).document["operations"]
    assert (one["state"], one["name"]) == ("done", NAME)
    again = run(lab, *argv, "--idempotent", "--output", "json")
    assert (again.code, again.document["changed"]) == (ExitCode.DONE, False)


def test_a_reader_that_does_not_read_holds_up_no_clone(lab: Lab, vm: Vm) -> None:
    source, into = os.pipe()
    os.set_blocking(into, False)
    os.write(into, bytes(1 << 20))
    os.set_blocking(into, True)
    try:
        argv = ("clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", NAME, "--log-level", "debug")
        done = run(lab, *argv, capture_output=False, stdout=subprocess.PIPE, stderr=into, timeout=60)
    finally:
        os.close(source)
        os.close(into)
    assert done.code == 0
    assert "every byte proven equal" in done.out
    assert_equal(lab, vm)


def test_nohup_outlives_the_terminal(lab: Lab, vm: Vm) -> None:
    program = ("nohup", *PROGRAM)
    with running(lab, "kc-a", "kc-b", NAME, "--bandwidth-limit", "4M", program=program) as child:
        wait_for_copy(lab)
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(children) >= 2, "the connections are its children, and a terminal's end is their matter too"
        for pid in (child.pid, *map(int, children)):
            os.kill(pid, signal.SIGHUP)
        out, err = child.communicate(timeout=90)
    assert child.returncode == 0, err
    assert "every byte proven equal" in out
    assert_equal(lab, vm)


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
@pytest.mark.parametrize("output", ["text", "json"])
def test_a_name_in_a_locale_that_lacks_it(lab: Lab, vm: Vm, variables: dict[str, str], output: str) -> None:
    argv = ("clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", NAME, "--new-name", f"{NAME}é", "--output", output)
    done = run(lab, *argv, variables=variables)
    assert done.code == 0, done.err
    assert_equal(lab, vm, f"{NAME}é")
    if output == "json":
        assert done.out.isascii()
        assert done.document["name"] == f"{NAME}é"
    else:
        assert f"cloned to kc-b as {NAME}é" in done.out
    listed = run(lab, "list", "-F", str(lab.ssh_config), "kc-b", "--output", output, variables=variables)
    assert (f"{NAME}é" in listed.out) or listed.document["hosts"][0]["vms"][0]["name"] == f"{NAME}é"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A filesystem without room."""
    (tmp_path / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "full")], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "full/file").write_bytes(bytes(1 << 20))
        yield tmp_path / "full"
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "full")], check=True)


def test_a_log_without_room_is_no_failure(lab: Lab, vm: Vm, full: Path) -> None:
    variables = dict.fromkeys(("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "TMPDIR"), str(full))
    done = run(lab, "clone", "-F", str(lab.ssh_config), "kc-a", "kc-b", NAME, variables=variables)
    assert done.code == 0, done.err
    assert run(lab, "status", variables=variables).code == 0


ODD = """x y%d'"z\\#"""


@pytest.fixture
def odd(lab: Lab, tmp_path: Path) -> Path:
    """A directory of a name that means something to everybody, with the lab's configuration, key and known hosts."""
    directory = tmp_path / ODD / ("l" * 200)
    directory.mkdir(parents=True)
    for name in ("home", "tmp", "run", "state", "config/kvm-clone"):
        (directory / name).mkdir(parents=True)
    shutil.copy2(lab.root / "id_ed25519", directory / "my key%h")
    shutil.copy2(lab.root / "known_hosts", directory / "known hosts")
    text = lab.ssh_config.read_text()
    in_words = str(directory).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace(f'"{lab.root}/known_hosts"', f'/missing "{in_words}/known hosts" /also/missing')
    lines = [line for line in text.splitlines() if "IdentityFile" not in line]
    [far] = [line.split()[1] for line in lines if "HostName" in line and line.split()[1].endswith(".11")]
    jump = ["Host far", f"    HostName {far}", "    ProxyJump kc-a", f'    UserKnownHostsFile "{in_words}/known hosts"']
    (directory / "ssh config").write_text("\n".join([*lines, *jump, ""]))
    (directory / "config/kvm-clone/config.yaml").write_text("parallel: 1\n")
    return directory


def variables_of(odd: Path) -> dict[str, str]:
    return {
        "HOME": str(odd / "home"),
        "TMPDIR": str(odd / "tmp"),
        "XDG_RUNTIME_DIR": str(odd / "run"),
        "XDG_STATE_HOME": str(odd / "state"),
        "XDG_CONFIG_HOME": str(odd / "config"),
    }


@pytest.mark.parametrize("route", ["auto", "relay"])
def test_paths_that_mean_something_to_somebody(lab: Lab, vm: Vm, odd: Path, route: str) -> None:
    connection = ("-F", str(odd / "ssh config"), "-i", str(odd / "my key%h"))
    argv = ("kc-a", "kc-b", NAME, "--output", "json", "--route", route)
    done = run(lab, "clone", *connection, *argv, variables=variables_of(odd))
    assert done.code == 0, done.err
    assert_equal(lab, vm)
    usual = kvm_clone(lab, "clone", *argv, "--new-name", "usual")
    assert (done.document["route"], done.document["verified"]) == (usual.document["route"], True)
    assert done.document["route"] == ("direct" if route == "auto" else "relay")
    settings = json.loads(run(lab, "config", "list", "--output", "json", variables=variables_of(odd)).out)
    assert settings["settings"]["parallel"]["value"] == 1
    [one] = run(lab, "status", "--output", "json", variables=variables_of(odd)).document["operations"]
    assert one["state"] == "done"
    assert list((odd / "state/kvm-clone/operations").iterdir())
    assert not [*(odd / "run").iterdir(), *(odd / "tmp").iterdir()]


def test_a_jump_host_and_a_configuration_of_an_odd_name(lab: Lab, odd: Path) -> None:
    """For it ssh starts another ssh by a command line of a shell."""
    key = ("--ssh-option", f"IdentityFile={lab.root / 'id_ed25519'}")
    (odd / "ssh config").write_text(f'IdentityFile "{lab.root}/id_ed25519"\n' + (odd / "ssh config").read_text())
    done = run(lab, "list", "-F", str(odd / "ssh config"), *key, "far", "--output", "json", variables=variables_of(odd))
    assert done.code == 0, done.err
    assert done.document["hosts"][0]["vms"] == []


@pytest.mark.parametrize("route", [Route.DIRECT, Route.RELAY])
@pytest.mark.parametrize("moment", [0.3, 0.8, 1.2, 1.6, 2.5])
def test_a_clone_is_stopped_at_any_moment(
    lab: Lab, vm: Vm, children: Callable[[], Mapping[object, str]], route: Route, moment: float
) -> None:
    """And told so again and again, as by a time limit and a signal: whatever it does, it leaves no child behind."""
    options = CloneOptions(route=route, bandwidth_limit=8 << 20, keep_partial=False)

    async def main() -> None:
        before = set(children())
        async with Client(SshOptions(config=lab.ssh_config)) as client:
            task = asyncio.ensure_future(client.clone("kc-a", "kc-b", NAME, options))
            await asyncio.wait([task], timeout=moment)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            assert task.cancelled() or isinstance(task.exception(), KvmCloneError)
            assert {child: how for child, how in children().items() if child not in before} == {}

    asyncio.run(main())
    wait_until("what was staged is gone", lambda: not parts(lab))
