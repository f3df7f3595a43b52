"""The SSH connection to a host: the control agent's session opens it, and all other sessions share it.

`localhost` is reached without one: a shell here runs what another host's login would.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import deque
from pathlib import Path

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.protocol import wire
from kvm_clone.errors import ConnectError, KvmCloneError, RefusedError
from kvm_clone.hosts import payload, ssh
from kvm_clone.hosts.agent_errors import REMEDIES
from kvm_clone.hosts.children import deaf, end_process, kill_process, spawn, stop_process
from kvm_clone.hosts.frames import START_SECONDS, read_marker
from kvm_clone.hosts.outputs import lines_of

log = logging.getLogger(__name__)

_OURS = "kvm-clone: "
"""Starts what the agent and its loader say on stderr before they give up."""


class SshConnection:
    """A connection to one host. `known`: what ssh makes of the address, once it is open."""

    def __init__(self, address: ssh.Address, options: ssh.SshOptions, directory: Path, *, interactive: bool) -> None:
        """`directory`: where its sockets lie, which nobody else can enter."""
        self.address = address
        self.name = address.text
        self.known = ssh.Effective({})
        self._ciphers = ""
        self._options = options
        self._interactive = interactive
        self._control = directory / f"{random.randbytes(4).hex()}.ssh"
        self._process: asyncio.subprocess.Process | None = None
        self._errors: asyncio.Task[None] | None = None
        self._stderr: deque[str] = deque(maxlen=40)

    async def open(self) -> asyncio.subprocess.Process:
        """Connect and start the control agent; network faults are retried with exponential back-off.

        Returns the agent's process, which has shown its marker. Raises ConnectError and its kinds; RefusedError when
        the host cannot run the agent.
        """
        if not self.address.local:
            self.known = await ssh.effective(self.address, self._options)
            self._ciphers = await ssh.default_ciphers()
            self._options = ssh.with_plain_config(self._options, self._control.with_suffix(".config"))
        delay = 1.0
        for tries_left in range(self._options.retries, -1, -1):
            try:
                return await self._start_agent()
            except ConnectError as error:
                if not tries_left or not ssh.worth_retrying(error, self.said()):
                    raise
                log.warning("%s; trying again in %.0f s", error, delay)
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                delay *= 2
        raise AssertionError("the last try returns or raises")

    async def close(self) -> None:
        """End the agent, and with it the connection."""
        if self._process is not None and self._errors is not None:
            await end_process(self._process)
            await self._errors  # unread, its stderr would keep it from its end
            await kill_process(self._process)
            self._process = None

    def session_argv(self, command: str) -> list[str]:
        """What runs a shell command on the host over the connection that stands, and never over another one."""
        if self.address.local:
            return ["sh", "-c", command]
        # The connection knows its options; the user's configuration would only add forwardings of its own.
        nothing_else = ["-F", "/dev/null", "-o", "ProxyCommand=exit 255"]
        return ["ssh", *nothing_else, "-o", self._control_path, "-T", "--", "host", command]

    def agent_command(self) -> str:
        """The shell command that loads an agent on this host."""
        return payload.remote_command(sys.executable if self.address.local else "python3")

    def socket_path(self, number: int) -> Path:
        """Where a socket of the connection's may lie on this machine."""
        return self._control.with_suffix(f".{number}")

    def said(self) -> str:
        """The last lines that the host has printed on stderr, and what was noted."""
        return "\n".join(self._stderr)

    def note(self, text: str) -> None:
        """Add a line to what the host has printed."""
        self._stderr.append(text)

    @property
    def _control_path(self) -> str:
        return f"ControlPath={ssh.quoted(self._control)}"

    def _master_argv(self) -> list[str]:
        if self.address.local:
            return ["sh", "-c", self.agent_command()]
        return [
            *ssh.base_argv(self._options),
            *ssh.policy(self.known, self._options, interactive=self._interactive, ciphers=self._ciphers),
            *("-o", "ControlMaster=yes", "-o", self._control_path, "-o", "ControlPersist=no", "-T"),
            *self.address.argv(),
            self.agent_command(),
        ]

    async def _start_agent(self) -> asyncio.subprocess.Process:
        self._stderr.clear()
        process = await spawn(
            *deaf(self._master_argv()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        errors = asyncio.create_task(self._collect_stderr(process))
        try:
            process.stdin.write(payload.preamble().encode() + payload.package())
            process.stdin.write(wire.pack_frame({"mode": "control"}))
            await read_marker(process.stdout, None if self._interactive else START_SECONDS)
        except (EOFError, OSError, TimeoutError, wire.ProtocolError) as error:
            await end_process(process)
            await errors
            await kill_process(process)
            raise self._start_failure(process.returncode, error) from error
        except BaseException:
            await stop_process(process)
            await errors
            raise
        self._process, self._errors = process, errors
        return process

    def _start_failure(self, status: int | None, error: Exception) -> KvmCloneError:
        if isinstance(error, TimeoutError):
            self.note(f"no agent was ready within {START_SECONDS:.0f} s of the login's start")
        elif isinstance(error, wire.ProtocolError):  # says more than what the login prints
            self.note(str(error))
        said = self.said()
        if status in (126, 127) or "python3: not found" in said or "python3: command not found" in said:
            return RefusedError(
                f"{self.name} has no python3",
                subject=self.name,
                remedy="install python3 (3.9 or newer) there",
            )
        ours = [line.partition(_OURS)[2] for line in self._stderr if _OURS in line]
        if ours:
            remedy = REMEDIES[kinds.LIMIT] if "cannot run here" in ours[0] or "limits" in ours[0] else ""
            return RefusedError(f"{self.name}: {ours[0]}", subject=self.name, remedy=remedy)
        return ssh.failure(self.name, said or str(error), status)

    async def _collect_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in lines_of(process.stderr):
            self._stderr.append(line)
            log.debug("%s: %s", self.name, line)
