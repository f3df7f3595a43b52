"""Reaching another host by ssh, from here: for the direct route."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import Any, Dict, List

from kvm_clone.agent import process
from kvm_clone.agent.protocol.errors import AgentError, from_exception
from kvm_clone.agent.protocol.wire import NOISE_LIMIT, write_all

FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""ssh's Ciphers: these first, the rest as it was. With AES instructions they cost a third of the default's time."""


MEASURED_SECONDS = 0.3
MEASURED_BYTES = 64 * 1024 * 1024
"""A measurement sends for so long, and so much at most: enough for a rough rate, and soon over on a slow link."""

READY = b"ready\n"
MEASURE = "echo; echo ready; wc -c"
"""What the other end runs to be measured against: it says READY behind what its login prints, and how many bytes it
got."""

PROBE_SECONDS = 60.0
"""How long a probe may take, the login included."""

_END_SECONDS = 5.0

_WORDS = 16 * 1024
"""Bytes of the end of stderr that are kept for ssh's last words."""


def probe(ssh: List[str], known_hosts: str, measured: bool = True) -> Dict[str, Any]:
    """Whether this host can run a command by `ssh`: `error` is empty when it can, and `rate` (bytes/s) is measured."""
    try:
        argv = [*command(ssh, known_hosts), MEASURE]
        child = process.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except (AgentError, OSError) as error:  # no ssh here, or limits that forbid it: there is the other route
        return {"error": str(from_exception(error, "starting ssh")), "rate": 0.0}
    with child:
        try:
            conversation = _Conversation(child, measured)
            reason = conversation.hold(time.monotonic() + PROBE_SECONDS)
            if not reason and not conversation.answered:
                reason = _ended_early(argv[0], child, conversation.words)
        finally:
            child.kill()
    return {"error": reason, "rate": 0.0 if reason else conversation.rate}


def _ended_early(program: str, child: subprocess.Popen[bytes], words: bytes) -> str:
    """Why a child has closed its outputs before it answered."""
    try:
        status = child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{program} does not end"
    return process.last_words(program, status, words) if status else "the login there does not run what it is asked to"


class _Conversation:
    """A measurement against the far end: everything that comes is read, and no more is sent than is taken.

    A login may print whatever it likes, on stdout (skipped up to NOISE_LIMIT) and on stderr (of any amount).
    """

    def __init__(self, child: subprocess.Popen[bytes], measured: bool) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        self._child = child
        self._in, self._out, self._err = child.stdin, child.stdout, child.stderr
        os.set_blocking(self._in.fileno(), False)
        self._measured = measured
        self._began = 0.0
        self._sent = 0
        self._noise = 0
        self._line = b""
        self.words = b""
        self.rate = 0.0
        self.answered = False

    def hold(self, deadline: float) -> str:
        """Talk until the far end has counted, or has ended; why it cannot be talked to."""
        outputs = [self._out, self._err]
        while outputs and not self.answered:
            left = deadline - time.monotonic()
            if left <= 0:
                return f"no answer within {PROBE_SECONDS:.0f} seconds"
            sending = [self._in] if self._began and not self._in.closed else []
            readable, writable, _ = select.select(outputs, sending, [], left)
            for output in readable:
                part = os.read(output.fileno(), 1 << 16)
                if not part:
                    outputs.remove(output)
                elif output is self._err:
                    self.words = (self.words + part)[-_WORDS:]
                else:
                    self._hear(part)
            if self._noise > NOISE_LIMIT:
                return "the login prints without end instead of running a command"
            if writable:
                self._send()
        return ""

    def _hear(self, part: bytes) -> None:
        *lines, self._line = (self._line + part).split(b"\n")
        for line in lines:
            if self._began:
                self.answered = True
                self.rate = self._sent / max(time.monotonic() - self._began, 1e-6)
            elif line + b"\n" == READY:
                self._began = time.monotonic()
        self._noise += len(part)

    def _send(self) -> None:
        if self._measured and self._sent < MEASURED_BYTES and time.monotonic() - self._began < MEASURED_SECONDS:
            try:
                self._sent += os.write(self._in.fileno(), bytes(65536))
            except BrokenPipeError:  # ssh will say why
                self._in.close()
        else:
            self._in.close()


def command(ssh: List[str], known_hosts: str) -> List[str]:
    """The ssh command with the host keys that the controller knows, and a fast cipher."""
    options = []
    if known_hosts:
        # Not a file on this host; and ssh closes what it inherits, so that it has to open our descriptor.
        fd = os.memfd_create("known_hosts")
        write_all(fd, known_hosts.encode())
        options += [f"UserKnownHostsFile=/proc/{os.getpid()}/fd/{fd}", "GlobalKnownHostsFile=/dev/null"]
    if has_aes() and _ciphers_are_left_open(ssh):
        options.append(f"Ciphers={FAST_CIPHERS}")
    return [ssh[0], *[word for option in options for word in ("-o", option)], *ssh[1:]]


def _ciphers_are_left_open(ssh: List[str]) -> bool:
    """Whether this host's ssh_config has no say in the ciphers."""
    try:
        would, default = (_ciphers([ssh[0], "-G", *rest]) for rest in (ssh[1:], ["-F", "/dev/null", "nobody"]))
    except AgentError:  # what is wrong with it, the connection will say
        return False
    return bool(would) and would == default


def _ciphers(argv: List[str]) -> str:
    return next((line for line in process.run(argv).splitlines() if line.startswith("ciphers ")), "")


def has_aes() -> bool:
    """Whether this processor has instructions for AES."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any(line.startswith(("flags", "Features")) and " aes" in line for line in file)
    except OSError:  # no /proc: ssh's own choice is as good
        return False
