"""Logins that print: over a real sshd, to the probe of the direct route and to the controller."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.host import peer
from kvm_clone.agent.protocol.wire import MARKER, NOISE_LIMIT
from kvm_clone.errors import ConnectError, ExitCode, RefusedError
from kvm_clone.hosts import payload, ssh_connection
from kvm_clone.hosts.children import end_process, kill_process
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.outputs import lines_of
from kvm_clone.hosts.ssh import SshOptions, parse_address

from .tools import SshServer, eventually, processes

pytestmark = [pytest.mark.timeout(60), pytest.mark.sampled]

Login = tuple[SshServer, Path]

LINES, WITHOUT_END = "yes banner | head -c {}", "head -c {} /dev/zero | tr '\\0' x"

SURVIVED = {
    "nothing": "",
    "lines on stdout": LINES.format(NOISE_LIMIT - 1000),
    "one line on stdout": WITHOUT_END.format(100_000),
    "what looks like an answer": "echo not ready; echo 'ready '; echo 12345; echo 'not KVM-CLONE-AGENT 0 0'",
    "60,000 bytes on stderr": f"({LINES}) >&2".format(60_000),
    "200,000 bytes on stderr": f"({LINES}) >&2".format(200_000),
    "5 MB on stderr": f"({LINES}) >&2".format(5_000_000),
    "5 MB on stderr in one line": f"({WITHOUT_END}) >&2".format(5_000_000),
    "both": f"({LINES}) >&2; {LINES}".format(1_000_000, 200_000),
}

TOO_MUCH = {
    "2 MB on stdout": LINES.format(2_000_000),
    "10 MB on stdout in one line": WITHOUT_END.format(10_000_000),
    "stdout without end": "yes banner",
    "stdout without end or line": "cat /dev/zero",
    "words on stderr, then stdout without end": "echo welcome >&2; yes banner",
}


def command_line(server: SshServer) -> str:
    """What all of our ssh processes to that server have in their command lines."""
    return next(word for word in server.ssh if word.startswith("IdentityFile="))


@pytest.mark.parametrize("name", SURVIVED)
def test_a_probe_survives_a_login_that_prints(name: str, login: Login) -> None:
    server, rc = login
    rc.write_text(SURVIVED[name])
    answer = peer.probe(**server._asdict())
    assert answer["error"] == ""
    assert answer["rate"] > 0
    assert peer.probe(**server._asdict(), measured=False)["error"] == ""
    assert not processes(command_line(server))


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_probe_gives_up_on_a_login_that_prints_without_end(name: str, login: Login) -> None:
    server, rc = login
    rc.write_text(TOO_MUCH[name])
    begun = time.monotonic()
    answer = peer.probe(**server._asdict())
    assert answer == {"error": "the login prints without end instead of running a command", "rate": 0.0}
    assert time.monotonic() - begun < 20
    assert not processes(command_line(server))


SILENT = {
    "a login that says nothing": "sleep 60",
    "stderr without end": "yes banner >&2",
    "a far end that does not count": "echo; echo ready; sleep 60",
}


@pytest.mark.parametrize("name", SILENT)
def test_a_probe_is_over_in_time(name: str, login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "PROBE_SECONDS", 2.0)
    server, rc = login
    rc.write_text(SILENT[name])
    begun = time.monotonic()
    assert peer.probe(**server._asdict()) == {"error": "no answer within 2 seconds", "rate": 0.0}
    assert time.monotonic() - begun < 10
    assert not processes(command_line(server))


REFUSALS = {
    "its own words": ("echo go away >&2; exit 3", "ssh: go away"),
    "its own words behind a flood": (
        f"({LINES}) >&2; (echo; echo go away) >&2; exit 3".format(1_000_000),
        "ssh: go away",
    ),
    "no words": ("exit 3", "ssh: ended with status 3"),
    "another command": ("echo menu; exit 0", "the login there does not run what it is asked to"),
    "an end after the start": ("echo; echo ready; exit 0", "the login there does not run what it is asked to"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_probe_says_why(name: str, login: Login) -> None:
    server, rc = login
    command, said = REFUSALS[name]
    rc.write_text(command)
    assert peer.probe(**server._asdict()) == {"error": said, "rate": 0.0}


async def connect(server: SshServer, directory: Path) -> None:
    """Connect as the controller does, call, and close."""
    (directory / "known_hosts").write_text(server.known_hosts)
    words = server.ssh
    options = (
        command_line(server), f"Port={words[words.index('-p') + 1]}", f"UserKnownHostsFile={directory}/known_hosts",
        "GlobalKnownHostsFile=none",
    )  # fmt: skip
    there = Host(parse_address(words[-1]), SshOptions(Path(os.devnull), None, options, retries=1), directory,
                 interactive=False)  # fmt: skip
    try:
        await there.connect()
        assert (await there.link.call("host"))["uid"] == os.geteuid()
    finally:
        await there.close()


def end_of(server: SshServer) -> str:
    return command_line(server)


@pytest.mark.parametrize("name", SURVIVED)
def test_a_connection_survives_a_login_that_prints(name: str, login: Login, tmp_path: Path) -> None:
    server, rc = login
    rc.write_text(SURVIVED[name])
    asyncio.run(connect(server, tmp_path))
    assert not processes(command_line(server))


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_connection_gives_up_on_a_login_that_prints_without_end(name: str, login: Login, tmp_path: Path) -> None:
    server, rc = login
    rc.write_text(TOO_MUCH[name])
    begun = time.monotonic()
    with pytest.raises(ConnectError, match="prints without end") as caught:
        asyncio.run(connect(server, tmp_path))
    assert caught.value.exit_code is ExitCode.CONNECT
    assert time.monotonic() - begun < 15
    assert eventually(lambda: not processes(command_line(server)))


@pytest.mark.parametrize("name", ["a login that says nothing", "stderr without end"])
def test_a_connection_is_made_in_time(name: str, login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_connection, "START_SECONDS", 2.0)
    server, rc = login
    rc.write_text(SILENT[name])
    begun = time.monotonic()
    with pytest.raises(ConnectError, match="no agent was ready within 2 s"):
        asyncio.run(connect(server, tmp_path))
    assert time.monotonic() - begun < 15
    assert eventually(lambda: not processes(command_line(server)))


def test_the_last_words_of_a_flood_are_kept(login: Login, tmp_path: Path) -> None:
    server, rc = login
    rc.write_text(f"({LINES}) >&2; echo 'kvm-clone: no room here' >&2; exit 1".format(3_000_000))
    with pytest.raises(RefusedError, match="no room here"):
        asyncio.run(connect(server, tmp_path))


def test_the_marker_in_the_noise_is_another_agents(login: Login, tmp_path: Path) -> None:
    server, rc = login
    rc.write_text(f"echo '{MARKER.decode()}0.0.1 feed'")
    with pytest.raises(ConnectError, match="another one: 0"):
        asyncio.run(connect(server, tmp_path))
    assert payload.identity()


def test_lines_of_any_length_are_taken_in_parts() -> None:
    async def run(content: bytes) -> list[str]:
        stream = asyncio.StreamReader()
        stream.feed_data(content)
        stream.feed_eof()
        return [line async for line in lines_of(stream)]

    assert asyncio.run(run(b"")) == []
    assert asyncio.run(run(b"a\n\nb c \r\nlast")) == ["a", "", "b c", "last"]
    long = asyncio.run(run(b"x" * 1_000_000 + b"\n\xff\n"))
    assert "".join(long[:-1]) == "x" * 1_000_000
    assert max(map(len, long)) <= 8192
    assert long[-1] == "\ufffd"


async def spawned(script: str, **how: Any) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec("sh", "-c", script, stdin=pipe, stdout=pipe, **how)


@pytest.mark.parametrize("end", [end_process, kill_process])
def test_a_child_whose_output_nobody_reads_ends(end: Any) -> None:
    async def run() -> None:
        process = await spawned("exec yes")
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await end(process, *([0.2] if end is end_process else []))
        assert time.monotonic() - begun < 3
        assert process.returncode is not None

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_child_of_a_child_that_keeps_the_output_open() -> None:
    async def collect(process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for _ in lines_of(process.stderr):
            pass

    async def run() -> None:
        for script in ("sleep 20 & exec sleep 30", "sleep 20 & exec true"):
            process = await spawned(script, stderr=asyncio.subprocess.PIPE)
            reader = asyncio.create_task(collect(process))
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            await kill_process(process)
            await reader
            assert time.monotonic() - begun < 4

    asyncio.run(asyncio.wait_for(run(), 20))
