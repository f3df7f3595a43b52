"""The lab for tests: its command line as methods, and commands on its hosts without the start of a lab/lab for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY / "lab/lab"
sys.path.insert(0, str(REPOSITORY / "lab"))

from kclab import host as lab_host  # noqa: E402
from kclab import state as lab_state  # noqa: E402
from kclab.command import environment  # noqa: E402


@dataclass(frozen=True)
class Vm:
    """What `lab/lab vm --json` tells."""

    host: str
    name: str
    uuid: str
    state: str
    disks: dict[str, str]
    serial: str
    serial_here: str


@dataclass(frozen=True)
class Lab:
    """The running lab, by its command line."""

    state: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def root(self) -> Path:
        """Its state directory; the files of kc-a are below `kc-a/root`."""
        return self.state

    @property
    def ssh_config(self) -> Path:
        return self.state / "ssh_config"

    def command(
        self,
        *argv: str,
        check: bool = True,
        input: str | None = None,  # noqa: A002
    ) -> subprocess.CompletedProcess[str]:
        """Run `lab/lab ARGV`."""
        own = {**self.environment, "KVM_CLONE_LAB_STATE": str(self.state)}
        return _finished([str(LAB), *argv], own, input, check=check)

    def run(
        self,
        host: str,
        *argv: str,
        check: bool = True,
        input: str | None = None,  # noqa: A002
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, as `lab/lab exec` would."""
        there = lab_state.Lab(self.state).host(host)
        return _finished(lab_host.entered(there, *argv), environment(), input, check=check)

    def vm(
        self,
        host: str,
        name: str,
        disks: Sequence[str] = (),
        boot: bool = True,
        start: bool = False,
        guest: str = "tick",
        guest_agent: bool = False,
        uefi: bool = False,
        pool: bool = False,
    ) -> Vm:
        """Make a VM, in place of one of this name; disks are FORMAT:SIZE[:DATA], guest is `--guest`'s MODE."""
        options = [option for disk in disks for option in ("--disk", disk)]
        options += [] if boot else ["--no-boot-disk"]
        options += ["--start"] if start else []
        options += ["--guest", guest] if guest != "tick" else []
        options += ["--guest-agent"] if guest_agent else []
        options += ["--uefi"] if uefi else []
        options += ["--pool"] if pool else []
        made = self.command("vm", host, "--json", *options, "--", name)
        return Vm(**json.loads(made.stdout))

    def outside(self, host: str, path: str) -> Path:
        """Where a file below a host's own directories lies on this machine."""
        return Path(f"{self.state}/{host}/root{path}")

    def power(self, state: str, host: str) -> None:
        """`on` or `off`."""
        self.command("power", state, host)

    def net(self, action: str, host: str, *options: str) -> None:
        """`cut`, `heal` or `shape` (with options)."""
        self.command("net", action, host, *options)

    def ssh_argv(self, host: str, command: str) -> list[str]:
        """Return the command line of `ssh`."""
        return ["ssh", "-F", str(self.ssh_config), host, command]

    def ssh(self, host: str, command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a shell command over SSH, as a user of the lab would."""
        return subprocess.run(
            self.ssh_argv(host, command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def wait_for_guest(self, host: str, serial: str, seconds: float = 60, word: str = "GUEST-UP") -> str:
        """Wait for the guest's line on its serial port that begins with the word, and return the text after it."""
        file = self.outside(host, serial)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            printed = file.read_text(errors="replace") if file.exists() else ""
            for line in printed.splitlines(keepends=True):
                if line.startswith(f"{word} ") and line.endswith("\n"):
                    return line.removeprefix(f"{word} ").strip()
            time.sleep(0.1)
        raise AssertionError(f"no guest came up within {seconds} s; its serial port printed {printed!r}")

    def wait_for_guest_agent(self, host: str, domain: str, seconds: float = 60) -> None:
        """Wait until the QEMU guest agent of a VM answers."""
        deadline = time.monotonic() + seconds
        ping = ("virsh", "qemu-agent-command", domain, '{"execute": "guest-ping"}', "--timeout", "5")
        while (done := self.run(host, *ping, check=False)).returncode != 0:
            if time.monotonic() > deadline:
                raise AssertionError(f"no guest agent answered within {seconds} s: {done.stderr.strip()}")
            time.sleep(0.1)


def _finished(
    argv: list[str],
    env: dict[str, str],
    input: str | None,  # noqa: A002
    *,
    check: bool,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv,
        input=input or "",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=env,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{argv}: exit code {done.returncode}: {done.stderr or done.stdout}")
    return done
