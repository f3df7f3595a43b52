"""Reaching another host by ssh, from here: for the direct route."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any, Dict, List

from . import process
from .errors import AgentError
from .wire import write_all

FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""ssh's Ciphers: these first, the rest as it was. With AES instructions they cost a third of the default's time."""


MEASURED_SECONDS = 0.3
MEASURED_BYTES = 64 * 1024 * 1024
"""A measurement sends for so long, and so much at most: enough for a rough rate, and soon over on a slow link."""

MEASURE = "echo ready; wc -c"
"""What the other end runs to be measured against: it says how many bytes it got."""


def probe(ssh: List[str], known_hosts: str, measured: bool = True) -> Dict[str, Any]:
    """Whether this host can run a command by `ssh`: `error` is empty when it can, and `rate` (bytes/s) is measured."""
    argv = [*command(ssh, known_hosts), MEASURE]
    child = process.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    rate = 0.0
    try:
        if child.stdout.readline() == b"ready\n":
            began = time.monotonic()
            sent = 0
            while measured and sent < MEASURED_BYTES and time.monotonic() - began < MEASURED_SECONDS:
                sent += os.write(child.stdin.fileno(), bytes(65536))
            child.stdin.close()
            child.stdout.readline()
            rate = sent / max(time.monotonic() - began, 1e-6)
    except BrokenPipeError:
        rate = 0.0  # ssh will say why
    child.stdin = None
    _, stderr = child.communicate()
    return {"error": process.last_words(argv[0], child.returncode, stderr) if child.returncode else "", "rate": rate}


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
    except AgentError:  # what is wrong with it, the connection will tell
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
