"""A file that a process has mapped into its memory and closed is in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvm_clone.agent.host import uses

pytestmark = pytest.mark.timeout(60)

_MAP = """
import ctypes, os, sys
c = ctypes.CDLL(None, use_errno=True)
c.mmap.restype = ctypes.c_void_p
fd = os.open(sys.argv[1], os.O_RDWR)
assert c.mmap(None, ctypes.c_size_t(4096), 3, 1, fd, ctypes.c_long(0)) != ctypes.c_void_p(-1).value
os.close(fd)
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""
"""The child is nobody's: processes that descend from the one that asks do not count."""


def test_what_a_process_has_mapped_and_closed_is_used(tmp_path: Path) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.write_bytes(bytes(8192))
    other.write_bytes(bytes(8192))
    argv = [sys.executable, "-c", _MAP, str(disk)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip().isdecimal()
        used, free = uses.uses([str(disk), str(other)], [], [], [], processes=True)
        holder.communicate("")
    assert (used["state"], free["state"]) == (uses.USED, uses.FREE)
    assert "process" in used["why"]
    assert uses.uses([str(disk)], [], [], [], processes=True)[0]["state"] == uses.FREE
