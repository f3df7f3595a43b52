"""The store whose assets are files: under a staged name of our mark at first, then under the final one beside it."""

from __future__ import annotations

import grp
import os
import pwd
from typing import Any, Dict, List, Optional

from kvm_clone.agent import names
from kvm_clone.agent.disks import chain, filesystem, fingerprint, image, qemu, reflink
from kvm_clone.agent.staging import files
from kvm_clone.agent.staging.store import Held, Store


class DirectoryStore(Store):
    """Files in directories."""

    kind = "directory"
    marks_names = True

    def part(self, operation: str, key: str, final: str) -> str:
        """See Store."""
        return names.part_path(operation, key, final)

    def create(self, part: str, spec: Dict[str, Any]) -> None:
        """See Store."""
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if spec.get("copy_of"):
                reflink.clone(spec["copy_of"], fd)
        finally:
            os.close(fd)
        _make_image(part, spec, spec.get("backing"))
        filesystem.own(part, spec["mode"], _id_of(pwd.getpwnam, spec["user"]), _id_of(grp.getgrnam, spec["group"]))
        if spec.get("backing") or spec.get("copy_of"):  # where nothing differs, nothing else makes it durable
            image.flush_and_drop_cache(part)
        files.make_durable(os.path.dirname(part))

    def holds(self, path: str) -> bool:
        """See Store."""
        return os.path.lexists(path)

    def look(self, path: str) -> Optional[Held]:
        """See Store."""
        try:
            about = os.lstat(path)
        except FileNotFoundError:
            return None
        files.check_regular(path, about)
        return Held(about.st_size, about.st_blocks * 512)

    def publish(self, part: str, final: str) -> None:
        """See Store."""
        filesystem.give_name(part, final)
        files.make_durable(os.path.dirname(final))

    def retract(self, final: str, part: str) -> None:
        """See Store."""
        self.publish(final, part)

    def remove(self, path: str) -> None:
        """See Store."""
        files.unlink_file(path)

    def identity(self, path: str) -> str:
        """See Store."""
        return fingerprint.identity(path)


def _make_image(part: str, spec: Dict[str, Any], backing: Optional[List[str]]) -> None:
    if spec.get("copy_of"):
        qemu.resize(part, spec["format"], spec["size"])
    elif spec["format"] == image.RAW:
        os.truncate(part, spec["size"])
    else:
        below = chain.Node(*backing) if backing else None
        qemu.create(part, spec["format"], spec["size"], spec["options"], below)


def _id_of(look_up: Any, name: str) -> int:
    """A user's or group's number, or root's where the name is unknown: libvirt gives the file to QEMU at its start."""
    try:
        return int(look_up(name)[2])
    except KeyError:
        return 0
