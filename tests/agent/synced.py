"""A VM whose sync has just committed: its overlay is still to be merged."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from pathlib import Path

from kvm_clone.agent.disks import fingerprint
from kvm_clone.agent.staging import records, stage

NAME = "web"
SIZE = 4 << 20


class Synced:
    """A VM of one disk, whose sync has just committed."""

    def __init__(self, pool: Path, format_: str) -> None:
        self.pool = pool
        self.base, self.overlay, self.format = pool / "web.img", pool / "kvm-clone-op-vda.qcow2", format_
        subprocess.run(["qemu-img", "create", "-q", "-f", format_, self.base, str(SIZE)], check=True)
        self.write(self.base, "write -P 1 0 1M", format_)
        self.stage = stage.Stage(str(pool), NAME, "op", {}, directories=[str(pool)], keep=True)
        spec = {
            "format": "qcow2",
            "size": SIZE,
            "options": {},
            "mode": 0o600,
            "user": pwd.getpwuid(os.geteuid())[0],
            "group": grp.getgrgid(os.getegid())[0],
            "backing": [str(self.base), format_],
        }
        part = self.stage.create("vda", str(self.overlay), spec)
        self.write(Path(part), "write -P 2 0 64k", "write -z 512k 64k")
        self.stage.publish("vda", str(self.overlay))
        merge = [{"disk": "vda", "path": str(self.overlay), "base": str(self.base), "base_format": format_}]
        images = {"vda": [str(self.overlay), fingerprint.of(str(self.overlay))]}
        self.stage.note(records.DEFINE, {"uuid": "", "remove": [], "forget": [], "images": images, "merge": merge})
        self.stage.note(records.COMMITTED, {})

    def write(self, path: Path, *commands: str) -> None:
        """Commands of qemu-io; the last word may be the image's format."""
        *words, last = commands
        words, format_ = (words, last) if last in ("raw", "qcow2") else ([*commands], "qcow2")
        argv = ["qemu-io", "-f", format_, *(one for word in words for one in ("-c", word)), str(path)]
        subprocess.run(argv, check=True, capture_output=True)

    def reads(self, path: Path, format_: str, command: str) -> bool:
        """Whether qemu-io finds the pattern."""
        argv = ["qemu-io", "-r", "-f", format_, "-c", command, str(path)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        return "failed" not in done.stdout + done.stderr

    def crash(self) -> None:
        """End this process's part of it, and take it up as the next run does."""
        self.stage.release()
        self.stage = stage.Stage(str(self.pool), NAME, "op", {}, directories=[str(self.pool)], finishing=True)
