"""Programs for the guests: what this machine has, or what its distribution's packages have."""

from __future__ import annotations

import re
from pathlib import Path

from kclab.command import LabError, run, which

AGENT_PACKAGE = "qemu-guest-agent"
AGENT = "usr/sbin/qemu-ga"


def unpack(package: str, directory: Path) -> Path | None:
    """Download a package and unpack it, without installing it; None where that cannot be."""
    if which("apt-get") is None or which("dpkg") is None:
        return None
    archives = directory / f"{package}-archive"
    archives.mkdir()
    download = 'cd "$0" && apt-get -o APT::Sandbox::User=root download "$1"'
    if run("sh", "-c", download, str(archives), package, check=False).returncode != 0:
        return None
    root = directory / package
    for archive in archives.glob("*.deb"):
        run("dpkg", "-x", str(archive), str(root))
    return root if root.exists() else None


def guest_agent(directory: Path) -> dict[str, bytes]:
    """Find qemu-ga and the libraries that it needs: contents by the path that they have in the guest."""
    program = _agent_program(directory)
    # Such as `libc.so.6 => /lib/libc.so.6 (0x…)`, `/lib64/ld.so (0x…)`, and `linux-vdso.so.1 (0x…)`, which is no file.
    needed = run("ldd", str(program)).stdout
    if "not found" in needed:
        missing = re.findall(r"(\S+) => not found", needed)
        raise LabError(f"the guest agent needs {', '.join(missing)}: install what has it (try {AGENT_PACKAGE})")
    libraries = re.findall(r"(?:^|=>)\s*(/\S+) \(", needed, re.MULTILINE)
    return {"bin/qemu-ga": program.read_bytes(), **{path[1:]: Path(path).read_bytes() for path in libraries}}


def _agent_program(directory: Path) -> Path:
    installed = which("qemu-ga")
    if installed is not None:
        return Path(installed)
    root = unpack(AGENT_PACKAGE, directory)
    if root is None:
        raise LabError(
            "no guest agent: neither is qemu-ga installed, nor can apt-get download "
            f"{AGENT_PACKAGE} (try apt-get update)"
        )
    return root / AGENT
