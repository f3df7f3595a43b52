"""OpenSSH as the user has configured it: addresses, command lines, and what its failures mean."""

from __future__ import annotations

import errno
import os
import pwd
import re
import shlex
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvm_clone.agent.host.peer import FAST_CIPHERS, has_aes
from kvm_clone.errors import AuthenticationError, ConnectError, HostKeyError, UsageError
from kvm_clone.hosts.children import answer

LOCALHOST = "localhost"
"""The one name that means this machine without SSH."""

_KEEPALIVE_SECONDS = 5
_KEEPALIVE_COUNT = 3
"""Unless configured, a silent peer counts as gone after 15 seconds: ssh alone would wait for TCP to give up."""

_BATCH_KEEPALIVE = "300"
"""Debian's default in batch mode: the user did not ask for it."""

_PLAIN = re.compile("[A-Za-z0-9/._+-]*")
"""A path that means nothing else to a shell or to ssh."""

_REFUSED = ("Permission denied", "Too many authentication failures", "No more authentication methods")
_HOST_KEY = (
    "Host key verification failed",
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
    "host key is known for",
)
_NETWORK = (
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Connection closed",
    "Operation timed out",
    "No route to host",
    "Network is unreachable",
    "Temporary failure in name resolution",
    "Broken pipe",
    "not responding",
)


@dataclass(frozen=True)
class SshOptions:
    """What is passed through to OpenSSH. `connect_timeout`: seconds. `retries`: tries after the first."""

    config: Path | None = None
    key: Path | None = None
    options: tuple[str, ...] = ()
    connect_timeout: int = 10
    retries: int = 3


@dataclass(frozen=True)
class Address:
    """A host as the user named it (`text`), and as ssh is given it."""

    text: str
    target: str
    port: int | None = None

    @property
    def local(self) -> bool:
        """Whether this is the machine we run on, reached without SSH."""
        return self.text == LOCALHOST

    def argv(self) -> list[str]:
        """The words that name the host in an ssh command line."""
        port = ["-p", str(self.port)] if self.port is not None else []
        return [*port, "--", self.target]


def parse_address(text: str) -> Address:
    """An alias, `user@host`, `ssh://user@host:port`, or `localhost`. Raises UsageError."""
    remedy = "write an alias from ssh_config, user@host, ssh://user@host:port, or localhost"
    target, port = text, None
    if text.startswith("ssh://"):
        try:
            target, port = _parse_uri(text)
        except ValueError as error:
            raise UsageError(f"{text!r} is not an address: {error}", remedy=remedy) from None
    user, at, host = target.rpartition("@")
    malformed = not host or (at and not user) or "://" in target or not text.isprintable() or " " in text
    if malformed or target.startswith("-") or host.startswith("-"):  # ssh would take a dash for an option
        raise UsageError(f"{text!r} is not an address", remedy=remedy)
    return Address(text, target, port)


def _parse_uri(text: str) -> tuple[str, int | None]:
    parts = urlsplit(text)
    host, port = parts.hostname or "", parts.port
    if parts.path.strip("/") or parts.query or parts.fragment or parts.password or port == 0:
        raise ValueError("only a user, a host and a port have a place in it")
    # urlsplit gives the host in lower case, and an alias in ssh_config may have capitals.
    start = parts.netloc.lower().rindex(host)
    host = parts.netloc[start : start + len(host)]
    return (f"{unquote(parts.username)}@{host}" if parts.username else host), port


@dataclass(frozen=True)
class Effective:
    """What ssh makes of an address and the user's configuration (`ssh -G`), by lower-case keyword."""

    values: dict[str, str]

    def get(self, keyword: str) -> str:
        """The keyword's value, empty when ssh does not say."""
        return self.values.get(keyword, "")


def quoted(path: Path) -> str:
    """The path as a value in ssh's configuration: one word, in which nothing is expanded."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def base_argv(options: SshOptions) -> list[str]:
    """Ssh with the user's own options, without the host."""
    argv = ["ssh"]
    if options.config is not None:
        argv += ["-F", str(options.config)]
    if options.key is not None:  # -i would expand a % in it
        argv += ["-o", f"IdentityFile={quoted(options.key.absolute())}"]
    for option in options.options:
        argv += ["-o", option]
    return argv


async def effective(address: Address, options: SshOptions) -> Effective:
    """Ask ssh what it would do. Raises UsageError when it cannot read its configuration or key, ConnectError."""
    if options.key is not None:
        _check_key(options.key, address.text)
    argv = [*base_argv(options), "-G", "-T", *address.argv()]
    try:
        status, out, said = await _answer(argv)
    except FileNotFoundError as error:
        text = f"cannot connect to {address.text}: this machine has no ssh"
        raise ConnectError(text, subject=address.text, remedy="install openssh-client here") from error
    if status:
        raise _not_accepted("; ".join(said.splitlines()), address.text)
    pairs = (line.partition(" ") for line in out.splitlines())
    return Effective({keyword.lower(): value for keyword, _, value in pairs})


def _check_key(key: Path, host: str) -> None:
    """Raise UsageError unless it can be read: to ssh a key that is not there is no error, it tries the others."""
    try:
        if stat.S_ISDIR(key.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(key, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _not_accepted(f"identity file {key} not accessible: {error.strerror}", host) from error
    if "${" in str(key):
        raise _not_accepted(f"it would expand ${{...}} in the name of the identity file {key}", host)


def _not_accepted(said: str, host: str) -> UsageError:
    return UsageError(
        f"ssh does not accept its configuration: {said}",
        subject=host,
        remedy="check --ssh-config, --ssh-key, --ssh-option and your ssh_config",
    )


def with_plain_config(options: SshOptions, link: Path) -> SshOptions:
    """The same options, with a link to the configuration where its own path is more than a plain word.

    For a jump host ssh starts another one by a shell's command line, in which it neither quotes the path nor doubles
    a % of it.
    """
    if options.config is None or _PLAIN.fullmatch(str(options.config)):
        return options
    link.unlink(missing_ok=True)
    link.symlink_to(options.config.absolute())
    return replace(options, config=link)


async def default_ciphers() -> str:
    """The ciphers that ssh offers where no configuration has a say in them."""
    _, out, _ = await _answer(["ssh", "-F", os.devnull, "-G", "nobody"])
    return next((line.partition(" ")[2] for line in out.splitlines() if line.startswith("ciphers ")), "")


def policy(known: Effective, options: SshOptions, *, interactive: bool, ciphers: str = "") -> list[str]:
    """Options of ours, each only where the user's configuration leaves it open. `ciphers`: see default_ciphers."""
    wanted = {"LogLevel": "ERROR", "RemoteCommand": "none", "ClearAllForwardings": "yes", "ForwardX11": "no"}
    if known.get("stricthostkeychecking") in ("ask", ""):
        wanted["StrictHostKeyChecking"] = "yes"
    if known.get("connecttimeout") in ("none", "0", ""):
        wanted["ConnectTimeout"] = str(options.connect_timeout)
    batch = known.get("batchmode") == "yes"
    if known.get("serveraliveinterval") in ("0", "", _BATCH_KEEPALIVE if batch else ""):
        wanted["ServerAliveInterval"] = str(_KEEPALIVE_SECONDS)
        if known.get("serveralivecountmax") in ("3", ""):
            wanted["ServerAliveCountMax"] = str(_KEEPALIVE_COUNT)
    if ciphers and known.get("ciphers") == ciphers and has_aes():
        wanted["Ciphers"] = FAST_CIPHERS
    if not interactive:
        wanted["BatchMode"] = "yes"
    return [word for key, value in wanted.items() for word in ("-o", f"{key}={value}")]


def failure(host: str, stderr: str, status: int | None) -> ConnectError:
    """What ended a connection, from ssh's own words."""
    if any(text in stderr for text in _HOST_KEY):
        return HostKeyError(
            f"the key that {host} shows is unknown or has changed: {_last_line(stderr, _HOST_KEY)}",
            subject=host,
            remedy=f"make sure it is the right machine, then update known_hosts, as by: ssh {shlex.quote(host)}",
        )
    if any(text in stderr for text in _REFUSED):
        return AuthenticationError(
            f"{host} refused to let us in: {_last_line(stderr, _REFUSED)}",
            subject=host,
            remedy="check the user name and key (-i, --ssh-config), or load the key into ssh-agent",
        )
    said = _last_line(stderr)
    return ConnectError(
        f"cannot connect to {host}: {said or f'ssh ended with status {status}'}",
        subject=host,
        remedy=f"check that this works: ssh {shlex.quote(host)} true",
    )


def worth_retrying(error: ConnectError, stderr: str) -> bool:
    """Whether another try may help: for network faults only, never for a refused or wrong key."""
    refused = isinstance(error, (AuthenticationError, HostKeyError))
    return not refused and any(text in stderr for text in _NETWORK)


def _last_line(text: str, words: tuple[str, ...] = ("",)) -> str:
    """The last line that is not empty and has one of the words: behind a jump host, ssh's last line says little."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and any(word in line for word in words)]
    return lines[-1] if lines else ""


async def known_host_lines(known: Effective) -> list[str]:
    """The keys by which this machine knows the host, as `marker? type key` without host names."""
    port = known.get("port")
    names = [known.get("hostkeyalias") or known.get("hostname")]
    if not known.get("hostkeyalias") and port not in ("", "22"):
        names.insert(0, f"[{names[0]}]:{port}")
    for name in names:  # ssh too takes a key without a port where there is none for the port
        found = [line for file in _known_hosts_files(known) for line in await _lines_of(name, file)]
        if found:
            return found
    return []


def _known_hosts_files(known: Effective) -> list[Path]:
    """The files of keys that exist. ssh prints their names without quotes: a space may be a part of one."""
    found: list[Path] = []
    for keyword in ("userknownhostsfile", "globalknownhostsfile"):
        words = known.get(keyword).split(" ")
        while words:
            longest_first = range(len(words), 0, -1)
            count = next((n for n in longest_first if os.path.isfile(_home(" ".join(words[:n])))), 0)  # noqa: PTH113
            if count:
                found.append(_home(" ".join(words[:count])))
            del words[: count or 1]
    return found


def _home(text: str) -> Path:
    """The path as ssh takes it: `~` is the home that passwd names, whatever $HOME says."""
    start, slash, rest = text.partition("/")
    if start != "~":
        return Path(text)
    return Path(pwd.getpwuid(os.getuid()).pw_dir + slash + rest)


async def _lines_of(name: str, file: Path) -> list[str]:
    _, out, _ = await _answer(["ssh-keygen", "-F", name, "-f", str(file)])
    found: list[str] = []
    for line in out.splitlines():
        words = line.split()
        marker = [words.pop(0)] if words and words[0].startswith("@") else []
        if len(words) >= 3 and not line.startswith("#"):
            found.append(" ".join([*marker, *words[1:3]]))
    return found


async def _answer(argv: list[str]) -> tuple[int | None, str, str]:
    """The status of a command that ends soon, and what it writes."""
    status, out, err = await answer(argv)
    return status, os.fsdecode(out), err.decode(errors="replace")
