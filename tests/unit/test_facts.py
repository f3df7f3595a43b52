"""What is known of hosts and images, from what qemu-img says of images that it made."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent.disks import fingerprint, qemu
from kvm_clone.agent.host import host_info as agent
from kvm_clone.hosts import answers
from kvm_clone.image import Image
from kvm_clone.planning.facts import HostFacts, ImageFacts

MIB = 1 << 20
SIZE = 3 * MIB + 512

if shutil.which("qemu-img") is None:
    if os.environ.get("CI") == "true":
        pytest.fail("qemu-img is not installed", pytrace=False)
    pytest.skip("qemu-img is not installed", allow_module_level=True)


def make(path: Path, options: str = "", *more: str, size: int = SIZE) -> Path:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *more]
    subprocess.run([*argv, str(path), str(size)], check=True)
    return path


def known(path: Path) -> ImageFacts:
    return replace(answers.image(str(path), "qcow2")(agent.disk(str(path), "qcow2")), target="vda")


def features(path: Path) -> dict[str, Any]:
    """What makes one empty image unlike another."""
    about = qemu.info(str(path), "qcow2")
    return {"virtual-size": about["virtual-size"], "cluster-size": about["cluster-size"], **about["format-specific"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "16"}),
        ("compat=0.10", {"cluster_size": "65536", "compat": "0.10", "refcount_bits": "16"}),
        ("compat=v2,cluster_size=512", {"cluster_size": "512", "compat": "0.10", "refcount_bits": "16"}),
        ("cluster_size=4k", {"cluster_size": "4096", "compat": "1.1", "refcount_bits": "16"}),
        ("cluster_size=2M", {"cluster_size": "2097152", "compat": "1.1", "refcount_bits": "16"}),
        ("refcount_bits=1", {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "1"}),
        ("refcount_bits=64", {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "64"}),
        (
            "lazy_refcounts=on",
            {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "16", "lazy_refcounts": "on"},
        ),
        (
            "compression_type=zstd",
            {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "16", "compression_type": "zstd"},
        ),
        (
            "extended_l2=on,cluster_size=128k",
            {"cluster_size": "131072", "compat": "1.1", "refcount_bits": "16", "extended_l2": "on"},
        ),
        (
            "extended_l2=on,cluster_size=1M,compression_type=zstd,lazy_refcounts=on,refcount_bits=32",
            {
                "cluster_size": "1048576",
                "compat": "1.1",
                "refcount_bits": "32",
                "compression_type": "zstd",
                "extended_l2": "on",
                "lazy_refcounts": "on",
            },
        ),
        ("preallocation=metadata", {"cluster_size": "65536", "compat": "1.1", "refcount_bits": "16"}),
    ],
)
def test_the_options_make_an_image_with_the_same_features(
    tmp_path: Path, options: str, expected: dict[str, str]
) -> None:
    image = known(make(tmp_path / "a.qcow2", options))
    assert dict(image.options) == expected
    copy = tmp_path / "b.qcow2"
    qemu.create(str(copy), image.format, image.virtual_size, dict(image.options))
    assert features(copy) == features(tmp_path / "a.qcow2")
    assert dict(known(copy).options) == expected


def test_a_bitmap_is_no_feature_to_recreate(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2")
    plain = known(path).options
    subprocess.run(["qemu-img", "bitmap", "--add", str(path), "backup"], check=True)
    assert known(path).options == plain


def test_what_is_known_of_a_plain_image(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 192k", str(path)], check=True, capture_output=True)
    path.chmod(0o640)
    image = known(path)
    about = path.stat()
    assert image == ImageFacts(
        str(path),
        "qcow2",
        target="vda",
        virtual_size=SIZE,
        allocated=about.st_blocks * 512,
        data=192 << 10,
        mode=0o640,
        user=path.owner(),
        group=path.group(),
        fingerprint=fingerprint.of(str(path)),
        options=(("cluster_size", "65536"), ("compat", "1.1"), ("refcount_bits", "16")),
    )


def test_a_raw_image_has_no_options(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 4096)
    os.truncate(path, SIZE)
    image = answers.image(str(path), "raw")(agent.disk(str(path), "raw"))
    assert (image.virtual_size, image.data, image.options, image.error) == (SIZE, 4096, (), "")


def test_a_backing_file(tmp_path: Path) -> None:
    make(tmp_path / "base.qcow2")
    path = make(tmp_path / "a.qcow2", "", "-b", str(tmp_path / "base.qcow2"), "-F", "qcow2")
    found = known(path)
    assert found.layers == (Image(str(tmp_path / "base.qcow2"), "qcow2"),)
    assert len(found.fingerprint.split(":")) == 6


def test_a_chain(tmp_path: Path) -> None:
    """What the guest sees lies in any of the layers."""
    (tmp_path / "raw").write_bytes(bytes(range(256)) * (SIZE // 256))
    make(tmp_path / "middle.qcow2", "", "-b", "raw", "-F", "raw")
    path = make(tmp_path / "a.qcow2", "", "-b", "middle.qcow2", "-F", "qcow2", size=SIZE + MIB)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", str(path)], check=True, capture_output=True)
    found = known(path)
    assert [(layer.path, layer.format) for layer in found.layers] == [
        (str(tmp_path / "middle.qcow2"), "qcow2"),
        (str(tmp_path / "raw"), "raw"),
    ]
    assert (found.data, found.virtual_size) == (SIZE, SIZE + MIB)
    assert answers.image(str(path), "qcow2")(agent.disk(str(path), "qcow2", live=True)).data == SIZE


BROKEN_CHAINS: dict[str, tuple[tuple[str, ...], str]] = {
    "a base that is gone": (("-b", "gone.qcow2", "-F", "qcow2", "-u"), "gone.qcow2"),
    "a base on a server": (("-b", "nbd://h/x", "-F", "raw", "-u"), "nbd://h/x"),
    "a device": (
        ("-b", "/dev/zero", "-F", "raw", "-u"),
        "/dev/zero, which is neither a regular file nor a block device",
    ),
}


@pytest.mark.parametrize("what", BROKEN_CHAINS)
def test_a_chain_that_cannot_be_read(what: str, tmp_path: Path) -> None:
    options, said = BROKEN_CHAINS[what]
    assert said in known(make(tmp_path / "a.qcow2", "", *options)).error


def test_a_data_file(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", f"data_file={tmp_path}/data.raw")
    assert known(path).data_file == f"{tmp_path}/data.raw"


def test_encryption(tmp_path: Path) -> None:
    secret = ["--object", "secret,id=s,data=open sesame"]
    options = "encrypt.format=aes,encrypt.key-secret=s"  # LUKS takes seconds to make
    plain, path = make(tmp_path / "plain.qcow2"), make(tmp_path / "a.qcow2", options, *secret)
    assert known(path).encrypted
    assert not known(plain).encrypted


def test_internal_snapshots(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2")
    assert known(path).snapshots == ()
    for name in ("before", "after the update"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, str(path)], check=True)
    assert known(path).snapshots == ("before", "after the update")


def test_a_corrupt_image(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2")
    assert not known(path).corrupt
    with path.open("r+b") as file:
        file.seek(79)  # the last byte of incompatible_features; bit 1 says corrupt
        file.write(b"\2")
    assert known(path).corrupt


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    image = known(tmp_path / "missing.qcow2")
    assert image == ImageFacts(f"{tmp_path}/missing.qcow2", "qcow2", target="vda", error="No such file or directory")


def test_a_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(b"no image" * 1000)
    assert "is no qcow2 image" in known(tmp_path / "a.qcow2").error


def test_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    image = answers.image(f"{tmp_path}/link", "raw")(agent.disk(f"{tmp_path}/link", "raw"))
    assert not image.regular


def test_an_image_of_which_nothing_is_known() -> None:
    assert answers.image("/a", "raw")({"error": "locked"}) == ImageFacts("/a", "raw", error="locked")


def test_host_facts() -> None:
    here = answers.host("kc-a")(agent.host())
    version = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout
    assert here.name == "kc-a"
    assert here.hostname == os.uname().nodename
    assert here.qemu_img
    assert f"version {here.qemu_img}" in version


def test_a_host_without_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    here = answers.host("kc-a")(agent.host())
    assert isinstance(here, HostFacts)
    assert (here.qemu_img, here.qemu_nbd) == (None, None)
