"""Journals as others may have written them."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvm_clone.agent import names
from kvm_clone.agent.host.this_host import this_host

Record = dict[str, Any]

NAME, OPERATION = "web", "0123456789ab"


def line(record: object, *, spaced: bool = False) -> bytes:
    """A record as a line, written without our own code; `spaced`: as another version might, with spaces."""
    separators = (", ", ": ") if spaced else (",", ":")
    body = json.dumps(record, separators=separators, sort_keys=not spaced).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def journal_path(pool: Path, name: str = NAME) -> Path:
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    return pool / f".kvm-clone-{key}.journal"


def plant(pool: Path, content: Iterable[object] | bytes, name: str = NAME) -> Path:
    """Put these records, or bytes, where the journal of that VM lies."""
    path = journal_path(pool, name)
    path.write_bytes(content if isinstance(content, bytes) else b"".join(map(line, content)))
    path.chmod(0o600)
    return path


def begin(**more: Any) -> Record:
    about = {"started": 0, "kind": "clone", "version": "1", "controller": "c", "process": 1}
    source = {"host": "x", "uuid": "u", "name": NAME}
    return {"record": "begin", "operation": OPERATION, "name": NAME, "source": source, **about, **more}


def elsewhere(**more: Any) -> Record:
    """The begin of an operation on another host."""
    return begin(host={"machine": "f" * 32, "name": "kc-x"}, **more)


def here(**more: Any) -> Record:
    return begin(host=this_host()._asdict(), **more)


def create(pool: Path, disk: str = "vda", **more: Any) -> Record:
    final = str(pool / f"{disk}.raw")
    part = names.part_path(OPERATION, disk, final)
    return {"record": "create", "disk": disk, "part": part, "final": final, "size": 4096, "format": "raw", **more}


def publish(pool: Path, disk: str = "vda", **more: Any) -> Record:
    made = create(pool, disk)
    identity = identity_of(Path(made["final"]))
    kept = {key: made[key] for key in ("disk", "part", "final")}
    return {"record": "publish", **kept, "identity": identity, **more}


def identity_of(path: Path) -> str:
    if not os.path.lexists(path):
        return "1:1:1"
    about = os.lstat(path)
    return f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"


def overlay(pool: Path, **more: str) -> Record:
    """The define of a sync whose overlay is to be merged into `base.raw`."""
    one = {"disk": "vda", "base": str(pool / "base.raw"), "base_format": "raw"}
    one["path"] = str(pool / f"kvm-clone-{OPERATION}-vda.qcow2")
    return {"record": "define", "uuid": "u", "remove": [], "forget": [], "images": {}, "merge": [{**one, **more}]}
