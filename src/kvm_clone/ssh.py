"""OpenSSH as the user has configured it: addresses, command lines, and what its failures mean."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvm_clone.errors import AuthenticationError, ConnectError, HostKeyError, UsageError

LOCALHOST = "localhost"
"""The one name that means this machine without SSH."""

_KEEPALIVE_SECONDS = 5
_KEEPALIVE_COUNT = 3
"""Unless configured, a silent peer counts as gone after 15 seconds: ssh alone would wait for TCP to give up."""

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
        return self.target == LOCALHOST

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
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{text!r} is not an address: {error}", remedy=remedy) from None
        if not host or parts.path.strip("/") or parts.query or parts.password:
            raise UsageError(f"{text!r} is not an address", remedy=remedy)
        target = f"{parts.username}@{host}" if parts.username else host
    if not target or target.startswith("-") or any(character.isspace() for character in target):
        raise UsageError(f"{text!r} is not an address", remedy=remedy)
    return Address(text, target, port)


@dataclass(frozen=True)
class Effective:
    """What ssh makes of an address and the user's configuration (`ssh -G`), by lower-case keyword."""

    values: dict[str, str]

    def get(self, keyword: str) -> str:
        """The keyword's value, empty when ssh does not say."""
        return self.values.get(keyword, "")


def base_argv(options: SshOptions) -> list[str]:
    """Ssh with the user's own options, without the host."""
    argv = ["ssh"]
    if options.config is not None:
        argv += ["-F", str(options.config)]
    if options.key is not None:
        argv += ["-i", str(options.key)]
    for option in options.options:
        argv += ["-o", option]
    return argv


async def effective(address: Address, options: SshOptions) -> Effective:
    """Ask ssh what it would do. Raises UsageError when it cannot read its configuration."""
    argv = [*base_argv(options), "-G", *address.argv()]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise UsageError(
            f"ssh does not accept its configuration: {_last_line(err.decode(errors='replace'))}",
            subject=address.text,
            remedy="check --ssh-config, --ssh-option and your ssh_config",
        )
    pairs = (line.partition(" ") for line in out.decode(errors="replace").splitlines())
    return Effective({keyword.lower(): value for keyword, _, value in pairs})


def policy(known: Effective, options: SshOptions, *, interactive: bool) -> list[str]:
    """Options of ours, each only where the user's configuration leaves it open."""
    wanted = {"LogLevel": "ERROR", "RemoteCommand": "none", "ClearAllForwardings": "yes", "ForwardX11": "no"}
    if known.get("stricthostkeychecking") in ("ask", ""):
        wanted["StrictHostKeyChecking"] = "yes"
    if known.get("connecttimeout") in ("none", "0", ""):
        wanted["ConnectTimeout"] = str(options.connect_timeout)
    if known.get("serveraliveinterval") in ("0", ""):
        wanted["ServerAliveInterval"] = str(_KEEPALIVE_SECONDS)
        wanted["ServerAliveCountMax"] = str(_KEEPALIVE_COUNT)
    if not interactive:
        wanted["BatchMode"] = "yes"
    return [word for key, value in wanted.items() for word in ("-o", f"{key}={value}")]


def failure(host: str, stderr: str, status: int | None) -> ConnectError:
    """What ended a connection, from ssh's own words."""
    said = _last_line(stderr)
    if any(text in stderr for text in _HOST_KEY):
        return HostKeyError(
            f"the key that {host} shows is unknown or has changed: {said}",
            subject=host,
            remedy=f"make sure it is the right machine, then update known_hosts, as by: ssh {shlex.quote(host)}",
        )
    if any(text in stderr for text in _REFUSED):
        return AuthenticationError(
            f"{host} refused to let us in: {said}",
            subject=host,
            remedy="check the user name and key (-i, --ssh-config), or load the key into ssh-agent",
        )
    return ConnectError(
        f"cannot connect to {host}: {said or f'ssh ended with status {status}'}",
        subject=host,
        remedy=f"check that this works: ssh {shlex.quote(host)} true",
    )


def worth_retrying(error: ConnectError, stderr: str) -> bool:
    """Whether another try may help: for network faults only, never for a refused or wrong key."""
    refused = isinstance(error, (AuthenticationError, HostKeyError))
    return not refused and any(text in stderr for text in _NETWORK)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


async def known_host_lines(known: Effective) -> list[str]:
    """The keys by which this machine knows the host, as `marker? type key` without host names."""
    port = known.get("port")
    name = known.get("hostkeyalias") or known.get("hostname")
    if not known.get("hostkeyalias") and port not in ("", "22"):
        name = f"[{name}]:{port}"
    found: list[str] = []
    for file in f"{known.get('userknownhostsfile')} {known.get('globalknownhostsfile')}".split():
        if file == "none":
            continue
        process = await asyncio.create_subprocess_exec(
            "ssh-keygen", "-F", name, "-f", str(Path(file).expanduser()),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        out, _ = await process.communicate()
        for line in out.decode(errors="replace").splitlines():
            words = line.split()
            marker = [words.pop(0)] if words and words[0].startswith("@") else []
            if len(words) >= 3 and not line.startswith("#"):
                found.append(" ".join([*marker, *words[1:3]]))
    return found
