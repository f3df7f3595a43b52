"""A journal is input: what others may have written, or what names what we would not have named, moves nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clonekit import IMAGES, assert_equal, assert_nothing_left, kvm_clone, wipe
from labclient import Lab, Vm

from kvm_clone.agent import names

pytestmark = pytest.mark.e2e

PRECIOUS = "/var/lib/libvirt/precious"
OPERATION = "0123456789ab"


def encoded(*records: dict[str, Any]) -> bytes:
    lines = [json.dumps(record, separators=(",", ":"), sort_keys=True).encode() for record in records]
    return b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)


def begun(name: str) -> dict[str, Any]:
    return {"record": "begin", "operation": OPERATION, "name": name, "started": 0, "kind": "clone"}


def created(part: str, final: str) -> dict[str, Any]:
    return {"record": "create", "disk": "vda", "part": part, "final": final, "size": 4096, "format": "raw"}


def published(lab: Lab, part: str, final: str) -> dict[str, Any]:
    about = lab.outside("kc-b", final).lstat()
    identity = f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"
    return {"record": "publish", "disk": "vda", "part": part, "final": final, "identity": identity}


@pytest.fixture
def source(lab: Lab) -> Iterator[Vm]:
    lab.outside("kc-b", PRECIOUS).write_bytes(b"precious" * 512)
    yield lab.vm("kc-a", "forged", ["raw:4M:1M"], boot=False)
    wipe(lab)
    lab.outside("kc-b", PRECIOUS).unlink(missing_ok=True)


def journal(lab: Lab, name: str = "forged") -> Path:
    return lab.outside("kc-b", names.journal_path(IMAGES, name))


def forged_part(lab: Lab) -> bytes:
    return encoded(begun("forged"), created(PRECIOUS, f"{IMAGES}/z.raw"))


def forged_final(lab: Lab) -> bytes:
    part = names.part_path(OPERATION, "vda", PRECIOUS)
    return encoded(begun("forged"), created(part, PRECIOUS), published(lab, part, PRECIOUS))


def forged_merge(lab: Lab) -> bytes:
    overlay = {
        "disk": "vda",
        "path": f"{IMAGES}/kvm-clone-{OPERATION}-vda.qcow2",
        "base": PRECIOUS,
        "base_format": "raw",
    }
    part, final = names.part_path(OPERATION, "vda", f"{IMAGES}/z.raw"), f"{IMAGES}/z.raw"
    define = {"record": "define", "uuid": "u", "remove": [PRECIOUS], "merge": [overlay], "images": {}}
    return encoded(begun("forged"), created(part, final), define, {"record": "committed"})


MALFORMED: dict[str, Callable[[Lab], bytes]] = {
    "a part that we would not name so": forged_part,
    "a final name where no disk would land": forged_final,
    "a merge into a file of somebody's": forged_merge,
    "of another VM, under this one's name": lambda lab: encoded(begun("another")),
    "no records": lambda lab: encoded({"record": "frobnicate"}),
    "nonsense": lambda lab: (b"\xff" * 5000 + b"\n") * 3,
    "deep nesting": lambda lab: encoded(begun("forged")) + _deep(),
}


def _deep() -> bytes:
    body = b'{"record":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return (b"%08x %s\n" % (zlib.crc32(body), body)) * 2


@pytest.mark.parametrize("what", MALFORMED)
def test_a_forged_journal_moves_nothing_and_hurts_itself_alone(lab: Lab, source: Vm, what: str) -> None:
    journal(lab).write_bytes(MALFORMED[what](lab))
    journal(lab).chmod(0o600)
    for argv in (("status", "--host", "kc-b"), ("cleanup", "kc-b")):
        assert "Traceback" not in kvm_clone(lab, *argv).err
    for flags in ((), ("--force",), ("--resume",), ("--idempotent",)):
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "forged", *flags)
        assert done.code in (3, 4), done.err
    assert lab.outside("kc-b", PRECIOUS).read_bytes() == b"precious" * 512
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "forged", "--new-name", "another").code == 0


PLANTED = {
    "of another user": "printf x > {0}; chown 1:1 {0}",
    "that others may write": "printf x > {0}; chmod 666 {0}",
    "a link": "ln -s /etc/passwd {0}",
    "a link to nothing": "ln -s /nowhere {0}",
    "a second name": "printf x > {0}.other; ln {0}.other {0}",
    "a FIFO": "mkfifo {0}",
    "a directory": "mkdir {0}",
    "a device": "mknod {0} c 1 3",
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_file_of_ours_is_refused_by_name(lab: Lab, source: Vm, what: str) -> None:
    path = names.journal_path(IMAGES, "forged")
    lab.run("kc-b", "sh", "-e", "-c", PLANTED[what].format(path))
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "forged", "--force", seconds=40)
    assert done.code == 3, done.err
    assert path in done.err
    assert kvm_clone(lab, "cleanup", "kc-b", seconds=40).code == 3
    assert lab.run("kc-b", "test", "-e", "/etc/passwd").returncode == 0


@pytest.mark.parametrize("content", [b"", b'1234abcd {"record":"beg'])
def test_a_journal_that_says_nothing_is_nothing(lab: Lab, source: Vm, content: bytes) -> None:
    journal(lab).write_bytes(content)
    journal(lab).chmod(0o600)
    assert "nothing staged" in kvm_clone(lab, "status", "--host", "kc-b").out
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "forged")
    assert done.code == 0, done.err
    assert_equal(lab, source)
    assert_nothing_left(lab)


def test_what_others_put_where_locks_were_blocks_nobody(lab: Lab, source: Vm) -> None:
    key = names.key_of("forged")
    lab.run("kc-b", "sh", "-e", "-c", f"mkfifo /run/lock/kvm-clone-{key}.lock; chmod 1777 /run/lock")
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "forged", seconds=40)
        assert done.code == 0, done.err
    finally:
        lab.run("kc-b", "rm", f"/run/lock/kvm-clone-{key}.lock")


def test_a_lock_directory_that_is_not_ours_alone_is_refused(lab: Lab, source: Vm) -> None:
    lab.run("kc-b", "sh", "-e", "-c", "rm -rf /run/kvm-clone; mkdir /run/kvm-clone; chmod 777 /run/kvm-clone")
    try:
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "forged")
        assert done.code in (3, 6), done.err
        assert "/run/kvm-clone" in done.err
    finally:
        lab.run("kc-b", "rm", "-rf", "/run/kvm-clone")
