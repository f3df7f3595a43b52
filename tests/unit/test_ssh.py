"""ssh.py: addresses, and what the machine's own OpenSSH makes of configurations and known_hosts files."""

from __future__ import annotations

import asyncio
import os
import pwd
import subprocess
from pathlib import Path

import pytest

from kvm_clone.errors import AuthenticationError, ConnectError, ExitCode, HostKeyError, UsageError
from kvm_clone.hosts.ssh import (
    Address,
    Effective,
    SshOptions,
    base_argv,
    effective,
    failure,
    known_host_lines,
    parse_address,
    policy,
    quoted,
    with_plain_config,
    worth_retrying,
)


@pytest.mark.parametrize(
    ("text", "target", "port"),
    [
        ("kc-a", "kc-a", None),
        ("KC-a", "KC-a", None),
        ("root@kc-a", "root@kc-a", None),
        ("root@10.0.0.1", "root@10.0.0.1", None),
        ("me@example.org@kc-a", "me@example.org@kc-a", None),
        ("::1", "::1", None),
        ("root@fe80::1%eth0", "root@fe80::1%eth0", None),
        ("größe", "größe", None),
        ("ssh://kc-a", "kc-a", None),
        ("ssh://kc-a/", "kc-a", None),
        ("ssh://KC-a", "KC-a", None),
        ("ssh://Me@KC-a:22", "Me@KC-a", 22),
        ("ssh://root@kc-a:2222", "root@kc-a", 2222),
        ("ssh://kc-a:65535", "kc-a", 65535),
        ("ssh://kc-a:", "kc-a", None),
        ("ssh://[::1]:22", "::1", 22),
        ("ssh://[::1]", "::1", None),
        ("ssh://root@[fe80::A%eth0]:2222", "root@fe80::A%eth0", 2222),
        ("ssh://DOMAIN%5Cme@kc-a", "DOMAIN\\me@kc-a", None),
        ("ssh://@kc-a", "kc-a", None),
        ("localhost", "localhost", None),
        ("root@localhost", "root@localhost", None),
        ("ssh://localhost", "localhost", None),
        ("ssh://localhost:2222", "localhost", 2222),
    ],
)
def test_address(text: str, target: str, port: int | None) -> None:
    address = parse_address(text)
    assert address == Address(text, target, port)
    assert address.argv() == ([] if port is None else ["-p", str(port)]) + ["--", target]


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-oProxyCommand=x", "-", "root@-oProxyCommand=x", "ssh://-oProxyCommand=x", "ssh://root@-x",
        "user@", "@host", "@", "two words", " kc-a", "kc-a ", "kc\ta", "kc\na", "kc\0a", "kc\x1ba",
        "ssh://", "ssh:///", "ssh://:22", "ssh://root@", "ssh://root@:22", "ssh://root:secret@kc-a",
        "ssh://kc-a/path", "ssh://kc-a?query", "ssh://kc-a#part", "ssh://kc-a:port", "ssh://kc-a:0",
        "ssh://kc-a:65536", "ssh://kc-a:-1", "ssh://[::1", "ssh://::1]:22", "ssh://kc\n-a",
        "qemu+ssh://kc-a/system", "https://kc-a", "SSH://kc-a",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)
    assert "ssh://user@host:port" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("localhost", True),
        ("Localhost", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("root@localhost", False),
        ("ssh://localhost", False),
        ("ssh://localhost:2222", False),
    ],
)
def test_only_the_bare_name_means_this_machine(text: str, local: bool) -> None:
    assert parse_address(text).local is local


def configuration(tmp_path: Path, text: str) -> SshOptions:
    file = tmp_path / "ssh config"
    file.write_text(text)
    return SshOptions(config=file)


def ask(options: SshOptions, address: str = "kc-a") -> Effective:
    return asyncio.run(effective(parse_address(address), options))


@pytest.mark.parametrize("address", ["root@kc-a", "ssh://root@kc-a:2222", "ssh://root@[::1]:2222"])
def test_ssh_understands_an_address_as_we_do(tmp_path: Path, address: str) -> None:
    known = ask(configuration(tmp_path, ""), address)
    parsed = parse_address(address)
    assert f"{known.get('user')}@{known.get('hostname')}" == parsed.target
    assert known.get("port") == str(parsed.port or 22)


def test_an_alias_is_what_the_configuration_says(tmp_path: Path) -> None:
    options = configuration(tmp_path, "Host KC-a\n  HostName 10.9.8.7\n  Port 2222\n  User admin\n")
    for address in ("KC-a", "ssh://KC-a"):
        known = ask(options, address)
        assert [known.get(keyword) for keyword in ("hostname", "port", "user")] == ["10.9.8.7", "2222", "admin"]
    assert ask(options, "ssh://root@KC-a:24").get("port") == "24"


def test_a_keyword_that_ssh_does_not_print_is_empty() -> None:
    assert Effective({"port": "22"}).get("hostname") == ""


def in_force(options: SshOptions, *, interactive: bool = False) -> Effective:
    """What ssh makes of our command line: the user's options, then ours."""
    ours = policy(ask(options), options, interactive=interactive)
    argv = [*base_argv(options), *ours, "-G", "-T", "--", "kc-a"]
    out = subprocess.run(argv, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    return Effective(dict(line.split(" ", 1) for line in out.splitlines() if " " in line))


OPEN = {
    "stricthostkeychecking": "true",
    "connecttimeout": "10",
    "serveraliveinterval": "5",
    "serveralivecountmax": "3",
    "batchmode": "yes",
    "loglevel": "ERROR",
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", {}),
        ("StrictHostKeyChecking ask", {}),
        ("StrictHostKeyChecking yes", {}),
        ("StrictHostKeyChecking no", {"stricthostkeychecking": "false"}),
        ("StrictHostKeyChecking off", {"stricthostkeychecking": "false"}),
        ("StrictHostKeyChecking accept-new", {"stricthostkeychecking": "accept-new"}),
        ("ConnectTimeout 33", {"connecttimeout": "33"}),
        ("ServerAliveInterval 60", {"serveraliveinterval": "60"}),
        ("ServerAliveInterval 60\nServerAliveCountMax 9", {"serveraliveinterval": "60", "serveralivecountmax": "9"}),
        ("ServerAliveCountMax 9", {"serveralivecountmax": "9"}),
        ("BatchMode yes", {}),
        ("BatchMode yes\nServerAliveInterval 60", {"serveraliveinterval": "60"}),
        ("Host *.example.org\n  ConnectTimeout 33", {}),
        ("Host kc-*\n  ConnectTimeout 33\n  StrictHostKeyChecking yes", {"connecttimeout": "33"}),
        ("LogLevel VERBOSE", {}),
        ("ForwardX11 yes\nLocalForward 9999 localhost:9999\nRemoteCommand top", {}),
    ],
)  # fmt: skip
def test_policy_fills_what_the_configuration_leaves_open(tmp_path: Path, text: str, kept: dict[str, str]) -> None:
    known = in_force(configuration(tmp_path, text))
    assert {keyword: known.get(keyword) for keyword in OPEN} == {**OPEN, **kept}
    assert known.get("forwardx11") == "no"
    assert known.get("clearallforwardings") == "yes"
    assert known.get("remotecommand") in ("", "none")


@pytest.mark.parametrize(
    ("option", "keyword", "value"),
    [
        ("StrictHostKeyChecking=no", "stricthostkeychecking", "false"),
        ("ConnectTimeout=33", "connecttimeout", "33"),
        ("ServerAliveInterval=60", "serveraliveinterval", "60"),
        ("LogLevel=DEBUG", "loglevel", "DEBUG"),
        ("Port=2222", "port", "2222"),
        ("BatchMode=yes", "serveraliveinterval", "5"),
    ],
)
def test_an_option_on_the_command_line_goes_first(tmp_path: Path, option: str, keyword: str, value: str) -> None:
    file = configuration(tmp_path, "Port 24").config
    assert in_force(SshOptions(config=file, options=(option,))).get(keyword) == value


def test_connect_timeout_is_ours_to_choose(tmp_path: Path) -> None:
    file = configuration(tmp_path, "").config
    assert in_force(SshOptions(config=file, connect_timeout=7)).get("connecttimeout") == "7"


def test_only_on_a_terminal_may_ssh_ask(tmp_path: Path) -> None:
    options = configuration(tmp_path, "")
    assert in_force(options, interactive=True).get("batchmode") == "no"
    assert in_force(options).get("batchmode") == "yes"


def test_key_and_options_reach_ssh(tmp_path: Path) -> None:
    key = tmp_path / "my key"
    key.touch()
    file = configuration(tmp_path, "").config
    known = ask(SshOptions(config=file, key=key, options=("Port=2222", "Compression=yes")))
    assert [known.get(keyword) for keyword in ("identityfile", "port", "compression")] == [str(key), "2222", "yes"]


ODD = [
    "a b",
    "a  b",
    "a%d",
    "%%",
    "a'b",
    'a"b',
    "a\\b",
    "a\\",
    '\\"',
    "#a",
    "~a",
    "a=b",
    "größe",
    "$HOME",
    "a\udcff",
    "x" * 200,
]


@pytest.mark.parametrize("name", [*ODD, "x" * 200])
def test_a_path_is_one_word_to_ssh_whatever_is_in_it(tmp_path: Path, name: str) -> None:
    """A key is taken up where it is; -G shows it before % is expanded, a ControlPath after that."""
    directory = tmp_path / name
    directory.mkdir()
    (directory / f"{name}key").touch()
    file = directory / "config"
    file.write_text("Port 2222\n")
    options = SshOptions(config=file, key=directory / f"{name}key", options=(f"ControlPath={quoted(directory)}",))
    known = ask(options)
    assert known.get("port") == "2222"
    assert known.get("identityfile") == str(options.key).replace("%", "%%")
    assert known.get("controlpath") == str(directory)


def test_a_relative_key_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").touch()
    assert ask(SshOptions(config=configuration(tmp_path, "").config, key=Path("none"))).get("identityfile") == str(
        tmp_path / "none"
    )


def test_a_key_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"identity file {tmp_path} not accessible: Is a directory"):
        ask(SshOptions(key=tmp_path))
    odd = tmp_path / "${HOME}"
    odd.touch()
    with pytest.raises(UsageError, match=r"expand \$\{\.\.\.\} in the name"):
        ask(SshOptions(key=odd))


def test_a_key_that_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.touch()
    monkeypatch.setattr("os.access", lambda path, _mode: path != key)  # root may read everything
    with pytest.raises(UsageError, match="not accessible: Permission denied"):
        ask(SshOptions(key=key))


@pytest.mark.parametrize("name", ["config", "a b", "a%d", 'a"b', "größe"])
def test_the_configuration_for_a_jump_host_has_a_plain_path(tmp_path: Path, name: str) -> None:
    """-G does not show what ssh makes of ProxyJump."""
    place = tmp_path / name / "config"
    place.parent.mkdir()
    place.write_text(f"Host kc-a\n  ProxyJump kc-b\nHost kc-b\n  ProxyCommand touch '{tmp_path}/reached'\n")
    options = with_plain_config(SshOptions(config=place), tmp_path / "link")
    assert (options.config == place) is (name == "config")
    argv = [*base_argv(options), "-o", "BatchMode=yes", "kc-a", "true"]
    subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL)
    assert (tmp_path / "reached").exists()
    assert with_plain_config(SshOptions(config=place), tmp_path / "link") == options, "and once more"


def test_without_a_configuration_none_is_linked(tmp_path: Path) -> None:
    assert with_plain_config(SshOptions(), tmp_path / "link") == SshOptions()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("Frobnicate yes\n", (), ["frobnicate", "line 1"]),
        ("Port\n", (), ["line 1"]),
        ("", ("Frobnicate=yes",), ["frobnicate"]),
        ("", ("Port=none",), ["none"]),
    ],
)
def test_a_configuration_that_ssh_refuses(
    tmp_path: Path, text: str, options: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        ask(SshOptions(config=configuration(tmp_path, text).config, options=options))
    assert [word for word in words if word not in str(caught.value).lower()] == []
    assert caught.value.subject == "kc-a"
    assert "--ssh-option" in caught.value.remedy


@pytest.mark.parametrize("what", ["config", "key"])
def test_a_file_that_is_not_there(tmp_path: Path, what: str) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(UsageError, match=f"{missing}.*No such file"):
        ask(SshOptions(config=missing) if what == "config" else SshOptions(key=missing))


def test_a_machine_without_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectError, match="this machine has no ssh") as caught:
        ask(SshOptions())
    assert "install" in caught.value.remedy


REFUSED, KEY, NETWORK, OTHER = "refused", "host key", "network", "other"

CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Someone could be eavesdropping on you right now (man-in-the-middle attack)!
It is also possible that a host key has just been changed.
The fingerprint for the ED25519 key sent by the remote host is
SHA256:m+x4SVbVErUAHoNNT9RM/OhQ+qgPh/Mu/8CPRRLsm7s.
Please contact your system administrator.
Add correct host key in /root/.ssh/known_hosts to get rid of this message.
Offending ED25519 key in /root/.ssh/known_hosts:1
  remove with:
  ssh-keygen -f "/root/.ssh/known_hosts" -R "kc-a"
Host key for kc-a has changed and you have requested strict checking.
Host key verification failed.
"""

# What OpenSSH 9.2 writes with LogLevel ERROR: the kind of failure, its words, and which of them the error quotes.
SAID = [
    (REFUSED, "root@kc-a: Permission denied (publickey).", "Permission denied (publickey)"),
    (REFUSED, "root@kc-a: Permission denied (publickey,password,keyboard-interactive).", "publickey,password"),
    (REFUSED, "Received disconnect from 10.0.0.1 port 22:2: Too many authentication failures", "Too many"),
    (
        REFUSED,
        "Received disconnect from 10.0.0.1 port 22:2: Too many authentication failures\n"
        "Disconnected from 10.0.0.1 port 22",
        "Too many",
    ),
    (REFUSED, 'Load key "/root/.ssh/id": error in libcrypto\nroot@kc-a: Permission denied (publickey).', "publickey"),
    (
        REFUSED,
        "root@jump: Permission denied (publickey).\nkex_exchange_identification: Connection closed by remote host\n"
        "Connection closed by UNKNOWN port 65535",
        "root@jump: Permission denied",
    ),
    (
        KEY,
        "No ED25519 host key is known for kc-a and you have requested strict checking.\nHost key verification failed.",
        "Host key verification failed",
    ),
    (KEY, CHANGED, "Host key verification failed"),
    (
        KEY,
        "No ED25519 host key is known for jump and you have requested strict checking.\n"
        "Host key verification failed.\nkex_exchange_identification: Connection closed by remote host",
        "Host key verification failed",
    ),
    (NETWORK, "ssh: connect to host kc-a port 22: Connection refused", "Connection refused"),
    (NETWORK, "ssh: connect to host kc-a port 22: Connection timed out", "Connection timed out"),
    (NETWORK, "ssh: connect to host kc-a port 22: No route to host", "No route to host"),
    (NETWORK, "ssh: connect to host kc-a port 22: Network is unreachable", "Network is unreachable"),
    (NETWORK, "Connection timed out during banner exchange", "banner exchange"),
    (NETWORK, "kex_exchange_identification: Connection closed by remote host", "Connection closed"),
    (NETWORK, "kex_exchange_identification: read: Connection reset by peer", "Connection reset"),
    (NETWORK, "Connection closed by 10.0.0.1 port 22", "Connection closed"),
    (NETWORK, "client_loop: send disconnect: Broken pipe", "Broken pipe"),
    (NETWORK, "Timeout, server kc-a not responding.", "not responding"),
    (
        NETWORK,
        "ssh: Could not resolve hostname kc-a: Temporary failure in name resolution",
        "Temporary failure in name resolution",
    ),
    (
        NETWORK,
        "ssh: connect to host jump port 22: Connection refused\n"
        "kex_exchange_identification: Connection closed by remote host",
        "Connection closed by remote host",
    ),
    (OTHER, "ssh: Could not resolve hostname kc-a: Name or service not known", "Name or service not known"),
    (
        OTHER,
        "Unable to negotiate with 10.0.0.1 port 22: no matching host key type found. Their offer: ssh-rsa",
        "Their offer: ssh-rsa",
    ),
    (OTHER, "This account is currently not available.", "not available"),
    (OTHER, "", "status 255"),
    (OTHER, " \r\n", "status 255"),
]
KINDS = {REFUSED: AuthenticationError, KEY: HostKeyError, NETWORK: ConnectError, OTHER: ConnectError}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("kind", "stderr", "quoted"), SAID)
def test_what_a_failure_means(kind: str, stderr: str, quoted: str, end: str) -> None:
    words = stderr.replace("\n", end)
    error = failure("root@kc-a", words, 255)
    assert type(error) is KINDS[kind]
    assert error.exit_code is ExitCode.CONNECT
    assert quoted in str(error)
    assert len(str(error).splitlines()) == 1
    assert error.subject == "root@kc-a"
    assert error.remedy
    assert worth_retrying(error, words) is (kind == NETWORK)


def test_the_remedy_can_be_pasted_into_a_shell() -> None:
    assert "ssh 'a;b'" in failure("a;b", "", 255).remedy


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Public keys as `type key`, made by ssh-keygen."""
    directory = tmp_path_factory.mktemp("keys")
    made = {}
    for name in ("one", "two", "authority"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
        made[name] = " ".join((directory / f"{name}.pub").read_text().split()[:2])
    return made


KNOWN = """\
# kc-a is here, not ssh-ed25519 AAAA
kc-a,10.0.0.1 {one} root@kc-a with a comment
[kc-a]:2222 {two}
portless {one}
alias {two}
@cert-authority *.example.org {authority} the CA
@revoked bad.example.org {two}
kc-b {one}
kc-b {two}

"""


@pytest.mark.parametrize(
    ("host", "settings", "expected"),
    [
        ("kc-a", "", ["one"]),
        ("10.0.0.1", "", ["one"]),
        ("KC-A", "", ["one"]),
        ("kc-a", "Port 22", ["one"]),
        ("kc-a", "Port 2222", ["two"]),
        ("portless", "Port 2222", ["one"]),
        ("short", "HostName kc-a", ["one"]),
        ("short", "HostName kc-a\nPort 2222", ["two"]),
        ("kc-a", "HostKeyAlias alias", ["two"]),
        ("kc-a", "HostKeyAlias alias\nPort 2222", ["two"]),
        ("web.example.org", "", ["@cert-authority authority"]),
        ("bad.example.org", "", ["@cert-authority authority", "@revoked two"]),
        ("kc-b", "", ["one", "two"]),
        ("stranger", "", []),
        ("stranger", "Port 2222", []),
    ],
)
@pytest.mark.parametrize("hashed", [False, True])
def test_known_hosts(
    tmp_path: Path, keys: dict[str, str], host: str, settings: str, expected: list[str], hashed: bool
) -> None:
    file = tmp_path / "known"
    file.write_text(KNOWN.format(**keys))
    if hashed:
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
        assert "kc-a," not in file.read_text()
    text = f"UserKnownHostsFile {file}\nGlobalKnownHostsFile none\n{settings}\n"
    known = ask(configuration(tmp_path, text), host)
    wanted = [" ".join(keys.get(word, word) for word in line.split()) for line in expected]
    assert asyncio.run(known_host_lines(known)) == wanted


def test_known_hosts_of_every_file(tmp_path: Path, keys: dict[str, str]) -> None:
    for file, key in (("first", "one"), ("second", "two"), ("global", "authority")):
        (tmp_path / file).write_text(f"kc-a {keys[key]}\n")
    text = (
        f"UserKnownHostsFile {tmp_path}/first {tmp_path}/missing {tmp_path}/second\n"
        f"GlobalKnownHostsFile {tmp_path}/global\n"
    )
    known = ask(configuration(tmp_path, text))
    assert asyncio.run(known_host_lines(known)) == [keys["one"], keys["two"], keys["authority"]]


@pytest.mark.parametrize(
    "names",
    [
        ["known hosts"],
        ["known  hosts", "more"],
        ["known", "known hosts", "hosts"],
        ["a%b", "a'b c", 'a"b'],
        ["missing", "a b", "missing too", "c"],
    ],
)
def test_known_hosts_whose_names_have_spaces(tmp_path: Path, keys: dict[str, str], names: list[str]) -> None:
    present = [name for name in names if "missing" not in name]
    for name in present:
        (tmp_path / name).write_text(f"kc-a {keys['one']}\n")
    text = " ".join(quoted(tmp_path / name) for name in names)
    known = ask(
        configuration(tmp_path, f"UserKnownHostsFile {text}\nGlobalKnownHostsFile {quoted(tmp_path / 'none')}\n")
    )
    assert asyncio.run(known_host_lines(known)) == [keys["one"]] * len(present)


def test_home_is_what_ssh_takes_for_it(tmp_path: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh asks passwd; $HOME may be another place."""
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    (tmp_path / "known").write_text(f"kc-a {keys['one']}\n")
    entry = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd((*entry[:5], str(tmp_path), entry[6])))
    known = Effective({"hostname": "kc-a", "userknownhostsfile": "~/known", "globalknownhostsfile": "none"})
    assert asyncio.run(known_host_lines(known)) == [keys["one"]]


def test_no_known_hosts(tmp_path: Path) -> None:
    known = ask(configuration(tmp_path, "UserKnownHostsFile none\nGlobalKnownHostsFile none\n"))
    assert asyncio.run(known_host_lines(known)) == []
