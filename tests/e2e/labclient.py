"""The lab for tests: its command line as methods."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY / "lab/lab"


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
        done = subprocess.run(
            [str(LAB), *argv],
            input="" if input is None else input,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**self.environment, "KVM_CLONE_LAB_STATE": str(self.state)},
        )
        if check and done.returncode != 0:
            raise AssertionError(f"lab/lab {argv}: exit code {done.returncode}: {done.stderr or done.stdout}")
        return done

    def run(
        self,
        host: str,
        *argv: str,
        check: bool = True,
        input: str | None = None,  # noqa: A002
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return self.command("exec", host, "--", *argv, check=check, input=input)

    def vm(self, host: str, name: str, disks: Sequence[str] = (), boot: bool = True, start: bool = False) -> Vm:
        """Make a VM, in place of one of this name; disks are FORMAT:SIZE[:DATA]."""
        options = [option for disk in disks for option in ("--disk", disk)]
        options += [] if boot else ["--no-boot-disk"]
        options += ["--start"] if start else []
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

    def wait_for_guest(self, host: str, serial: str, seconds: float = 60) -> str:
        """Wait for the guest's line on its serial port and return the text after GUEST-UP."""
        file = self.outside(host, serial)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            printed = file.read_text(errors="replace") if file.exists() else ""
            for line in printed.splitlines(keepends=True):
                if line.startswith("GUEST-UP ") and line.endswith("\n"):
                    return line.removeprefix("GUEST-UP ").strip()
            time.sleep(0.1)
        raise AssertionError(f"no guest came up within {seconds} s; its serial port printed {printed!r}")
