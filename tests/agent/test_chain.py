"""What files an image consists of, against images that the real qemu-img has made."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_clone.agent.disks import chain, image
from kvm_clone.agent.disks.chain import Node, UnknownError
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .images import SIZE, encrypted, forged, listening, make, put, qcow2_header, without_base_format
from .tools import MIB, as_nobody, make_raw, noise, read

pytestmark = pytest.mark.timeout(60)

Make = Callable[[Path], Path]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["file", "raw", "qcow2", "nbd", "/a", "b", ""])
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["driver", "file", "filename", "file.filename", "file.driver", "backing", "data-file"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from(["", "raw", "qcow2", "vmdk"]))
def test_any_tree_of_nodes(tree: object, format_: str) -> None:
    try:
        nodes = chain.opened("json:" + json.dumps(tree), format_, "/beside")
    except UnknownError:
        return
    for node in nodes:
        assert node.path.startswith("/")
        os.fsencode(node.path)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.builds("{}:{}".format, st.sampled_from(["json", "file", "nbd", "fat"]), st.text()))
def test_any_name(name: str) -> None:
    try:
        nodes = chain.opened(name, "", "/beside")
    except UnknownError:
        return
    assert all(node.path.startswith("/") for node in nodes)


IS_RAW, IS_QCOW2, NOT_SAID = Node("/a/b", "raw"), Node("/a/b", "qcow2"), Node("/a/b", "")
NAMES: dict[str, tuple[str, str, list[Node] | None]] = {
    "absolute": ("/a/b", "raw", [IS_RAW]),
    "relative": ("b", "raw", [Node("/beside/b", "raw")]),
    "up": ("../b", "raw", [Node("/beside/../b", "raw")]),
    "a colon after a slash": ("./x:y", "raw", [Node("/beside/./x:y", "raw")]),
    "file:": ("file:/a/b", "qcow2", [IS_QCOW2]),
    "file:, where QEMU runs": ("file:b", "qcow2", None),
    "host_device:": ("host_device:/a/b", "raw", [IS_RAW]),
    "nested": ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/a/b"}}', "", [IS_QCOW2]),
    "nested, said twice": ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/a/b"}}', "qcow2", [IS_QCOW2]),
    "nested, said otherwise": ('json:{"driver":"raw","file":{"driver":"file","filename":"/a/b"}}', "qcow2", None),
    "flattened": ('json:{"driver":"raw","file.driver":"file","file.filename":"/a/b"}', "", [IS_RAW]),
    "flattened, no driver": ('json:{"file.filename":"/a/b"}', "qcow2", [IS_QCOW2]),
    "the file's node alone": ('json:{"driver":"file","filename":"/a/b"}', "raw", [IS_RAW]),
    "nobody says what it is": ('json:{"filename":"/a/b"}', "", [NOT_SAID]),
    "with its base": (
        'json:{"driver":"qcow2","file":{"filename":"/a/b"},"backing":{"driver":"raw","file":{"filename":"/c"}}}',
        "",
        [IS_QCOW2, Node("/c", "raw")],
    ),
    "with its data": (
        'json:{"driver":"qcow2","file":{"filename":"/a/b"},"data-file":{"driver":"file","filename":"/c"}}',
        "",
        [IS_QCOW2, Node("/c", "raw")],
    ),
    "without a base": ('json:{"driver":"qcow2","file":{"filename":"/a/b"},"backing":null}', "", [IS_QCOW2]),
    "two layers of formats": (
        'json:{"driver":"raw","file":{"driver":"qcow2","file":{"filename":"/a/b"}}}',
        "",
        [IS_QCOW2],
    ),
    "nbd": ("nbd://host:1/x", "raw", []),
    "nbd's old way": ("nbd:unix:/run/x", "raw", []),
    "rbd": ("rbd:pool/image", "raw", []),
    "http": ("https://host/x.qcow2", "qcow2", []),
    "nested nbd": ('json:{"driver":"qcow2","file":{"driver":"nbd","host":"h","port":"1"}}', "", []),
    "a protocol of no kind that we know": ("fat:rw:/tmp", "raw", None),
    "a driver of no kind that we know": ('json:{"driver":"quorum","children":[]}', "", None),
    "a filter": ('json:{"driver":"throttle","file":{"filename":"/a/b"}}', "", None),
    "a driver that is no text": ('json:{"driver":[],"file":{"filename":"/a/b"}}', "", None),
    "another node by its name": ('json:{"driver":"qcow2","file":"a-node"}', "", None),
    "no file": ('json:{"driver":"qcow2"}', "", None),
    "a relative file": ('json:{"driver":"file","filename":"b"}', "", None),
    "a file that is no text": ('json:{"driver":"file","filename":5}', "", None),
    "a zero byte": ('json:{"driver":"file","filename":"/a\\u0000b"}', "", None),
    "half a surrogate": ('json:{"driver":"file","filename":"/a\\ud800b"}', "", None),
    "both ways at once": ('json:{"file":"x","file.filename":"/a/b"}', "", None),
    "not JSON": ("json:{", "", None),
    "no object": ("json:[]", "", None),
    "a deep one": ("json:" + '{"a":' * 5000 + "1" + "}" * 5000, "", None),
}


@pytest.mark.parametrize("what", NAMES)
def test_what_a_name_opens(what: str) -> None:
    name, format_, expected = NAMES[what]
    if expected is None:
        with pytest.raises(UnknownError):
            chain.opened(name, format_, "/beside")
    else:
        assert chain.opened(name, format_, "/beside") == expected


def qemu_opens(path: Path) -> list[str]:
    """The files of the chain, as QEMU names them when it opens it."""
    argv = ["qemu-img", "info", "--backing-chain", "--output=json", "-f", "qcow2", "--", str(path)]
    answer = json.loads(subprocess.run(argv, check=True, capture_output=True, cwd="/").stdout)
    return [one["filename"] for one in answer]


def test_a_chain_is_walked_as_qemu_walks_it(tmp_path: Path) -> None:
    """Five images: absolute, relative, of a format that is not said, `file:`, and nodes in both notations."""
    (tmp_path / "below").mkdir()
    bottom = make_raw(tmp_path / "below" / "raw", SIZE)
    nested = {"driver": "raw", "file": {"driver": "file", "filename": str(bottom)}}
    five = make(tmp_path / "below" / "5", base=f"json:{json.dumps(nested)}", base_format="raw")
    flat = {"driver": "qcow2", "file.driver": "file", "file.filename": str(five)}
    four = make(tmp_path / "below" / "4", base=f"json:{json.dumps(flat)}", base_format="qcow2")
    three = make(tmp_path / "below" / "3", base=f"file:{four}", base_format="qcow2")
    two = without_base_format(make(tmp_path / "2", base="below/3", base_format="qcow2"))
    one = make(tmp_path / "1", base=str(two), base_format="qcow2")
    wanted = [one, two, three, four, five, bottom]
    found = list(chain.walk(str(one), "qcow2"))
    assert [node.path for node in found] == list(map(str, wanted)) == qemu_opens(one)
    assert [node.format for node in found] == ["qcow2", "qcow2", "", "qcow2", "qcow2", "raw"]
    assert [node.format for node in chain.linear(str(one), "qcow2")] == [*["qcow2"] * 5, "raw"]


def test_what_is_said_beside_nodes_counts_for_qemu(tmp_path: Path) -> None:
    """The header calls the base a qcow2 image, its nodes a raw one: QEMU follows it, and we do not take it for raw."""
    deep = make(tmp_path / "deep")
    middle = make(tmp_path / "middle", base=str(deep), base_format="qcow2")
    nodes = {"driver": "raw", "file": {"driver": "file", "filename": str(middle)}}
    top = make(tmp_path / "top", base=f"json:{json.dumps(nodes)}", base_format="qcow2")
    assert str(deep) in qemu_opens(top)
    with pytest.raises(UnknownError):
        list(chain.walk(str(top), "qcow2"))


def test_a_data_file_is_opened_from_where_qemu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("top"), "-o", "data_file=data")
    with pytest.raises(UnknownError, match="without a directory"):
        list(chain.walk(str(tmp_path / "top"), "qcow2"))
    make(tmp_path / "other", "-o", f"data_file={tmp_path}/data2")
    assert list(chain.walk(str(tmp_path / "other"), "qcow2")) == [
        Node(f"{tmp_path}/other", "qcow2"),
        Node(f"{tmp_path}/data2", "raw"),
    ]


UNKNOWN: dict[str, tuple[Make, str]] = {
    "a missing base": (lambda at: make(at / "top", base="/nowhere/b", base_format="qcow2"), "b cannot be read"),
    "a base that is a directory": (lambda at: make(at / "top", base=str(at), base_format="qcow2"), "no qcow2 image"),
    "a base below a file": (
        lambda at: make(at / "top", base=f"{make_raw(at / 'b', 1)}/c", base_format="qcow2"),
        "cannot be read: Not a directory",
    ),
    "a base that is none": (
        lambda at: make(at / "top", base=str(make_raw(at / "b", SIZE)), base_format="qcow2"),
        "no qcow2 image",
    ),
    "a base of another format": (lambda at: make(at / "top", base="/b", base_format="vmdk"), "the format vmdk"),
    "a base that looks like another format": (
        lambda at: without_base_format(
            make(at / "top", base=str(make_raw(at / "b", SIZE, [(0, b"QED\0")])), base_format="raw")
        ),
        "the format qed",
    ),
    "a data file that is not named": (
        lambda at: put(make(at / "top"), 72, struct.pack(">Q", 4)),
        "does not name",
    ),
    "an image of version 1": (lambda at: put(make(at / "top"), 4, struct.pack(">I", 1)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_an_image_consists_of_is_not_known(what: str, tmp_path: Path) -> None:
    how, why = UNKNOWN[what]
    top = how(tmp_path)
    found: list[Node] = []
    with pytest.raises(UnknownError, match=why):
        found.extend(chain.walk(str(top), "qcow2"))
    assert found[0] == Node(str(top), "qcow2"), "what is known comes first"
    assert len(found) == (2 if " base" in what else 1)


def test_an_image_that_may_not_be_read(open_to_all: Path) -> None:
    base = make(open_to_all / "base")
    top = make(open_to_all / "top", base=str(base), base_format="qcow2")
    base.chmod(0)
    with as_nobody(), pytest.raises(UnknownError, match="base cannot be read: Permission denied"):
        list(chain.walk(str(top), "qcow2"))
    base.unlink()
    base.symlink_to(base)
    with pytest.raises(UnknownError, match="cannot be read"):
        list(chain.walk(str(top), "qcow2"))


def test_a_loop_of_bases_ends(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    make(one, base=str(two), base_format="qcow2")
    make(two, base=str(one), base_format="qcow2")
    assert [node.path for node in chain.walk(str(one), "qcow2")] == [str(one), str(two)]
    with pytest.raises(AgentError, match="more than"):
        chain.linear(str(one), "qcow2")


def test_a_loop_that_gets_another_name_each_time_ends(tmp_path: Path) -> None:
    make(tmp_path / "top", base="./top", base_format="qcow2")
    with pytest.raises(UnknownError, match="more than"):
        list(chain.walk(str(tmp_path / "top"), "qcow2"))


FORMATS = sorted(forged(b""))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_raw_disk_is_never_followed(format_: str, tmp_path: Path) -> None:
    """A guest can write any header into it."""
    victim = make_raw(tmp_path / "victim", MIB, [(0, b"secret")])
    with listening() as listener:
        for name in (os.fsencode(victim), b"victim", listener.uri.encode()):
            head = forged(name)[format_]
            path = make_raw(tmp_path / "disk", MIB, [(0, head), (MIB // 2, noise(4096))])
            content = path.read_bytes()
            assert list(chain.walk(str(path), "raw")) == [Node(str(path), "raw")]
            assert chain.linear(str(path), "raw") == [Node(str(path), "raw")]
            with closing(image.open_for_reading(str(path), "raw")) as disk:
                assert (disk.size, read(disk)) == (MIB, content)
                assert sum(extent.length for extent in disk.extents()) == MIB
    assert listener.connections == 0


LINEAR: dict[str, tuple[Make, str]] = {
    "a remote base": (
        lambda at: make(at / "top", base="nbd://host:1/x", base_format="raw"),
        "rests on what is no file",
    ),
    "a base of nodes with two files": (
        lambda at: make(
            at / "top",
            base='json:{"driver":"qcow2","file":{"filename":"/a"},"backing":{"file":{"filename":"/b"}}}',
            base_format="qcow2",
        ),
        "rests on what is no file",
    ),
    "a protocol that is not known": (lambda at: make(at / "top", base="fat:/x", base_format="raw"), "rests on what"),
    "a data file": (lambda at: make(at / "top", "-o", f"data_file={at}/data"), "keeps its content in another file"),
    "encrypted": (encrypted, "is encrypted"),
    "a base of a format that has files of its own": (
        lambda at: make(at / "top", base=str(make_raw(at / "b", SIZE)), base_format="vmdk"),
        "the format vmdk",
    ),
    "a base with a data file": (
        lambda at: make(at / "top", base=str(make(at / "b", "-o", f"data_file={at}/data")), base_format="qcow2"),
        "b keeps its content in another file",
    ),
}


@pytest.mark.parametrize("what", LINEAR)
def test_what_is_no_linear_chain(what: str, tmp_path: Path) -> None:
    how, why = LINEAR[what]
    top = how(tmp_path)
    with pytest.raises(AgentError, match=why) as caught:
        chain.linear(str(top), "qcow2")
    assert caught.value.kind == errors.UNSUPPORTED


def test_a_linear_chain_whose_base_is_gone(tmp_path: Path) -> None:
    top = make(tmp_path / "top", base=str(tmp_path / "gone"), base_format="qcow2")
    with pytest.raises(FileNotFoundError):
        chain.linear(str(top), "qcow2")


def test_the_base_of_a_linear_chain_is_what_the_image_says(tmp_path: Path) -> None:
    """A raw base that looks like a qcow2 image is none; one of which nobody says what it is may be one."""
    base = make_raw(tmp_path / "base", SIZE, [(0, qcow2_header(b"/etc/passwd", base_format=b"raw"))])
    top = make(tmp_path / "top", base=str(base), base_format="raw")
    assert chain.linear(str(top), "qcow2") == [Node(str(top), "qcow2"), Node(str(base), "raw")]
    without_base_format(top)
    assert [node.path for node in chain.linear(str(top), "qcow2")] == [str(top), str(base), "/etc/passwd"]
