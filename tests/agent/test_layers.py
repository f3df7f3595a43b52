"""The chain that an image of somebody else's rests on: read whole, locked whole, or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvm_clone.agent import server
from kvm_clone.agent.disks import chain, fingerprint, image, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.disks.disk import DATA
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .images import SIZE, make, vmdk, without_base_format
from .tools import KIB, make_overlay, make_qcow2, make_raw, need, noise

pytestmark = pytest.mark.timeout(60)


def nodes(**options: object) -> str:
    return f"json:{json.dumps(options)}"


def on_tree(at: Path, **options: object) -> Path:
    base = make_raw(at / "base", SIZE)
    file = {"driver": "file", "filename": str(base)}
    return make(at / "top", base=nodes(**{"driver": "raw", "file": file, **options}), base_format="raw")


def unsaid(at: Path, base: Path) -> Path:
    return without_base_format(make(at / "top", base=str(base), base_format="raw"))


def of_vmdk(at: Path) -> Path:
    (at / "base").write_bytes(vmdk(b"flat"))
    return make(at / "top", base=str(at / "base"), base_format="vmdk")


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a format that nobody says": (lambda at: unsaid(at, make(at / "base")), "does not say which format .*base has"),
    "a part of a file": (lambda at: on_tree(at, offset=512), "options that are not understood"),
    "a size of its own": (lambda at: on_tree(at, size=4096), "options that are not understood"),
    "a base of its own": (
        lambda at: make(
            at / "top",
            base=nodes(driver="qcow2", file={"filename": str(make(at / "base"))}, backing=None),
            base_format="qcow2",
        ),
        "options that are not understood",
    ),
    "another format": (of_vmdk, "the format vmdk"),
    "a base that is gone": (lambda at: make(at / "top", base="gone", base_format="raw"), "gone, which cannot be read"),
    "a device": (lambda at: make(at / "top", base="/dev/zero", base_format="raw"), "/dev/zero, which is neither"),
    "a server": (lambda at: make(at / "top", base="nbd://h/x", base_format="raw"), "nbd://h/x"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_chain_that_is_refused(what: str, tmp_path: Path) -> None:
    how, why = REFUSED[what]
    with pytest.raises(AgentError, match=why) as caught:
        chain.layers(str(how(tmp_path)), "qcow2")
    assert caught.value.kind == errors.UNSUPPORTED


def test_a_base_that_looks_raw_needs_no_format(tmp_path: Path) -> None:
    top = unsaid(tmp_path, make_raw(tmp_path / "base", SIZE))
    assert chain.layers(str(top), "qcow2")[1:] == [Node(str(tmp_path / "base"), "raw")]


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_a_base_by_its_nodes(flat: bool, tmp_path: Path) -> None:
    base = str(make_raw(tmp_path / "base", SIZE))
    options: dict[str, object] = {"driver": "raw", "read-only": True}
    options |= {"file.driver": "file", "file.filename": base} if flat else {"file": {"filename": base}}
    top = make(tmp_path / "top", base=nodes(**options), base_format="raw")
    assert chain.layers(str(top), "qcow2")[1:] == [Node(base, "raw")]


def test_an_image_that_is_gone_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        chain.layers(str(tmp_path / "gone"), "qcow2")


# Fingerprints.


def test_a_fingerprint_tells_of_every_layer(tmp_path: Path) -> None:
    base = make_raw(tmp_path / "base", SIZE)
    middle = make(tmp_path / "middle", base="base", base_format="raw")
    top = make(tmp_path / "top", base=str(middle), base_format="qcow2")
    before = host_info.image_fingerprint(str(top), "qcow2")
    assert before.startswith(f"{fingerprint.of(str(top))}:")
    base.chmod(0o600)  # as libvirt changes a base's owner for another VM
    assert host_info.image_fingerprint(str(top), "qcow2") == before
    for layer in (base, middle):
        os.utime(layer, ns=(0, layer.stat().st_mtime_ns + 1))
        after = host_info.image_fingerprint(str(top), "qcow2")
        assert fingerprint.content(after) != fingerprint.content(before)
        assert fingerprint.file_id(after) == fingerprint.file_id(before)
        before = after


def test_a_fingerprint_without_layers_is_the_files(tmp_path: Path) -> None:
    path = str(make(tmp_path / "top"))
    assert host_info.image_fingerprint(path, "qcow2") == host_info.image_fingerprint(path) == fingerprint.of(path)


# Locks.


@pytest.fixture
def serving() -> server.Server:
    return server.Server(0, 1)


def written(path: Path, format_: str) -> bool:
    """Whether QEMU may write the image."""
    need("qemu-io")
    argv = ["qemu-io", "-f", format_, "-c", "write 0 512", str(path)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_every_layer_is_locked(tmp_path: Path, serving: server.Server) -> None:
    base = make_raw(tmp_path / "base", SIZE)
    middle = make(tmp_path / "middle", base="base", base_format="raw")
    one, other = (make(tmp_path / name, base=str(middle), base_format="qcow2") for name in ("one", "other"))
    serving._lock_image(str(one), "qcow2")
    serving._lock_image(str(other), "qcow2")
    images = [(base, "raw"), (middle, "qcow2"), (one, "qcow2"), (other, "qcow2")]
    assert [written(*each) for each in images] == [False] * 4
    serving._unlock_images()
    assert [written(*each) for each in images] == [True] * 4, "layers that two images share are free as well"


def test_a_layer_that_is_being_written_is_in_use(tmp_path: Path, serving: server.Server) -> None:
    base = make_raw(tmp_path / "base", SIZE)
    top = make(tmp_path / "top", base="base", base_format="raw")
    writer = qemu.open_nbd([Node(str(base), "raw")], writable=True)
    with closing(writer), pytest.raises(AgentError, match=str(base)) as caught:
        serving._lock_image(str(top), "qcow2")
    assert caught.value.kind == errors.IN_USE


def test_a_file_that_has_taken_a_name_is_locked_in_its_turn(tmp_path: Path, serving: server.Server) -> None:
    disk, new = make_raw(tmp_path / "disk", SIZE), make_raw(tmp_path / "new", SIZE)
    serving._lock_image(str(disk), "raw")
    serving._lock_image(str(disk), "raw")
    old = disk.rename(tmp_path / "old")
    new.rename(disk)
    serving._lock_image(str(disk), "raw")
    assert (written(disk, "raw"), written(old, "raw")) == (False, True)
    serving._unlock_images()
    assert written(disk, "raw")


def test_of_a_chain_that_cannot_be_established_the_rest_is_locked(tmp_path: Path, serving: server.Server) -> None:
    top = make(tmp_path / "top", base="nbd://h/x", base_format="raw")
    serving._lock_image(str(top), "qcow2")
    assert not written(top, "qcow2")
    serving._unlock_images()


def test_a_layer_that_is_gone(tmp_path: Path, serving: server.Server) -> None:
    top = make(tmp_path / "top", base="gone", base_format="raw")
    with pytest.raises(AgentError, match=f"{tmp_path}/gone"):
        serving._lock_image(str(top), "qcow2")
    serving._unlock_images()


# Compressed clusters.


def compressed_in(path: Path) -> bool:
    with closing(image.MappedDisk(str(path), "qcow2")) as disk:
        return any(extent.compressed for extent in disk.extents() if extent.kind == DATA)


@pytest.mark.parametrize(
    ("base_options", "top_options", "base_size", "kept"),
    [
        ({}, {}, SIZE, True),
        ({"cluster_size": "4096"}, {}, SIZE, False),
        ({}, {"cluster_size": "4096"}, SIZE, False),
        ({}, {"extended_l2": "on", "cluster_size": "128k"}, SIZE, False),
        ({}, {}, SIZE - 4 * KIB, False),
    ],
    ids=["as the top's", "smaller", "larger", "subclusters above", "a base that ends within one"],
)
def test_compressed_clusters_of_a_base(
    base_options: dict[str, str], top_options: dict[str, str], base_size: int, kept: bool, tmp_path: Path
) -> None:
    """They stay compressed where each is a cluster of the top's, too; else they are read and sent as they are."""
    base = make_qcow2(
        tmp_path / "base", base_size, [(0, bytes(200 * KIB) + b"x" * 56 * KIB)], base_options, compress=True
    )
    options = [word for key, value in top_options.items() for word in ("-o", f"{key}={value}")]
    top = make(tmp_path / "top", *options, base=str(base), base_format="qcow2")
    assert compressed_in(top) is kept
    with closing(image.MappedDisk(str(top), "qcow2")) as disk:
        view = memoryview(bytearray(SIZE))
        disk.readinto(0, view)
        assert bytes(view[: 256 * KIB]) == bytes(200 * KIB) + b"x" * 56 * KIB


def test_what_a_copy_takes_counts_every_layer(tmp_path: Path) -> None:
    """Compressed content lies in the base, more of it in the overlay."""
    size = 8 * SIZE
    base = make_qcow2(tmp_path / "base", size, [(0, b"x" * 6 * SIZE)], compress=True)
    top = make_overlay(tmp_path / "top", base, "qcow2", size, [(6 * SIZE, noise(128 * KIB))])
    told = host_info.disk(str(top), "qcow2")
    assert told["data"] == 6 * SIZE + 128 * KIB
    assert host_info.disk(str(base), "qcow2")["stored"] + 128 * KIB < told["stored"] < 2 * SIZE
