"""The command line's end: streams that are full, closed, deaf or slow, signals, and words that name nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clihelp import MODULE, Run, in_this_process, own_home, port_that_refuses, there  # noqa: F401 - fixtures

from kvm_clone.errors import ExitCode
from kvm_clone.upkeep.operation_log import KEPT, OperationLog

pytestmark = pytest.mark.sampled


def full(*descriptors: int) -> Callable[[], None]:
    """What makes a child's streams full."""

    def make() -> None:
        for one in descriptors:
            os.dup2(os.open("/dev/full", os.O_WRONLY), one)

    return make


def closed(*descriptors: int) -> Callable[[], None]:
    def make() -> None:
        for one in descriptors:
            os.close(one)

    return make


def deaf(*descriptors: int) -> Callable[[], None]:
    """What makes a child's streams pipes that nobody reads any more."""

    def make() -> None:
        for one in descriptors:
            source, into = os.pipe()
            os.dup2(into, one)
            os.close(source)

    return make


UNWRITABLE = {
    "full": (full, "No space left on device"),
    "closed": (closed, "Bad file descriptor"),
    "deaf": (deaf, "Broken pipe"),
}
LOST = "kvm-clone: everything was done, but the result could not be written to stdout: "


@pytest.mark.parametrize("how", UNWRITABLE)
@pytest.mark.parametrize("words", ["config list --output json", "clone --help", "status"])
def test_a_result_that_cannot_be_written(how: str, words: str) -> None:
    """`status` has nothing to say here, and loses nothing."""
    make, reason = UNWRITABLE[how]
    done = there(*words.split(), preexec_fn=make(1))
    if words == "status":
        assert (done.code, done.err) == (ExitCode.DONE, "")
    else:
        assert done.code == ExitCode.OUTPUT
        first, what_to_do = done.err.splitlines()
        assert first == LOST + reason
        assert what_to_do.startswith("  what to do: ")


@pytest.mark.parametrize("how", UNWRITABLE)
@pytest.mark.parametrize("streams", [(2,), (1, 2), (0, 1, 2)])
def test_nothing_can_be_said(how: str, streams: tuple[int, ...]) -> None:
    make, _ = UNWRITABLE[how]
    done = there("config", "get", "parallel", preexec_fn=make(*streams))
    assert (done.code, done.out) == ((ExitCode.OUTPUT, "") if 1 in streams else (ExitCode.DONE, "2\n"))
    assert done.err == ""


@pytest.mark.parametrize(
    ("how", "streams"),
    [("full", (1,)), ("full", (2,)), ("full", (1, 2)), ("closed", (1, 2)), ("deaf", (1,)), ("deaf", (2,))],
)
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("clone {nobody} {nobody} web --output json", ExitCode.CONNECT),
        ("clone a b web --route sideways --output json", ExitCode.USAGE),
    ],
)
def test_a_failure_keeps_its_code(nobody: str, how: str, streams: tuple[int, ...], words: str, code: int) -> None:
    make, _ = UNWRITABLE[how]
    done = there(*words.format(nobody=nobody).split(), preexec_fn=make(*streams))
    assert done.code == code
    assert LOST not in done.err
    assert "Traceback" not in done.err
    assert "Exception ignored" not in done.err


def test_what_a_closed_stream_leaves_is_not_used_for_another_thing() -> None:
    """The number of a closed stdout must not become that of a file or socket, which would get what is printed."""
    script = (
        "from kvm_clone.cli import streams; import os, socket; streams.own(); s = socket.socket(); print('x' * 9999);"
        " assert s.fileno() > 2 and os.readlink('/proc/self/fd/1') == '/dev/null'"
    )
    done = there(python=("-c", script), preexec_fn=closed(0, 1, 2), capture_output=False)
    assert done.code == 0


SLOW = """
import sys, time
from kvm_clone.cli import streams
streams.own()
began = time.monotonic()
with streams.hurried():
    for number in range(5000):
        print(f"progress {number:09}", file=sys.stderr)
print(time.monotonic() - began, flush=True)
print("the end" + "." * 8000, file=sys.stderr)
"""


def test_a_reader_that_does_not_read_holds_up_no_operation() -> None:
    """Hosts would take us for dead. What is said once they are left waits for its reader."""
    argv = [sys.executable, "-c", SLOW]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stderr
        assert float(child.stdout.readline()) < 10
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        lines = child.stderr.read().splitlines()
        assert child.wait(10) == 0
    assert lines[-1] == "the end" + "." * 8000
    assert lines[:-1] == [f"progress {number:09}" for number in range(len(lines) - 1)], "and no line has a hole"
    assert 1000 < len(lines) < 5000


def test_a_pipe_that_is_not_blocking_gets_everything() -> None:
    source, into = os.pipe()
    os.set_blocking(into, False)
    before = os.write(into, b"x" * 65530)
    child = subprocess.Popen([sys.executable, *MODULE, "config", "list"], stdout=into)
    os.close(into)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(2)
    with open(source, "rb") as reader:
        content = reader.read()[before:]
    assert child.wait(10) == 0
    assert content.decode() == there("config", "list").out


ODD = "größe漢字 'a\"b"


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_names_are_printed_whatever_the_locale(home: Path, variables: dict[str, str]) -> None:
    OperationLog("0123456789ab", vm=ODD, name=ODD, source=ODD, destination=ODD).end(KEPT, ODD)
    environment = {**os.environ, **variables}
    done = there("status", "0123456789ab", env=environment, encoding="utf-8", errors="replace")
    assert (done.code, done.err) == (ExitCode.DONE, "")
    if "PYTHONIOENCODING" not in variables:
        assert ODD in done.out
    document = there("status", "0123456789ab", "--output", "json", env=environment).document
    assert document["vm"] == document["log"][-1]["text"] == ODD
    done = there("config", "get", ODD, env=environment, encoding="utf-8", errors="replace")
    assert done.code == ExitCode.USAGE
    assert "no setting is named" in done.err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_path_that_is_no_text_is_printed_and_makes_no_bad_json(locale: str, tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/a\xff\xe6\xbc\xa2\xed\xa0\x80.yaml"
    Path(os.fsdecode(file)).write_text("parallel: 7\n")
    environment = {**os.environ, "LC_ALL": locale}
    assert there("config", "get", "parallel", "--config", file, env=environment).out == "7\n"
    done = there("config", "path", "--config", file, "--output", "json", env=environment)
    assert done.out.isascii()
    shown = f"{tmp_path}/a\\udcff漢\\udced\\udca0\\udc80.yaml"
    assert done.document == {"path": shown, "exists": True}
    assert there("config", "path", "--config", file, env=environment, encoding="utf-8").out == f"{shown}\n"


UTF8, NO_UTF8 = {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("words", "variables"),
    [("clone a b {}", UTF8), ("sync a b c --target-name {}", NO_UTF8), ("list {}", UTF8), ("status {}", NO_UTF8)],
)
def test_a_word_that_is_no_utf8(words: str, variables: dict[str, str]) -> None:
    argv = [b"gr\xf6\xdfe" if word == "{}" else word.encode() for word in words.split()]
    done = there(*argv, "--output", "json", env={**os.environ, **variables})
    assert (done.code, done.error["type"]) == (ExitCode.USAGE, "UsageError")
    assert "is not UTF-8 text: 'gr\\udcf6\\udcdfe'" in done.error["message"]
    assert len(done.err.splitlines()) == 2


@pytest.mark.parametrize("empty", ["", " ", "\t"])
@pytest.mark.parametrize(
    ("words", "called"),
    [
        ("clone {} b vm", "SRC"),
        ("clone a {} vm", "DST"),
        ("clone a b {}", "VM"),
        ("clone a b vm --new-name {}", "--new-name"),
        ("clone a b vm --pool {}", "--pool"),
        ("sync {} b vm", "SRC"),
        ("sync a {} vm", "DST"),
        ("sync a b {}", "VM"),
        ("sync a b vm --target-name {}", "--target-name"),
        ("sync a b vm --pool {}", "--pool"),
        ("list a {}", "HOST"),
        ("cleanup {}", "HOST"),
        ("status {}", "ID"),
        ("status --host {}", "--host"),
    ],
)
def test_a_name_that_is_empty(here: Run, words: str, called: str, empty: str) -> None:
    done = here(*(word.replace("{}", empty) for word in words.split(" ")))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert done.err.splitlines()[0] == f"kvm-clone: {called} is empty"


@contextmanager
def connecting(*words: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A `list` of a host that takes connections and says nothing, and our end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ssh://root@127.0.0.1:{server.getsockname()[1]}"
        argv = [sys.executable, *MODULE, "list", address, "--ssh-option", "ConnectTimeout=50", *words]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        try:
            server.settimeout(20)
            connection, _ = server.accept()
            with connection:
                yield child, connection
        finally:
            child.kill()
            child.communicate()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    """As nohup starts a command, or a script's shell one behind which it puts an &."""
    with connecting(preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)) as (child, connection):
        child.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        connection.close()
        _, err = child.communicate(timeout=20)
    assert child.returncode == ExitCode.CONNECT, err
    assert "stopping" not in err


@pytest.mark.parametrize(
    ("number", "code", "unwritable"),
    [
        (signal.SIGHUP, ExitCode.TRANSFER, ()),
        (signal.SIGTERM, ExitCode.TRANSFER, (2,)),
        (signal.SIGINT, ExitCode.CANCELLED, ()),
        (signal.SIGINT, ExitCode.CANCELLED, (2,)),
    ],
)
def test_a_signal_stops_the_command(number: signal.Signals, code: int, unwritable: tuple[int, ...]) -> None:
    with connecting("--output", "json", preexec_fn=full(*unwritable)) as (child, _):
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert child.returncode == code, err
    assert json.loads(out)["error"]["exit_code"] == code
    assert ("stopping in good order" in err) is (not unwritable)


@pytest.fixture
def running(home: Path) -> str:
    """An operation that goes on for as long as this process."""
    OperationLog("0123456789ab", source="kc-a", destination="kc-b", vm="web", name="web", action="clone")
    return "0123456789ab"


@contextmanager
def following(operation: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, *MODULE, "status", operation, "--follow", *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            assert "running" in child.stdout.readline()
            assert "begin clone" in child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_nobody_is_followed_for_nobody(running: str) -> None:
    with following(running) as child:
        assert child.stdout
        child.stdout.close()
        assert child.wait(10) == ExitCode.OUTPUT
        assert child.stderr
        assert child.stderr.read().startswith(LOST + "Broken pipe")


def test_ctrl_c_where_nothing_is_under_way(running: str) -> None:
    with following(running) as child:
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert child.stderr
        assert child.stderr.read() == "kvm-clone: stopped by Ctrl-C\n"
        assert child.wait(10) == ExitCode.CANCELLED


BROKEN = """
import sys
from kvm_clone import cli
from kvm_clone.cli import listing
async def broken(*_):
    raise BrokenPipeError(32, "Broken pipe")
listing._list = broken
sys.argv[0] = "kvm-clone"
cli.main()
"""


def test_a_broken_pipe_of_another_kind_is_said() -> None:
    done = there("list", "kc-a", python=("-c", BROKEN))
    assert (done.code, done.out) == (ExitCode.BUG, "")
    assert "BrokenPipeError" in done.err
