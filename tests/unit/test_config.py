from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from confighome import config_file, own_home, read, write  # noqa: F401 - the fixtures `file` and `home`
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvm_clone.cli.config import config_app
from kvm_clone.errors import UsageError
from kvm_clone.options import Route
from kvm_clone.settings import config
from kvm_clone.settings.config import KEYS, Layer, Origin, Output, Settings, get_value, load_settings
from kvm_clone.settings.config_file import init_file, set_value, unset_value


def test_without_anything_there_are_the_defaults(home: Path) -> None:
    loaded = load_settings(None, {"verify": None, "parallel": None})
    assert loaded.settings.model_dump() == {
        "ssh_config_path": None,
        "ssh_key_path": None,
        "ssh_options": (),
        "connect_timeout": 10,
        "connect_retries": 3,
        "route": "auto",
        "parallel": 2,
        "bandwidth_limit": None,
        "timeout": None,
        "pool": None,
        "verify": True,
        "log_level": "warning",
        "output": "text",
    }
    assert loaded.origins == dict.fromkeys(KEYS, Origin(Layer.DEFAULT))
    assert loaded.path == home / ".config/kvm-clone/config.yaml"


def test_flag_beats_environment_beats_file_beats_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "parallel: 3\nroute: relay\npool: slow\n")
    monkeypatch.setenv("KVM_CLONE_PARALLEL", "4")
    monkeypatch.setenv("KVM_CLONE_ROUTE", "direct")
    loaded = load_settings(file, {"parallel": 5, "verify": False, "route": None})
    settings = loaded.settings
    assert (settings.parallel, settings.route, settings.pool, settings.verify, settings.connect_timeout) == (
        5, Route.DIRECT, "slow", False, 10,
    )  # fmt: skip
    assert {key: str(origin) for key, origin in loaded.origins.items() if origin.layer is not Layer.DEFAULT} == {
        "parallel": "flag",
        "verify": "flag",
        "route": "environment KVM_CLONE_ROUTE",
        "pool": f"file {file}",
    }


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(None, {}).settings.parallel = 3


def test_an_empty_or_unknown_variable_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM_CLONE_POOL", "")
    monkeypatch.setenv("KVM_CLONE_PARALEL", "nonsense")
    assert load_settings(None, {}).settings == Settings()


def test_settings_by_themselves_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM_CLONE_PARALLEL", "9")
    assert Settings().parallel == 2


@pytest.mark.parametrize(
    ("named", "variable", "xdg", "expected"),
    [
        (None, None, None, "{home}/.config/kvm-clone/config.yaml"),
        (None, None, "/x", "/x/kvm-clone/config.yaml"),
        (None, None, "relative", "{home}/.config/kvm-clone/config.yaml"),
        (None, "/var.yaml", "/x", "/var.yaml"),
        (None, "", "/x", "/x/kvm-clone/config.yaml"),
        ("/flag.yaml", "/var.yaml", "/x", "/flag.yaml"),
        ("~/flag.yaml", None, None, "{home}/flag.yaml"),
    ],
)
def test_which_file(
    named: str | None,
    variable: str | None,
    xdg: str | None,
    expected: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("KVM_CLONE_CONFIG", variable), ("XDG_CONFIG_HOME", xdg)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert config.config_file(Path(named) if named else None) == Path(expected.format(home=home))


def test_a_named_file_that_is_missing_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"{file}: no such configuration file"):
        load_settings(file, {})
    monkeypatch.setenv("KVM_CLONE_CONFIG", str(file))
    with pytest.raises(UsageError, match=f"{file}: no such configuration file"):
        load_settings(None, {})


GOOD = [
    ("ssh_config_path", "~/.ssh/work", "{home}/.ssh/work"),
    ("ssh_key_path", "/keys/id", "/keys/id"),
    ("ssh_options", "A=b,C=d", ("A=b", "C=d")),
    ("ssh_options", " A=b , C=d,", ("A=b", "C=d")),
    ("ssh_options", '["Ciphers=a,b", "C=d"]', ("Ciphers=a,b", "C=d")),
    ("ssh_options", "ProxyCommand=nc -X 5 %h=%p", ("ProxyCommand=nc -X 5 %h=%p",)),
    ("ssh_options", "[]", ()),
    ("connect_timeout", "1", 1),
    ("connect_timeout", "600", 600),
    ("connect_retries", "0", 0),
    ("connect_retries", "20", 20),
    ("route", "direct", "direct"),
    ("route", "RELAY", "relay"),
    ("parallel", "64", 64),
    ("bandwidth_limit", "100M", "100M"),
    ("bandwidth_limit", "1048576", "1048576"),
    ("timeout", "1h30m", "1h30m"),
    ("timeout", "90", "90"),
    ("pool", "fast ssd", "fast ssd"),
    ("pool", "yes", "yes"),
    ("pool", "#1: [x]", "#1: [x]"),
    ("verify", "false", False),
    ("verify", "yes", True),
    ("log_level", "DEBUG", "debug"),
    ("output", "json", "json"),
]

BAD = [
    ("ssh_config_path", "  ", "path of a file"),
    ("ssh_key_path", "~no-such-user-here/id", "path of a file"),
    ("ssh_options", "A", "Key=Value pairs"),
    ("ssh_options", "Ciphers=a,b", "Key=Value pairs"),
    ("ssh_options", "-oA=b", "Key=Value pairs"),
    ("ssh_options", "A=", "Key=Value pairs"),
    ("ssh_options", '["A=b"', "Key=Value pairs"),
    ("ssh_options", "[1]", "Key=Value pairs"),
    ("ssh_options", "[" * 10_000 + "]" * 10_000, "Key=Value pairs"),
    ("connect_timeout", "0", "a whole number from 1 to 600"),
    ("connect_timeout", "601", "a whole number from 1 to 600"),
    ("connect_timeout", "1.5", "a whole number from 1 to 600"),
    ("connect_retries", "-1", "a whole number from 0 to 20"),
    ("connect_retries", "21", "a whole number from 0 to 20"),
    ("route", "scenic", "auto, direct or relay"),
    ("parallel", "0", "a whole number from 1 to 64"),
    ("parallel", "65", "a whole number from 1 to 64"),
    ("parallel", "two", "a whole number from 1 to 64"),
    ("bandwidth_limit", "0", "bytes per second"),
    ("bandwidth_limit", "fast", "bytes per second"),
    ("timeout", "0", "not zero"),
    ("timeout", "soon", "a number of seconds, or days"),
    ("pool", "a\nb", "the name of a storage pool"),
    ("pool", "a\x1b[31m", "the name of a storage pool"),
    ("verify", "maybe", "true or false"),
    ("log_level", "loud", "debug, info, warning or error"),
    ("output", "xml", "text or json"),
]


@pytest.mark.parametrize(("key", "text", "expected"), GOOD)
def test_a_good_value_means_the_same_in_every_layer(
    key: str, text: str, expected: object, file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Path(expected.format(home=home)) if key.endswith("_path") and isinstance(expected, str) else expected
    flag = load_settings(None, {key: text})
    assert (get_value(flag, key), flag.origins[key].layer) == (wanted, Layer.FLAG)
    monkeypatch.setenv(f"KVM_CLONE_{key.upper()}", text)
    environment = load_settings(None, {})
    assert (get_value(environment, key), environment.origins[key].layer) == (wanted, Layer.ENVIRONMENT)
    monkeypatch.delenv(f"KVM_CLONE_{key.upper()}")
    set_value(file, key, text)
    loaded = load_settings(file, {})
    assert (get_value(loaded, key), loaded.origins[key]) == (wanted, Origin(Layer.FILE, str(file)))


@pytest.mark.parametrize(("key", "text", "accepted"), BAD)
def test_a_bad_value_is_refused_by_name_in_every_layer(
    key: str, text: str, accepted: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"KVM_CLONE_{key.upper()}"
    write(file, f"# one\n{key}: {json.dumps(text)}\n")
    with pytest.raises(UsageError) as from_file:
        load_settings(file, {})
    with pytest.raises(UsageError) as from_flag:
        load_settings(None, {key: text})
    with pytest.raises(UsageError) as from_set:
        set_value(file, key, text)
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError) as from_environment:
        load_settings(None, {})
    for error, start in (
        (from_file, f"{file}, line 2: {key} cannot be "),
        (from_flag, f"{key} cannot be "),
        (from_set, f"{key} cannot be "),
        (from_environment, f"{variable}: {key} cannot be "),
    ):
        message = str(error.value)
        assert message.startswith(start)
        assert accepted in message.partition("; accepted is ")[2]


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("ssh_options: [A=b, C=d]", "ssh_options", ("A=b", "C=d")),
        ("ssh_options:\n- A=b\n- C=d", "ssh_options", ("A=b", "C=d")),
        ("ssh_options: A=b,C=d", "ssh_options", ("A=b", "C=d")),
        ("timeout: 90", "timeout", "90"),
        ("bandwidth_limit: 1048576", "bandwidth_limit", "1048576"),
        ("connect_timeout: '20'", "connect_timeout", 20),
        ("verify: no", "verify", False),
        ("verify: off", "verify", False),
        ("pool:", "pool", None),
        ("verify:", "verify", True),
        ("parallel: ~", "parallel", 2),
    ],
)
def test_how_the_file_may_put_it(line: str, key: str, expected: object, file: Path) -> None:
    loaded = load_settings(write(file, f"{line}\n"), {})
    assert get_value(loaded, key) == expected
    assert type(get_value(loaded, key)) is type(expected)


@pytest.mark.parametrize(
    "line",
    ["parallel: true", "parallel: 1.5", "pool: 7", "pool: true", "timeout: true", "pool: {a: b}",
     "pool: 2024-01-01", "ssh_options: {A: b}", "ssh_options: [[A=b]]", "route: 1", "ssh_key_path: 5",
     "parallel: [1]"],
)  # fmt: skip
def test_values_of_the_wrong_type_in_the_file_are_refused(line: str, file: Path) -> None:
    key = line.partition(":")[0]
    with pytest.raises(UsageError, match=f"line 1: {key} cannot be .*; accepted is "):
        load_settings(write(file, f"{line}\n"), {})


def test_a_bad_value_is_refused_even_where_a_flag_hides_it(file: Path) -> None:
    with pytest.raises(UsageError, match="line 1: parallel"):
        load_settings(write(file, "parallel: 0\n"), {"parallel": 3})


def test_several_bad_values_are_all_named(file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(write(file, "parallel: 0\nroute: x\n"), {})
    assert "line 1: parallel cannot be 0" in str(caught.value)
    assert "line 2: route cannot be 'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("paralel", "did you mean parallel?"),
        ("connect-timeout", "did you mean connect_timeout?"),
        ("zzz", "the settings are ssh_config_path, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, remedy: str, file: Path) -> None:
    write(file, f"verify: true\n{key}:\n")
    loaded = load_settings(None, {})
    for place, call in (
        (f"{file}, line 2: ", partial(load_settings, file, {})),
        ("", partial(load_settings, None, {key: 3})),
        ("", partial(get_value, loaded, key)),
        ("", partial(set_value, file, key, "3")),
        ("", partial(unset_value, None, key)),
        ("", partial(unset_value, None, key, ignore_missing=True)),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == f"{place}no setting is named {key!r}"
        assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("values", "rate", "seconds"),
    [({}, None, None), ({"bandwidth_limit": "1.5K/s", "timeout": "1m5s"}, 1536, 65.0)],
)
def test_limits_in_numbers(values: dict[str, object], rate: int | None, seconds: float | None) -> None:
    settings = load_settings(None, values).settings
    assert (settings.transfer.bandwidth_limit, settings.timeout_seconds) == (rate, seconds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\n", "is not valid YAML: line "),
        (b"pool: a\npool: b\n", "is not valid YAML: line 2: .*duplicate key"),
        (b"pool: *x\n", "is not valid YAML: line 1: .*undefined alias"),
        (b"pool: a\n---\npool: b\n", "is not valid YAML: line "),
        (b"pool: !!python/object:os.system x\n", "is not valid YAML: "),
        (b"pool: 2024-13-99\n", "is not valid YAML: "),
        (b"pool: !!int\n", "is not valid YAML: "),
        (b"!!int : a\n", "is not valid YAML: "),
        (b"[" * 1000, "is not valid YAML: "),
        (b"pool: \x07\n", "is not valid YAML: "),
        (b"pool: \xff\n", "is not UTF-8 text"),
        (b"- a\n", "does not hold settings"),
        (b"just text\n", "does not hold settings"),
        (b"!!omap [a: 1]\n", "does not hold settings"),
        (b"!!set {a}\n", "does not hold settings"),
    ],
)
def test_a_broken_file_is_one_clear_error(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    for call in (
        lambda: load_settings(file, {}),
        lambda: set_value(file, "pool", "x"),
        lambda: unset_value(file, "pool"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"parallel: 7\n"])
def test_a_pipe_is_as_good_as_a_file(content: bytes) -> None:
    """A shell's <(...)."""
    source, into = os.pipe()
    os.write(into, content)
    os.close(into)
    try:
        assert load_settings(Path(f"/dev/fd/{source}"), {}).settings.parallel == (7 if content else 2)
    finally:
        os.close(source)


def test_no_settings_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM_CLONE_CONFIG", os.devnull)
    assert load_settings(None, {}).settings == Settings()


@pytest.mark.parametrize("what", ["/dev/full", "/dev/zero", "a FIFO", "large", "a directory"])
def test_what_has_no_end_or_is_no_file_is_one_clear_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "named" if not what.startswith("/") else Path(what)
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a directory":
        path.mkdir()
    elif what == "large":
        path.write_text("# a comment\n" * 10)
        os.truncate(path, 1 << 30)
    with pytest.raises(UsageError, match=f"^cannot read {path}: .+$"):
        load_settings(path, {})
    monkeypatch.setenv("KVM_CLONE_CONFIG", str(path))
    with pytest.raises(UsageError, match=f"^cannot read {path}: .+$"):
        load_settings(None, {})
    with pytest.raises(UsageError, match=r"is not a file$|cannot read .*larger than"):
        set_value(path, "parallel", "3")


def test_the_file_does_not_grow_beyond_what_is_read(file: Path) -> None:
    set_value(file, "pool", "x" * 60_000)
    with pytest.raises(UsageError, match="would become too large"):
        set_value(file, "pool", "x" * 70_000)
    assert load_settings(file, {}).settings.pool == "x" * 60_000


BOMB = """\
pool: &a [x,x,x,x,x,x,x,x,x]
route: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]
verify: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]
timeout: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]
output: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]
log_level: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]
parallel: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]
ssh_options: [*g,*g,*g,*g,*g,*g,*g,*g,*g]
"""


@pytest.mark.parametrize("text", [BOMB, f"parallel: 0x{'f' * 60_000}\n", f"route: {'x' * 60_000}\n"])
def test_a_value_that_takes_pages_to_write_is_cut_short(text: str, file: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: .* cannot be") as caught:
        load_settings(write(file, text), {})
    assert len(str(caught.value)) < 5000


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, loop):
        with pytest.raises(UsageError, match=f"cannot read {path}: "):
            load_settings(path, {})
    with pytest.raises(UsageError, match=f"cannot (read|write) {loop}: "):
        set_value(loop, "pool", "x")


def test_only_files_are_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo):
        for call in (
            partial(set_value, path, "pool", "x"),
            partial(unset_value, path, "pool"),
            partial(init_file, path),
        ):
            with pytest.raises(UsageError, match=f"{path} is not a file"):
                call()


def test_a_directory_that_cannot_be_made_is_one_clear_error(file: Path) -> None:
    write(file, "")
    below = file / "sub" / "config.yaml"
    with pytest.raises(UsageError, match=f"cannot write {below}: "):
        set_value(below, "pool", "x")


@given(text=st.text(max_size=40))
def test_no_file_makes_reading_raise_anything_else(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    for content in (text, f"pool: {text}", f"ssh_options: [{text}"):
        write(file, content)
        try:
            load_settings(file, {})
        except UsageError as error:
            assert str(file) in str(error)


@dataclass(frozen=True)
class Globals:
    config_path: Path | None


root = typer.Typer()
root.add_typer(config_app, name="config")


@root.callback()
def root_callback(ctx: typer.Context, config: Path | None = typer.Option(None, "--config")) -> None:  # noqa: B008
    ctx.obj = Globals(config)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(root, list(arguments))
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--output", "json"))


def test_config_is_taken_before_and_after_the_command(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    run("--config", str(file), "config", "set", "pool", "a")
    assert run("config", "get", "pool", "--config", str(file)) == "a\n"
    run("--config", str(file), "config", "set", "pool", "b", "--config", str(other))
    assert (read(file), read(other)) == ("pool: a\n", "pool: b\n")


def test_cli_get(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "ssh_options: [A=b, C=d]\nverify: false\n")
    monkeypatch.setenv("KVM_CLONE_PARALLEL", "9")
    get = ("--config", str(file), "config", "get")
    assert run(*get, "ssh_options") == "A=b,C=d\n"
    assert run(*get, "verify") == "false\n"
    assert run(*get, "pool") == ""
    assert run(*get, "parallel") == "9\n"
    assert run_json(*get, "parallel") == {
        "key": "parallel",
        "value": 9,
        "origin": "environment",
        "detail": "KVM_CLONE_PARALLEL",
    }
    assert run_json(*get, "pool")["value"] is None
    assert run_json(*get, "ssh_options")["value"] == ["A=b", "C=d"]


def test_cli_set_and_unset_and_init_say_whether_they_changed(file: Path) -> None:
    at = ("--config", str(file), "config")
    for arguments in (("init",), ("set", "pool", "a"), ("unset", "pool")):
        again = ("unset", "pool", "--ignore-missing") if arguments[0] == "unset" else arguments
        action = " ".join(arguments[:2])
        assert run(*at, *arguments) == f"{action}: {file} changed\n"
        assert run(*at, *again) == f"{action}: {file} unchanged\n"
        assert run_json(*at, *again) == {"action": action, "path": str(file), "changed": False}


def test_cli_list(file: Path) -> None:
    write(file, "pool: '[red]fast'\n")
    at = ("--config", str(file), "config", "list")
    lines = run(*at).splitlines()
    assert [line.split()[0] for line in lines] == list(KEYS)
    assert f"pool             [red]fast  file {file}" in lines
    assert "timeout          -          default" in lines
    document = run_json(*at)
    assert document["path"] == str(file)
    assert list(document["settings"]) == list(KEYS)
    assert document["settings"]["pool"] == {"value": "[red]fast", "origin": "file", "detail": str(file)}


def test_cli_list_on_a_terminal_is_a_table(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, "pool: '[red]fast'\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    root(["--config", str(file), "config", "list"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "Key" in printed
    assert "[red]fast" in printed


def test_cli_path(home: Path, file: Path) -> None:
    default = home / ".config/kvm-clone/config.yaml"
    assert run("config", "path") == f"{default}\n"
    assert run_json("config", "path") == {"path": str(default), "exists": False}
    assert run("--config", str(file), "config", "path") == f"{file}\n"


def test_the_output_setting_is_the_default_form(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_value(file, "output", Output.JSON)
    at = ("--config", str(file), "config")
    for arguments in (
        ("get", "pool"),
        ("list",),
        ("path",),
        ("init",),
        ("set", "pool", "a"),
        ("unset", "pool"),
    ):
        assert isinstance(json.loads(run(*at, *arguments)), dict)
    assert run(*at, "get", "pool", "--output", "text") == ""
    monkeypatch.setenv("KVM_CLONE_OUTPUT", "text")
    assert run(*at, "get", "verify") == "true\n"


def test_cli_mends_a_broken_file(file: Path) -> None:
    write(file, "parallel: 0\nrout: x\n")
    at = ("--config", str(file), "config")
    assert run(*at, "path") == f"{file}\n"
    run(*at, "unset", "rout")
    run(*at, "set", "parallel", "2")
    assert run(*at, "get", "parallel") == "2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("get", "pol"), "no setting is named 'pol'"),
        (("set", "parallel", "0"), "parallel cannot be '0'; accepted is a whole number from 1 to 64"),
        (("unset", "pool"), "pool is not set in "),
        (("list", "--config", "/no/such/file"), "/no/such/file: no such configuration file"),
    ],
)
def test_cli_errors_are_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run("config", *arguments)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("command", ["get", "set", "unset", "list", "path", "init"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    printed = run("config", command, "--help")
    assert f"kvm-clone config {command}" in printed
    assert "--output" in printed
