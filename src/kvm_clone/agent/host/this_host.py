"""Which host this is."""

from __future__ import annotations

import os
from typing import NamedTuple


class Host(NamedTuple):
    """Which host this is, as journals name it."""

    machine: str
    name: str


def this_host() -> Host:
    """Which host we are on; its machine-id is empty where there is none."""
    try:
        with open("/etc/machine-id", encoding="ascii", errors="replace") as file:
            machine = file.read(64).strip()
    except OSError:
        machine = ""
    return Host(machine, os.uname().nodename)
