"""What an image's header says, against images that the real qemu-img has made."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_clone.agent.disks import chain, header
from kvm_clone.agent.disks.chain import Node, UnknownError
from kvm_clone.agent.disks.header import Header
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .images import SIZE, encrypted, make, put, qcow2_header, qemu_img, without_base_format

pytestmark = pytest.mark.timeout(60)

Make = Callable[[Path], Path]


def _with_snapshots(at: Path) -> Path:
    path = make(at / "top")
    for name in ("one", "two"):
        qemu_img("snapshot", "-c", name, path)
    return path


HEADERS: dict[str, tuple[Make, Header]] = {
    "alone": (lambda at: make(at / "top"), Header()),
    "version 2": (lambda at: make(at / "top", "-o", "compat=0.10"), Header()),
    "small clusters": (lambda at: make(at / "top", "-o", "cluster_size=512"), Header()),
    "large clusters": (lambda at: make(at / "top", "-o", "cluster_size=2M"), Header()),
    "on a raw base": (lambda at: make(at / "top", base="/b", base_format="raw"), Header("/b", "raw")),
    "on a qcow2 base": (lambda at: make(at / "top", base="/b", base_format="qcow2"), Header("/b", "qcow2")),
    "version 2 on a base": (
        lambda at: make(at / "top", "-o", "compat=0.10", base="/b", base_format="raw"),
        Header("/b", "raw"),
    ),
    "on a base of a format that is not said": (
        lambda at: without_base_format(make(at / "top", base="/b", base_format="raw")),
        Header("/b"),
    ),
    "small clusters on a long name": (
        lambda at: make(at / "top", "-o", "cluster_size=1024", base="/" + "b" * 700, base_format="raw"),
        Header("/" + "b" * 700, "raw"),
    ),
    "the longest name": (
        lambda at: make(at / "top", base="/" + "b" * 1022, base_format="raw"),
        Header("/" + "b" * 1022, "raw"),
    ),
    "a name that is no UTF-8": (
        lambda at: make(at / "top", base="/\udcff\u00e4", base_format="raw"),
        Header("/\udcff\u00e4", "raw"),
    ),
    "a remote base": (
        lambda at: make(at / "top", base="nbd://nowhere:1/x", base_format="raw"),
        Header("nbd://nowhere:1/x", "raw"),
    ),
    "a data file": (
        lambda at: make(at / "top", "-o", f"data_file={at}/data"),
        Header(data_file=True, data_name="{at}/data"),
    ),
    "a raw data file": (
        lambda at: make(at / "top", "-o", f"data_file={at}/data,data_file_raw=on"),
        Header(data_file=True, data_name="{at}/data"),
    ),
    "encrypted": (encrypted, Header(encrypted=True)),
    "encrypted by LUKS": (lambda at: put(make(at / "top"), 32, struct.pack(">I", 2)), Header(encrypted=True)),
    "internal snapshots": (_with_snapshots, Header(snapshots=2)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_what_a_header_says(what: str, tmp_path: Path) -> None:
    how, expected = HEADERS[what]
    expected = expected._replace(data_name=expected.data_name.replace("{at}", str(tmp_path)))
    found = header.read(str(how(tmp_path)))
    assert found._replace(cluster=0, size=0, subclusters=False) == expected


@pytest.mark.parametrize(
    ("options", "cluster", "subclusters"),
    [
        ([], 65536, False),
        (["-o", "cluster_size=512"], 512, False),
        (["-o", "extended_l2=on,cluster_size=2M"], 2 << 20, True),
    ],
)
def test_clusters_and_size(options: list[str], cluster: int, subclusters: bool, tmp_path: Path) -> None:
    found = header.read(str(make(tmp_path / "top", *options)))
    assert (found.cluster, found.size, found.subclusters) == (cluster, SIZE, subclusters)


def test_clusters_that_qemu_does_not_make(tmp_path: Path) -> None:
    path = put(make(tmp_path / "top"), 20, struct.pack(">I", 22))
    with pytest.raises(AgentError, match="damaged"):
        header.read(str(path))


NO_HEADERS: dict[str, bytes] = {
    "empty": b"",
    "raw": b"\0" * 4096,
    "a magic alone": header.MAGIC,
    "version 1": qcow2_header(b"/b")[:4] + struct.pack(">I", 1) + qcow2_header(b"/b")[8:],
    "version 4": qcow2_header(b"/b")[:4] + struct.pack(">I", 4) + qcow2_header(b"/b")[8:],
    "a name beyond the end": qcow2_header(b"/b")[:8] + struct.pack(">Q", 1 << 40) + qcow2_header(b"/b")[16:],
    "a name that is too long": qcow2_header(b"/" + b"b" * 1023),
    "a name with a zero byte": qcow2_header(b"/b\0c"),
    "a format with a zero byte": qcow2_header(b"/b", base_format=b"raw\0x"),
    "a data file with a zero byte": qcow2_header(b"", data_file=b"/b\0c"),
    "an extension beyond the end": qcow2_header(b"")[:104] + struct.pack(">II", 1, 1 << 20) + bytes(100),
    "a header that ends before its features": qcow2_header(b"")[:76],
}


@pytest.mark.parametrize("what", NO_HEADERS)
def test_what_is_no_header(what: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(NO_HEADERS[what])
    with pytest.raises(AgentError, match=r"no qcow2 image|damaged") as caught:
        header.read(str(path))
    assert caught.value.kind == errors.UNSUPPORTED
    with pytest.raises(UnknownError):
        list(chain.walk(str(path), "qcow2"))


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert header.beginning(str(tmp_path / "fifo")) == b""
    assert header.beginning("/dev/zero") == b""
    assert header.beginning(str(tmp_path)) == b""


SEEDS = [qcow2_header(b"/etc/passwd", version=version, base_format=b"raw", data_file=b"x") for version in (2, 3)]
EDITS = st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*SEEDS, header.MAGIC, b""]), EDITS, st.integers(0, 65536))
def test_any_header(seed: bytes, edits: list[tuple[int, bytes]], length: int) -> None:
    content = bytearray(seed)
    for at, data in edits:
        content[at : at + len(data)] = data
    with tempfile.NamedTemporaryFile() as file:
        file.write(content[:length])
        file.flush()
        try:
            header.read(file.name)
        except AgentError as error:
            assert error.kind == errors.UNSUPPORTED
        for format_ in ("qcow2", "", "raw"):
            try:
                nodes = list(chain.walk(file.name, format_))
            except UnknownError:
                assert format_ != "raw"
            else:
                assert nodes[0] == Node(file.name, format_)
                assert all(node.path.startswith("/") for node in nodes)
