"""The agent as a host runs it: the loader in a process of its own, fed through its input."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import names, server
from kvm_clone.agent.digests import digest
from kvm_clone.agent.disks import qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.wire import MARKER, RECORD_HEADER, pack_frame, read_frame
from kvm_clone.agent.transfer import Job, Sender
from kvm_clone.hosts import frames, payload
from kvm_clone.hosts.children import end_process

from .naive_hash import BY_SHA256, naive_hash
from .tools import (
    KIB,
    MIB,
    SshServer,
    ending,
    eventually,
    make_qcow2,
    make_raw,
    need,
    noise,
    processes,
    python,
    through_pipe,
)

pytestmark = pytest.mark.timeout(60)

Frame = dict[str, Any]
HOW = [BY_SHA256.method, BY_SHA256.key.hex()]

LOADER = payload.loader().encode()
WHOLE = payload.preamble().encode() + payload.package()
COMMANDS = {
    "argv": shlex.split(payload.remote_command(sys.executable))[1:],
    "shell": ["sh", "-c", payload.remote_command(sys.executable)],
}


class Agent:
    """A running agent, as the controller has it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self.process = process
        self.stdin = process.stdin
        self.stdout = process.stdout

    def write(self, data: bytes) -> None:
        with suppress(BrokenPipeError):
            self.stdin.write(data)
            self.stdin.flush()

    def ready(self) -> str:
        for line in self.stdout:
            if line.startswith(MARKER):
                return line[len(MARKER) :].decode().strip()
        raise EOFError

    def frame(self) -> Frame | None:
        header = self.stdout.read(4)
        return json.loads(self.stdout.read(int.from_bytes(header, "big"))) if header else None

    def call(self, call: str, /, **arguments: Any) -> Frame:
        """One call at a time; progress is skipped."""
        self.write(pack_frame({"id": 1, "call": call, "args": arguments}))
        while True:
            answer = self.frame()
            assert answer
            if "progress" not in answer:
                return answer

    def end(self) -> tuple[int, str]:
        """Close the input; exit status and last words."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.read()
        assert self.process.stderr
        said = self.process.stderr.read().decode()
        return self.process.wait(20), said


@contextmanager
def agent(how: str = "argv", first: bytes = WHOLE, *frames: Frame, **options: Any) -> Iterator[Agent]:
    with ending(
        subprocess.Popen(
            COMMANDS[how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
    ) as process:
        running = Agent(process)
        running.write(first + b"".join(pack_frame(frame) for frame in frames))
        yield running


@contextmanager
def control() -> Iterator[Agent]:
    with agent("argv", WHOLE, {"mode": "control"}) as running:
        running.ready()
        yield running


@pytest.mark.parametrize("how", COMMANDS)
def test_the_agent_says_who_it_is(how: str) -> None:
    with agent(how) as running:
        assert running.ready() == payload.identity()
        assert running.end() == (0, "")


NOISE = {
    "nothing": b"",
    "a banner": b"Welcome!\nLast login: never\n",
    "no line end": b"motd without an end",
    "binary": bytes(range(256)) * 100,
    "the marker within a line": b"not KVM-CLONE-AGENT 0 0\nnor KVM-CLONE-AGENT",
    "a very long line": b"x" * 200_000,
}


@pytest.mark.parametrize("name", NOISE)
def test_login_noise_is_skipped(name: str, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(NOISE[name])
    command = f"cat '{tmp_path}/noise'; {payload.remote_command(sys.executable)}"

    async def run() -> tuple[str, Frame | None]:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin
        assert process.stdout
        process.stdin.write(WHOLE + pack_frame({"mode": "control"}) + pack_frame({"id": 7, "call": "ping"}))
        identity = await frames.read_marker(process.stdout, 20)
        answer = await frames.read_frame(process.stdout)
        await end_process(process)
        return identity, answer

    assert asyncio.run(run()) == (payload.identity(), {"id": 7, "ok": None})


def damaged(at: int) -> bytes:
    """All of it, with a byte of what the loader takes altered."""
    content = bytearray(WHOLE)
    content[len(LOADER) + at] ^= 1
    return bytes(content)


NOT_WHOLE = {
    "nothing": (LOADER, "did not arrive whole"),
    "a part of the length": (WHOLE[: len(LOADER) + 5], "did not arrive whole"),
    "a part of the digest": (WHOLE[: len(LOADER) + 71], "did not arrive whole"),
    "no zip": (WHOLE[: len(LOADER) + 72], "did not arrive whole"),
    "half a zip": (WHOLE[: len(WHOLE) // 2], "did not arrive whole"),
    "all but one byte": (WHOLE[:-1], "did not arrive whole"),
    "a damaged digest": (damaged(20), "damaged"),
    "a damaged zip": (damaged(5000), "damaged"),
    "a damaged last byte": (damaged(len(WHOLE) - len(LOADER) - 1), "damaged"),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_a_payload_that_is_not_whole(name: str) -> None:
    content, said = NOT_WHOLE[name]
    with agent("argv", content) as running:
        status, stderr = running.end()
    assert status != 0
    assert stderr.startswith("kvm-clone: the agent ")
    assert said in stderr
    assert stderr.count("\n") == 1


def test_the_agent_leaves_nothing_on_the_host(tmp_path: Path) -> None:
    with agent(
        "argv", WHOLE, {"mode": "control"}, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ) as running:
        running.ready()
        assert running.call("host")["ok"]["uid"] == os.geteuid()
        running.end()
    assert not list(tmp_path.iterdir())


def altered(module: str, text: str) -> bytes:
    """The loader's input with `text` at the end of one of the agent's modules."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.package())) as package, zipfile.ZipFile(buffer, "w") as archive:
        for name in package.namelist():
            added = text.encode() if name.endswith(f"/{module}.py") else b""
            if not name.endswith(f"/{module}.pyc"):
                archive.writestr(name, package.read(name) + added)
    content = buffer.getvalue()
    return LOADER + f"{len(content):08x}{hashlib.sha256(content).hexdigest()}".encode() + content


def test_what_libraries_print_does_not_reach_the_protocol() -> None:
    chatty = altered("host_info", "\n\ndef host():\n    print('chatter', flush=True)\n    os.system('echo more')\n")
    with agent("argv", chatty, {"mode": "control"}) as running:
        running.ready()
        assert running.call("host") == {"id": 1, "ok": None}
        assert running.end() == (0, "chatter\nmore\n")


def test_a_probe_answers_with_what_ssh_said(sshd: SshServer) -> None:
    with control() as running:
        answer = running.call("probe", **sshd._asdict())["ok"]
        assert (answer["error"], answer["rate"] > 0) == ("", True)
        said = running.call("probe", ssh=sshd.ssh, known_hosts="[127.0.0.1]:1 ssh-ed25519 AAAA\n")["ok"]
        assert said == {"error": "ssh: Host key verification failed.", "rate": 0.0}
        assert running.end() == (0, "")


BAD_FRAMES = {
    "unknown mode": (pack_frame({"mode": "dance"}), "the agent has no mode 'dance'"),
    "no mode": (pack_frame({}), "the agent has no mode None"),
    "not JSON": (b"\0\0\0\4oops", "not JSON"),
    "not an object": (b"\0\0\0\2[]", "not a JSON object"),
    "too long": (b"SSH-2.0", "more than"),
    "not UTF-8": (b"\0\0\0\2\xff\xfe", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_first_frame_that_is_none(name: str) -> None:
    content, said = BAD_FRAMES[name]
    with agent("argv", WHOLE + content) as running:
        running.ready()
        status, stderr = running.end()
    assert status == 3
    assert stderr.startswith("kvm-clone: ")
    assert said in stderr
    assert stderr.count("\n") == 1


def cuts_of(frames: Sequence[bytes]) -> Iterator[int]:
    """Every border between frames, and places within their lengths and bodies."""
    start = 0
    for frame in frames:
        yield from (start, start + 3, start + len(frame) - 1)
        start += len(frame)
    yield start


Input = tuple[list[bytes], list[bytes]]


def control_input(directory: Path) -> Input:
    disk = make_raw(directory / "disk", MIB, [(0, noise(MIB))])
    calls = [("ping", {}), ("disk", {"path": str(disk), "image_format": "raw"}), ("host", {})]
    frames = [pack_frame({"id": number, "call": name, "args": args}) for number, (name, args) in enumerate(calls)]
    return [pack_frame({"mode": "control"}), *frames], []


def send_input(directory: Path) -> Input:
    disk = make_qcow2(directory / "disk", MIB, [(0, noise(MIB))])
    jobs = [{"path": str(disk), "format": "qcow2", "fresh": True}]
    go = {"go": True, "jobs": jobs, "parallel": 1, "bandwidth_limit": 0}
    return [pack_frame({"mode": "send"}), pack_frame(go)], []


def receive_input(directory: Path) -> Input:
    source = make_raw(directory / "source", MIB, [(0, noise(MIB)), (0, bytes(64 * KIB))])
    content = through_pipe(lambda out: Sender(out, [Job(str(source), "raw")], 1, 0).run())
    jobs = [{"path": str(make_qcow2(directory / "staged", MIB)), "format": "qcow2"}]
    size = RECORD_HEADER.size
    records = [content[:size], content[size : -2 * size], content[-2 * size : -size], content[-size:]]
    return [pack_frame({"mode": "receive", "jobs": jobs})], records


INPUTS: dict[str, Callable[[Path], Input]] = {"control": control_input, "send": send_input, "receive": receive_input}


STATUSES: dict[str, Callable[[int, int, int], set[int]]] = {
    "control": lambda cut, request, _whole: {0} if cut == 0 or cut >= request else {3},
    # A sender that was told to go may be done before it sees the end of its input.
    "send": lambda cut, _request, whole: {0} if cut == 0 else {0, 3} if cut == whole else {3},
    "receive": lambda cut, _request, whole: {0} if cut in (0, whole) else {3},
}


@pytest.mark.parametrize("mode", INPUTS)
def test_the_end_of_the_input_ends_the_agent(mode: str, tmp_path: Path) -> None:
    frames, records = INPUTS[mode](tmp_path)
    content = b"".join(frames + records)

    def cut_off(cut: int) -> tuple[int, int, str]:
        with agent("argv", WHOLE + content[:cut]) as running:
            return cut, *running.end()

    with ThreadPoolExecutor(1 if mode == "receive" else 2) as pool:  # receivers would write the same image
        ends = list(pool.map(cut_off, cuts_of(frames + records)))
    for cut, status, stderr in ends:
        assert "Traceback" not in stderr, (cut, stderr)
        assert status in STATUSES[mode](cut, len(frames[0]), len(content)), (cut, stderr)
    assert eventually(lambda: not processes(str(tmp_path)))


def test_a_receiver_answers_with_what_went_wrong(tmp_path: Path) -> None:
    frames, records = receive_input(tmp_path)
    with agent("argv", WHOLE + b"".join(frames + records[:-1])) as running:
        running.ready()
        running.stdin.close()
        answers = []
        while answer := running.frame():
            answers.append(answer)
    assert answers[-1]["error"]["kind"] == errors.INTERRUPTED
    assert not [answer for answer in answers if "done" in answer]


def test_a_relayed_copy(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "from", 8 * MIB, [(0, noise(3 * MIB)), (7 * MIB, b"x")])
    staged = make_qcow2(tmp_path / "to", 8 * MIB)
    receive = {"mode": "receive", "jobs": [{"path": str(staged), "format": "qcow2"}]}
    go = {"go": True, "jobs": [{"path": str(source), "format": "qcow2"}], "parallel": 1, "bandwidth_limit": 0}
    with agent("argv", WHOLE, {"mode": "send"}, go) as sender, agent("shell", WHOLE, receive) as receiver:
        sender.ready()
        receiver.ready()
        stream = sender.stdout.read()
        receiver.write(stream)
        frames = []
        while frame := receiver.frame():
            frames.append(frame)
        assert frames[-1] == {"done": True}
        assert frames[-2]["written"][0] >= 3 * MIB
        assert receiver.end() == (0, "")
        assert sender.process.wait(10) == 0
    subprocess.run(["qemu-img", "compare", "-q", str(source), str(staged)], check=True)


@contextmanager
def direct(sshd: SshServer, tmp_path: Path, rate: int) -> Iterator[tuple[Agent, Path, Path]]:
    """A sender that starts its receiver itself, by ssh; told to go."""
    source = make_raw(tmp_path / "from", 4 * MIB, [(0, noise(4 * MIB))])
    staged = make_qcow2(tmp_path / "to", 4 * MIB)
    request = {
        "mode": "send",
        **sshd._asdict(),
        "command": payload.remote_command(sys.executable),
        "preamble": payload.preamble(),
    }
    go = {
        "go": True,
        "jobs": [{"path": str(source), "format": "raw"}],
        "parallel": 1,
        "bandwidth_limit": rate,
        "receive": {"mode": "receive", "jobs": [{"path": str(staged), "format": "qcow2"}]},
    }
    with agent("argv", WHOLE, request) as running:
        assert running.ready() == payload.identity()
        assert running.ready() == payload.identity(), "the receiver's own, through the sender's output"
        running.write(pack_frame(go))
        yield running, source, staged


def test_a_direct_copy(sshd: SshServer, tmp_path: Path) -> None:
    with direct(sshd, tmp_path, 0) as (running, source, staged):
        frames = []
        while frame := running.frame():
            frames.append(frame)
        assert frames[-1] == {"done": True}
        assert running.process.wait(10) == 0
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(source), str(staged)], check=True)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            found += map(int, task.read_text().split())
    return found


def state(pid: int) -> list[str]:
    """State, parent and what else follows the name in /proc/pid/stat; a state alone when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return ["X"]


def alive(pid: int) -> bool:
    return state(pid)[0] not in "XZ"


ENDS: dict[str, Callable[[Agent], object]] = {
    "the input's end": lambda running: running.stdin.close(),
    "SIGKILL": lambda running: running.process.send_signal(signal.SIGKILL),
    "SIGTERM": lambda running: running.process.send_signal(signal.SIGTERM),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_direct_copy_that_is_cut_off(how: str, sshd: SshServer, tmp_path: Path) -> None:
    with direct(sshd, tmp_path, MIB) as (running, _, staged):
        frame = running.frame()
        assert frame
        assert "written" in frame
        (server,) = processes(str(staged))
        involved = [server, int(state(server)[1]), *children(running.process.pid)]
        assert len(set(involved)) == 3, "qemu-nbd, the receiver above it, and ssh"
        ENDS[how](running)
        frames = []
        while frame := running.frame():
            frames.append(frame)
        assert not [frame for frame in frames if "done" in frame]
        assert running.process.wait(10) != 0
        assert eventually(lambda: not any(map(alive, involved)))
        assert running.process.stderr
        assert b"Traceback" not in running.process.stderr.read()


def test_an_unknown_call() -> None:
    with control() as running:
        for name in ("dance", "__init__", "", None):
            running.write(pack_frame({"id": 4, "call": name}))
            answer = running.frame()
            assert answer
            assert answer["id"] == 4
            assert answer["error"]["kind"] == errors.UNSUPPORTED
        assert running.call("ping") == {"id": 1, "ok": None}
        assert running.call("create", disk="vda")["error"]["message"] == "this agent has no operation"
        assert running.end() == (0, "")


@pytest.mark.parametrize("arguments", [{"nonsense": 1}, {"path": 3.5}, {"path": "/nowhere/at all"}])
def test_a_call_that_fails_is_answered(arguments: dict[str, Any]) -> None:
    with control() as running:
        assert running.call("fingerprint", **arguments)["error"]["message"]
        assert running.call("ping") == {"id": 1, "ok": None}
        assert running.end() == (0, "")


@contextmanager
def slow_call() -> Iterator[tuple[Frame, socket.socket]]:
    """A call that lasts as long as the connection that arrives at the socket: ssh to a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        ssh = ["ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-p", port, "--", "127.0.0.1"]
        yield {"id": 1, "call": "probe", "args": {"ssh": ssh, "known_hosts": ""}}, listener


def test_calls_run_side_by_side() -> None:
    need("ssh")
    with control() as running, slow_call() as (call, listener):
        running.write(pack_frame(call))
        connection, _ = listener.accept()
        with connection:
            for number in (2, 3):
                running.write(pack_frame({"id": number, "call": "ping"}))
                assert running.frame() == {"id": number, "ok": None}
        answer = running.frame()
        assert answer
        assert answer["id"] == 1
        assert answer["ok"]["error"].startswith("ssh: Connection ")
        assert running.end() == (0, "")


def test_a_call_under_way_when_the_controller_goes() -> None:
    need("ssh")
    with control() as running, slow_call() as (call, listener):
        running.write(pack_frame(call))
        connection, _ = listener.accept()
        with connection:
            (ssh,) = children(running.process.pid)
            assert running.end() == (0, "")
            assert eventually(lambda: not alive(ssh))


def test_a_controller_that_does_not_listen_any_more(tmp_path: Path) -> None:
    disk = make_raw(tmp_path / "disk", 65 * MIB, [(0, b"x")])
    with control() as running:
        running.stdout.close()
        for call, args in (("ping", {}), ("digest", {"path": str(disk), "image_format": "raw"}), ("nothing", {})):
            running.write(pack_frame({"id": 1, "call": call, "args": args}))
        running.write(pack_frame({"id": 1, "call": "ping"}))
        assert running.process.stderr
        running.stdin.close()
        said = running.process.stderr.read()
        assert running.process.wait(10) in (0, 3)
    assert b"Traceback" not in said


IMPATIENT = """
from kvm_clone.agent import __main__ as entry
entry.PATIENCE_SECONDS = 0.2
entry.main("", "version")
"""


@pytest.mark.parametrize("told", [b"", pack_frame({"mode": "send"})], ids=["nothing", "to send, but not to go"])
def test_an_agent_that_is_not_told_what_to_do_ends(told: bytes) -> None:
    with ending(python(IMPATIENT, stderr=subprocess.PIPE)) as running:
        assert running.stdin
        assert running.stderr
        running.stdin.write(told)
        running.stdin.flush()
        assert running.wait(20) == 3
        assert b"said nothing" in running.stderr.read()


def test_silence_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SILENCE_SECONDS", 0.2)
    ours, theirs = os.pipe()
    try:
        server.Server(ours, theirs).serve()
    finally:
        os.close(ours)
        os.close(theirs)


def test_digests_with_progress(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "disk", 2 * digest.SEGMENT + MIB, [(digest.SEGMENT, b"x")])
    with control() as running:
        args = {"path": str(disk), "image_format": "qcow2", "how": HOW, "ranges": [[0, 2 * digest.SEGMENT + MIB]]}
        running.write(pack_frame({"id": 9, "call": "digest", "args": args}))
        answers = [running.frame() for _ in range(4)]
        running.end()
    assert [answer["progress"]["done"] for answer in answers[:3] if answer] == [
        digest.SEGMENT,
        2 * digest.SEGMENT,
        2 * digest.SEGMENT + MIB,
    ]
    assert answers[3]
    values = answers[3]["ok"]
    empty = hashlib.sha256(naive_hash(BY_SHA256, bytes(digest.BLOCK)) * 1024).hexdigest()
    assert [(at, value == empty) for at, value in values] == [
        (0, True),
        (digest.SEGMENT, False),
        (2 * digest.SEGMENT, False),
    ]


def test_an_image_stays_locked_until_the_agent_ends(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "disk", MIB)
    with control() as running:
        assert running.call("lock_image", path=str(disk), image_format="raw") == {"id": 1, "ok": None}
        assert (
            running.call("lock_image", path=str(tmp_path / "no"), image_format="raw")["error"]["kind"] == errors.MISSING
        )
        with pytest.raises(errors.AgentError):
            qemu.open_nbd([Node(str(disk), "qcow2")], writable=True)
        running.end()
    qemu.open_nbd([Node(str(disk), "qcow2")], writable=True).close()


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"a test's {uuid.uuid4()}"
    yield chosen
    Path(names.lock_path(chosen)).unlink(missing_ok=True)


SPEC = {"format": "qcow2", "size": MIB, "options": {}, "mode": 0o600, "user": "root", "group": "root"}


def where(pool: Path, name: str, operation: str, **how: Any) -> dict[str, Any]:
    """The arguments of a `stage` call."""
    said = {"directory": str(pool), "directories": [str(pool)], "about": {"source": {"host": "elsewhere"}}}
    return {**said, "name": name, "operation": operation, **how}


def begin(running: Agent, pool: Path, name: str) -> None:
    """Stage two disks and publish one."""
    assert "ok" in running.call("stage", **where(pool, name, "0f"))
    for disk in ("vda", "vdb"):
        assert "ok" in running.call("create", disk=disk, final=str(pool / disk), spec=SPEC)
    assert "ok" in running.call("publish", disk="vda", final=str(pool / "vda"))
    assert len(list(pool.iterdir())) == 3


@pytest.mark.parametrize("how", ["the input's end", "SIGTERM", "a torn frame", "nonsense"])
def test_the_end_undoes_what_was_staged(how: str, name: str, tmp_path: Path) -> None:
    with control() as running:
        begin(running, tmp_path, name)
        if how == "a torn frame":
            running.write(b"\0\0")
        elif how == "nonsense":
            running.write(b"\xff" * 100)
        elif how == "SIGTERM":
            running.process.terminate()
            running.process.wait(10)
        _, stderr = running.end()
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
    assert not Path(names.lock_path(name)).exists()


def test_the_end_leaves_what_may_be_committed(name: str, tmp_path: Path) -> None:
    with control() as running:
        begin(running, tmp_path, name)
        running.call("publish", disk="vdb", final=str(tmp_path / "vdb"))
        running.call("note", record="define", fields={"uuid": "u"})
        left = set(tmp_path.iterdir())
        running.end()
    assert set(tmp_path.iterdir()) == left
    with control() as running:
        (found,) = running.call("staged", directories=[str(tmp_path)], name=name)["ok"]
        assert (found["operation"], found["defining"], found["committed"]) == ("0f", True, False)
        which = {"directory": str(tmp_path), "name": name, "operation": "0f", "directories": [str(tmp_path)]}
        assert "ok" in running.call("record_outcome", **which, committed=True)
        assert "ok" in running.call("stage", **where(tmp_path, name, "0f", finishing=True))
        assert "ok" in running.call("finish")
        running.end()
    assert {entry.name for entry in tmp_path.iterdir()} == {"vda", "vdb"}


def test_a_receiver_ends_with_its_operations_agent(name: str, tmp_path: Path) -> None:
    """Its input stays open, as when the source has lost its power."""
    with control() as running:
        begin(running, tmp_path, name)
        staged = make_raw(tmp_path / "staged", MIB)
        receive = {"mode": "receive", "vm": name, "jobs": [{"path": str(staged), "format": "raw"}]}
        with agent("argv", WHOLE, receive) as receiver:
            receiver.ready()
            assert not eventually(lambda: receiver.process.poll() is not None, 3)
            running.process.kill()
            assert receiver.process.wait(10) == 3


def test_a_killed_agent_leaves_a_journal_for_the_next(name: str, tmp_path: Path) -> None:
    with control() as running:
        begin(running, tmp_path, name)
        running.process.kill()
        running.process.wait()
    assert len(list(tmp_path.iterdir())) == 3
    with control() as running:
        arguments = where(tmp_path, name, "10", discards="0f")
        assert "ok" in running.call("stage", **arguments)
        assert "error" in running.call("stage", **arguments)
        assert "ok" in running.call("finish")
        running.end()
    assert not list(tmp_path.iterdir())


PARENT = """
import subprocess, sys
process = subprocess.Popen(["sh", "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
process.stdin.write(sys.stdin.buffer.read(int(sys.argv[2])))
process.stdin.flush()
print(process.pid, flush=True)
sys.stdin.read()
"""


def test_a_controller_that_is_killed(name: str, tmp_path: Path) -> None:
    frames: list[Frame] = [{"mode": "control"}, {"id": 4, "call": "stage", "args": where(tmp_path, name, "0f")}]
    content = WHOLE + b"".join(pack_frame(frame) for frame in frames)
    with ending(python(PARENT, payload.remote_command(sys.executable), len(content))) as parent:
        assert parent.stdin
        assert parent.stdout
        parent.stdin.write(content)
        parent.stdin.flush()
        running = int(parent.stdout.readline())
        assert eventually(lambda: bool(list(tmp_path.iterdir())))
        parent.kill()
        parent.wait()
        assert eventually(lambda: not alive(running))
    assert not list(tmp_path.iterdir())


def test_frames_over_a_pipe() -> None:
    message = {"text": "\u00e4\n\0", "list": [1, None, True]}
    source, out = os.pipe()
    os.write(out, pack_frame(message))
    os.close(out)
    assert read_frame(source) == message
    assert read_frame(source) is None
    os.close(source)
