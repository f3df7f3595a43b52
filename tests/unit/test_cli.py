"""The command line: exit codes, what goes to which stream, and that no failure shows a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from clihelp import Done, Run, in_this_process, own_home, port_that_refuses, there  # noqa: F401 - fixtures

from kvm_clone import cli
from kvm_clone.cli import clone, listing, output
from kvm_clone.cli.sync import split_verify
from kvm_clone.client import Request
from kvm_clone.errors import DomainExistsError, ExitCode, KvmCloneError, RefusedError
from kvm_clone.findings import Finding, Severity
from kvm_clone.options import CloneOptions, Options, Quiesce, Retry, Route, SyncOptions, TransferOptions, Verify
from kvm_clone.version import __version__


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by the words that name it."""
    groups: list[tuple[str, Any]] = [("", typer.main.get_command(cli.app))]
    for prefix, group in groups:
        for name, command in group.commands.items():
            words = f"{prefix} {name}".strip()
            if hasattr(command, "commands"):
                groups.append((words, command))
            else:
                yield words, command


COMMANDS = dict(commands())


def test_the_commands() -> None:
    assert sorted(COMMANDS) == sorted(
        ["apply", "cleanup", "clone", *(f"config {name}" for name in CONFIG), "list", "status", "sync"]
    )


CONFIG = ("get", "set", "unset", "list", "path", "init")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(here: Run, name: str) -> None:
    done = here(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert "Examples:" in done.out
    _, examples = done.out.split("Examples:")
    assert f"kvm-clone {name}" in examples


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_understood(name: str) -> None:
    command = COMMANDS[name]
    lines = [line for line in (command.epilog or "").splitlines() if line.startswith("kvm-clone ")]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        assert words[: len(name.split())] == name.split()
        command.make_context(name, words[len(name.split()) :])


def test_help_publishes_every_exit_code(here: Run) -> None:
    text = " ".join(here("-h").out.split())
    published = re.findall(r"(\d+) [a-zA-Z]", text[text.index("Exit codes:") :])
    assert published == [str(int(code)) for code in ExitCode]


def test_version(here: Run) -> None:
    assert here("--version") == Done(0, f"kvm-clone {__version__}\n", "")


def test_the_program_itself(nobody: str) -> None:
    assert there("--version") == Done(0, f"kvm-clone {__version__}\n", "")
    done = there("list", nobody)
    assert done.code == ExitCode.CONNECT
    assert "Connection refused" in done.err


CLONE = ("clone", "kc-a", "kc-b", "web")

MISUSED: list[tuple[tuple[str, ...], str]] = [
    (("frobnicate",), "frobnicate"),
    (("--frobnicate",), "--frobnicate"),
    (("clone",), "SRC"),
    (("clone", "kc-a", "kc-b"), "VM"),
    ((*CLONE, "more"), "more"),
    ((*CLONE, "--frobnicate"), "--frobnicate"),
    ((*CLONE, "--route", "sideways"), "sideways"),
    ((*CLONE, "--parallel", "many"), "--parallel"),
    ((*CLONE, "--parallel", "0"), "parallel"),
    ((*CLONE, "--bandwidth-limit", "fast"), "fast"),
    ((*CLONE, "--timeout", "soon"), "soon"),
    ((*CLONE, "--timeout", "0"), "timeout"),
    ((*CLONE, "--ssh-option", "Compression"), "Compression"),
    ((*CLONE, "--log-level", "chatty"), "chatty"),
    ((*CLONE, "--config", "/missing.yaml"), "/missing.yaml"),
    (("--config", "/missing.yaml", *CLONE), "/missing.yaml"),
    (("list",), "HOST"),
    (("list", "kc-a", "--state", "flying"), "flying"),
    (("config", "get", "frobnicate"), "frobnicate"),
    (("config", "set", "parallel", "many"), "many"),
    (("config", "unset", "parallel"), "parallel"),
    # an address
    (("list", "user@"), "user@"),
    (("list", "localhost", "two words"), "two words"),
    (("list", "--", "-oProxyCommand=x"), "-oProxyCommand=x"),
    (("clone", "ssh://kc-a:port", "kc-b", "web"), "ssh://kc-a:port"),
    (("clone", "kc-a", "ssh://kc-b/path", "web"), "ssh://kc-b/path"),
]


@pytest.mark.parametrize(("words", "quoted"), MISUSED)
def test_what_is_not_understood(here: Run, words: tuple[str, ...], quoted: str) -> None:
    done = here(*words)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert quoted in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [words for words, _ in MISUSED])
def test_what_is_not_understood_as_json(here: Run, words: tuple[str, ...]) -> None:
    end = words.index("--") if "--" in words else len(words)
    done = here(*words[:end], "--output", "json", *words[end:])
    assert done.code == ExitCode.USAGE
    assert (done.error["type"], done.error["exit_code"]) == ("UsageError", 2)
    assert done.error["message"]


@pytest.mark.parametrize("address", ["user@", "qemu+ssh://kc-a/system", "ssh://kc-a:port"])
def test_a_bad_address_says_what_a_good_one_is(here: Run, address: str) -> None:
    done = here("list", address)
    assert repr(address) in done.err
    assert "what to do: write an alias from ssh_config, user@host, ssh://user@host:port, or localhost" in done.err


def test_nothing_at_all_shows_the_help(here: Run) -> None:
    done = here()
    assert done.code == ExitCode.USAGE
    assert "clone" in done.out + done.err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("list", "--output", "json", "a"), True),
        (("list", "a", "--output=json"), True),
        (("list", "a", "--output", "text"), False),
        (("list", "a"), False),
        (("list", "json"), False),
        (("list", "--", "--output", "json"), False),
        (("list", "a", "--output"), False),
    ],
)
def test_json_is_wanted(words: tuple[str, ...], wanted: bool) -> None:
    assert output.json_wanted(["kvm-clone", *words]) is wanted


def test_a_host_that_refuses_connections(here: Run, nobody: str) -> None:
    started = time.monotonic()
    done = here("clone", nobody, nobody, "web")
    assert time.monotonic() - started < 10
    assert (done.code, done.out) == (ExitCode.CONNECT, "")
    assert f"kvm-clone: cannot connect to {nobody}" in done.err
    assert "Connection refused" in done.err
    assert "what to do: check that this works" in done.err


def test_an_error_of_clone_as_json(here: Run, nobody: str) -> None:
    done = here("clone", nobody, nobody, "web", "--output", "json")
    assert done.code == ExitCode.CONNECT
    assert (done.error["type"], done.error["exit_code"], done.error["subject"]) == ("ConnectError", 5, nobody)
    assert "Connection refused" in done.error["message"]
    assert "connect: connecting to" in done.err
    assert f"kvm-clone: {done.error['message']}" in done.err


def test_the_form_of_an_error_is_a_setting_too(
    here: Run, nobody: str, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    file = home / "config" / "kvm-clone" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("output: json\n")
    assert here("clone", nobody, nobody, "web").error["exit_code"] == 5
    assert here("clone", nobody, nobody, "web", "--output", "text").out == ""
    monkeypatch.setenv("KVM_CLONE_OUTPUT", "text")
    assert here("clone", nobody, nobody, "web").out == ""


def test_list_has_a_row_for_each_host(here: Run, nobody: str) -> None:
    done = here("list", nobody, nobody.replace("root@", "me@"))
    assert done.code == ExitCode.CONNECT
    heading, *rows = done.out.splitlines()
    assert heading.split()[:3] == ["host", "name", "state"]
    assert [row.split()[0] for row in rows] == [nobody, nobody.replace("root@", "me@")]
    assert all("error: cannot connect to" in row for row in rows)


def test_list_as_json_has_an_error_for_each_host(here: Run, nobody: str) -> None:
    done = here("list", nobody, nobody, "--output", "json")
    assert done.code == ExitCode.CONNECT
    hosts = done.document["hosts"]
    assert [(host["host"], host["vms"], host["error"]["exit_code"]) for host in hosts] == [(nobody, [], 5)] * 2


@pytest.mark.parametrize("option", ["--ssh-key", "--ssh-config"])
def test_a_file_for_ssh_that_is_not_there(here: Run, nobody: str, home: Path, option: str) -> None:
    missing = str(home / "missing")
    done = here("clone", nobody, nobody, "web", option, missing)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert missing in done.err
    assert option in done.err
    document = here("list", nobody, option, missing, "--output", "json")
    assert document.code == ExitCode.USAGE
    assert missing in document.document["hosts"][0]["error"]["message"]


def test_a_machine_without_ssh(here: Run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("PATH", str(home))
    done = here("clone", "kc-a", "kc-b", "web")
    assert done.code == ExitCode.CONNECT
    assert "this machine has no ssh" in done.err


def test_tries_again_with_growing_pauses(nobody: str, home: Path) -> None:
    """In a process of its own, because the log is set up once in each."""
    settings = home / "settings.yaml"
    settings.write_text("connect_retries: 2\n")
    environment = {name: value for name, value in os.environ.items() if name != "KVM_CLONE_CONNECT_RETRIES"}
    started = time.monotonic()
    done = there("list", nobody, "--config", str(settings), env=environment)
    assert time.monotonic() - started > 0.8 * (1 + 2)
    assert done.code == ExitCode.CONNECT
    log = [line for line in done.err.splitlines() if line.startswith("WARNING")]
    assert [line.rpartition("; ")[2] for line in log] == ["trying again in 1 s", "trying again in 2 s"]
    assert all(nobody in line and "Connection refused" in line for line in log)
    assert done.err.count("kvm-clone: ") == 1


def test_does_not_try_again_when_told_so(nobody: str, home: Path) -> None:
    settings = home / "settings.yaml"
    settings.write_text("connect_retries: 0\n")
    environment = {name: value for name, value in os.environ.items() if name != "KVM_CLONE_CONNECT_RETRIES"}
    done = there("--config", str(settings), "clone", nobody, nobody, "web", "-q", "--output", "json", env=environment)
    assert done.code == ExitCode.CONNECT
    assert done.error["type"] == "ConnectError"
    assert [line.split(":")[0].strip() for line in done.err.splitlines()] == ["kvm-clone", "what to do"]


async def defective(*_: object) -> list[Any]:
    raise LookupError("nobody expects this")


def test_an_unexpected_exception(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_list", defective)
    done = here("list", "kc-a")
    assert (done.code, done.out) == (ExitCode.BUG, "")
    assert done.err.splitlines() == [
        "kvm-clone: unexpected LookupError: nobody expects this",
        "  what to do: this is a bug: please report it with the output of --log-level debug",
    ]
    document = here("list", "kc-a", "--output", "json")
    assert (document.code, document.error["exit_code"]) == (ExitCode.BUG, 1)
    assert "LookupError" in document.error["message"]


DEFECTIVE = """
import sys
from kvm_clone import cli
from kvm_clone.cli import listing
async def defective(*_):
    raise LookupError("nobody expects this")
listing._list = defective
sys.argv[0] = "kvm-clone"
cli.main()
"""


@pytest.mark.parametrize(("level", "traceback"), [("info", False), ("debug", True)])
def test_a_traceback_is_for_those_who_ask(level: str, traceback: bool) -> None:
    done = there("list", "kc-a", "--log-level", level, python=("-c", DEFECTIVE))
    assert (done.code, done.out) == (ExitCode.BUG, "")
    assert ("Traceback" in done.err) is traceback
    assert done.err.count("kvm-clone: unexpected LookupError") == 1


@pytest.mark.parametrize("closed", [0, 2])
def test_a_closed_stream(nobody: str, closed: int) -> None:
    done = there("clone", nobody, nobody, "web", "--output", "json", preexec_fn=lambda: os.close(closed))
    assert done.code == ExitCode.CONNECT
    assert done.error["type"] == "ConnectError"


MANAGED = Finding("managed-save", Severity.BLOCKING, "web", "VM web has a saved memory image.", "start it")
TAKEN = Finding("domain-exists", Severity.BLOCKING, "web", "kc-b already has a VM named web.", "choose another name")


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (KvmCloneError("it failed"), ["kvm-clone: it failed"]),
        (KvmCloneError("it failed", remedy="mend it"), ["kvm-clone: it failed", "  what to do: mend it"]),
        (
            DomainExistsError("kc-b already has a VM named web", remedy="choose another name", findings=(TAKEN,)),
            ["kvm-clone: kc-b already has a VM named web", "  what to do: choose another name"],
        ),
        (
            RefusedError("both", remedy="all", findings=(MANAGED, TAKEN)),
            [
                "kvm-clone: refused, nothing was written:",
                "  - VM web has a saved memory image.",
                "    start it",
                "  - kc-b already has a VM named web.",
                "    choose another name",
            ],
        ),
    ],
)
def test_an_error_in_words_and_as_a_document(
    capsys: pytest.CaptureFixture[str], error: KvmCloneError, lines: list[str]
) -> None:
    output.report(error, as_json=False)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)
    output.report(error, as_json=True)
    out, err = capsys.readouterr()
    assert err.splitlines() == lines
    document = json.loads(out)["error"]
    assert document["type"] == type(error).__name__
    assert document["exit_code"] == error.exit_code
    assert (document["message"], document["remedy"]) == (str(error), error.remedy)
    found = [(one["code"], one["severity"], one["text"]) for one in document.get("findings", [])]
    assert found == [(one.code, "blocking", one.text) for one in error.findings]


SYNC = ("sync", "kc-a", "kc-b", "web")


@pytest.mark.parametrize(
    ("words", "split"),
    [
        ("sync a b vm --verify full", "sync a b vm --verify-full"),
        ("sync a b vm --verify=full", "sync a b vm --verify-full"),
        ("sync --verify full a b vm", "sync --verify-full a b vm"),
        ("--config f sync a b vm --verify full -q", "--config f sync a b vm --verify-full -q"),
        ("sync a b vm --verify", "sync a b vm --verify"),
        ("sync --verify a b full", "sync --verify a b full"),
        ("sync a b full --verify", "sync a b full --verify"),
        ("sync a b vm --verify sent", "sync a b vm --verify sent"),
        ("sync a b --verify -- full", "sync a b --verify -- full"),
        ("sync a b -- --verify full", "sync a b -- --verify full"),
        ("sync a b -- --verify=full", "sync a b -- --verify=full"),
        ("clone a b vm --verify full", "clone a b vm --verify full"),
        ("clone a b vm --verify=full", "clone a b vm --verify=full"),
        ("config set verify full", "config set verify full"),
        ("full", "full"),
        ("", ""),
    ],
)
def test_an_option_whose_value_may_be_left_out(words: str, split: str) -> None:
    assert split_verify(words.split()) == split.split()


CONTRADICTORY = [
    ("--force", "--resume"),
    ("--force", "--idempotent"),
    ("--idempotent", "--resume"),
    ("--no-verify", "--verify", "full"),
    ("--no-verify", "--verify=full"),
    ("--track", "--untrack"),
    ("--untrack", "--dry-run"),
    ("--untrack", "--plan-out", "web.plan"),
    ("--untrack", "--force", "--resume"),
]


@pytest.mark.parametrize("flags", CONTRADICTORY)
def test_flags_of_sync_that_contradict_each_other(here: Run, flags: tuple[str, ...]) -> None:
    done = here(*SYNC, *flags)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert "contradict" in done.err
    assert here(*SYNC, *flags, "--output", "json").error["type"] == "UsageError"


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (("sync", "kc-a", "kc-b"), "VM"),
        ((*SYNC, "--cleanup-existing"), "--cleanup-existing"),
        ((*SYNC, "--quiesce", "perhaps"), "perhaps"),
        ((*SYNC, "--preserve-mac"), "--preserve-mac"),
        ((*CLONE, "--target-name", "x"), "--target-name"),
        ((*CLONE, "--verify=full"), "--verify"),
        ((*SYNC, "--retries", "-1"), "--retries"),
    ],
)
def test_what_is_not_understood_of_sync(here: Run, words: tuple[str, ...], quoted: str) -> None:
    done = here(*words)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert quoted in done.err
    assert "Traceback" not in done.err


def asked_of(here: Run, monkeypatch: pytest.MonkeyPatch, *words: str) -> Options:
    """The options of the request that a clone or sync makes of its command line."""
    asked: list[Request] = []

    def hear(_settings: object, request: Request, **_: object) -> None:
        asked.append(request)

    monkeypatch.setattr(clone, "run_request", hear)
    assert here(*words).code == ExitCode.DONE
    (request,) = asked
    assert (request.source, request.destination, request.vm) == words[1:4]
    return request.options


def asked_of_sync(here: Run, monkeypatch: pytest.MonkeyPatch, *flags: str) -> SyncOptions:
    """What a sync with these flags asks for."""
    options = asked_of(here, monkeypatch, *SYNC, *flags)
    assert isinstance(options, SyncOptions)
    return options


MOVING = {"route": "relay", "parallel": "3", "bandwidth_limit": "1M", "verify": "no"}
MOVED = TransferOptions(Route.RELAY, 3, 1 << 20, Verify.OFF)


@pytest.mark.parametrize("command", [CLONE, SYNC])
def test_transfer_options_are_flags_and_settings(
    here: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    kind = SyncOptions if command is SYNC else CloneOptions
    assert asked_of(here, monkeypatch, *command) == kind()
    flags = [word for key, value in MOVING.items() if key != "verify" for word in (f"--{key.replace('_', '-')}", value)]
    assert asked_of(here, monkeypatch, *command, "--no-verify", *flags).transfer == MOVED
    for key, value in MOVING.items():
        monkeypatch.setenv(f"KVM_CLONE_{key.upper()}", value)
    assert asked_of(here, monkeypatch, *command).transfer == MOVED
    assert asked_of(here, monkeypatch, *command, "--bandwidth-limit", "2K").transfer.bandwidth_limit == 2048


@pytest.mark.parametrize(
    ("flags", "verify"),
    [
        ((), Verify.SENT),
        (("--verify",), Verify.SENT),
        (("--no-verify",), Verify.OFF),
        (("--verify", "full"), Verify.FULL),
        (("--verify=full",), Verify.FULL),
    ],
)
def test_how_much_a_sync_proves(
    here: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], verify: Verify
) -> None:
    assert asked_of_sync(here, monkeypatch, *flags) == SyncOptions(verify=verify)


def test_a_setting_is_as_good_as_a_flag_for_sync(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM_CLONE_VERIFY", "no")
    assert asked_of_sync(here, monkeypatch).verify is Verify.OFF
    assert asked_of_sync(here, monkeypatch, "--verify", "full").verify is Verify.FULL


def test_what_sync_is_asked_for(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--target-name copy --create --quiesce require --track --idempotent --no-keep-partial --retries 1 --wait"
    assert asked_of_sync(here, monkeypatch, *flags.split()) == SyncOptions(
        target_name="copy",
        create=True,
        quiesce=Quiesce.REQUIRE,
        track=True,
        retry=Retry.IDEMPOTENT,
        keep_partial=False,
        retries=1,
        wait=True,
    )
