"""How QEMU's programs are called: with the format of every layer, from one place, and within a time."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvm_clone.agent import process
from kvm_clone.agent.disks import chain, header, image, qemu
from kvm_clone.agent.disks.chain import Node
from kvm_clone.agent.host import host_info
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError
from kvm_clone.agent.staging import merge
from kvm_clone.agent.staging.asset_state import AssetState

from .images import SIZE, forged, listening, make, put
from .tools import MIB, SOURCES, eventually, make_raw, need, processes

pytestmark = pytest.mark.timeout(60)

PACKAGE = SOURCES / "kvm_clone"
PROGRAMS = re.compile(r"qemu-(img|nbd|io|storage-daemon)|guestfish|virt-(inspector|filesystems|cat)|\bblkid\b")

TEXTS = {
    ("agent/host/host_info.py", "qemu-img"),  # which version there is
    ("agent/host/host_info.py", "qemu-nbd"),
    ("planning/checks.py", "qemu-img"),  # for people
    ("planning/checks.py", "qemu-nbd"),
    ("planning/checks.py", "install qemu-utils (or qemu-img) on "),
    ("planning/checks.py", "repair it: qemu-img check -r all"),
    ("planning/checks.py", "let both name the same: virsh edit, or qemu-img rebase -u"),
    ("agent/disks/chain.py", " has (qemu-img rebase -u -F says it)"),
}
"""Where else the programs are named, and how."""

STARTERS = {
    "agent/__main__.py",  # ssh to the receiver
    "agent/watchdog.py",  # virsh
    "agent/host/peer.py",  # ssh
    "agent/process.py",
    "agent/disks/qemu.py",
}
"""Modules of the agent that start other programs."""


def modules() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def texts(tree: ast.Module) -> set[str]:
    """The string literals of a module that are no docstrings."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    said = {id(node.value) for node in nodes}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said]
    return {node.value for node in found if isinstance(node.value, str)}


def test_no_other_place_names_a_program_that_opens_images() -> None:
    found = {
        (name, text)
        for name, tree in modules().items()
        for text in texts(tree)
        if PROGRAMS.search(text) and name != "agent/disks/qemu.py"
    }
    assert found == TEXTS


def starts(tree: ast.Module) -> bool:
    """Whether a module can start a program."""
    words = {"subprocess", "create_subprocess_exec", "create_subprocess_shell", "system", "popen", "posix_spawn"}
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    ours = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "kvm_clone.agent.process"
    ]
    of_process = {"run", "start"} & {alias.name for node in ours for alias in node.names}
    replaces = any(name.startswith(("exec", "spawn")) for name in named)
    return replaces or bool(words & (named | imported) or of_process or "process" in imported)


def test_few_modules_start_programs() -> None:
    assert {name for name, tree in modules().items() if name.startswith("agent/") and starts(tree)} == STARTERS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The command lines that the module starts."""
    noted: list[Sequence[str]] = []
    for name in ("run", "start"):
        real = getattr(qemu, name)

        def noting(argv: Sequence[str], *more: Any, real: Any = real, **how: Any) -> Any:
            noted.append(argv)
            return real(argv, *more, **how)

        monkeypatch.setattr(qemu, name, noting)
    return noted


def merged(overlay: str, base: Node, ending: threading.Event | None = None) -> None:
    """Merge the overlay into that base, and let both be used again."""
    about = merge.Overlay("vda", overlay, base.path, base.format)
    for lock in merge.merge(about, ending or threading.Event()):
        lock.release()


def exercise(at: Path) -> None:
    """Everything that the module does."""
    base, over, raw = (str(at / name) for name in ("base", "over", "raw"))
    qemu.version("qemu-img")
    qemu.create(base, "qcow2", SIZE, {"cluster_size": "4096"})
    qemu.create(over, "qcow2", SIZE, {}, Node(base, "qcow2"))
    qemu.create(raw, "raw", SIZE, {})
    qemu.resize(base, "qcow2", SIZE)
    layers = chain.linear(over, "qcow2")
    for live in (False, True):
        qemu.info(over, "qcow2", live=live)
    list(qemu.map_extents(layers, 0, SIZE))
    for options in ({"writable": False}, {"writable": True}, {"writable": True, "compress": True}):
        qemu.open_nbd(layers, **options).close()
    assert qemu.is_sound(over, "qcow2")
    qemu.repair(over, "qcow2")
    merged(over, layers[1])


def test_every_layer_is_opened_with_its_format(calls: list[Sequence[str]], tmp_path: Path) -> None:
    exercise(tmp_path)
    opened = [argv for argv in calls if not {"--version", "create"} & set(argv)]
    for argv in opened:
        (name,) = [word for word in argv if str(tmp_path) in word]
        assert name.startswith("json:"), argv
        check_node(json.loads(name.removeprefix("json:")))
        assert argv[-1] == name or argv[-2:] == [name, str(SIZE)]
    for argv in calls:
        if "create" in argv:
            assert argv[argv.index("-f") + 1] in ("raw", "qcow2")
            assert ("-b" in argv) == ("-F" in argv) == ("-u" in argv)
    done = {argv[1] if argv[0] == "qemu-img" else argv[0] for argv in calls}
    assert done == {"--version", "create", "resize", "info", "map", "check", "qemu-nbd"}
    assert subcommands() == done - {"--version", "qemu-nbd"}, "what is not exercised here"


def check_node(node: dict[str, Any]) -> None:
    """A node says its driver, and a qcow2 image what it rests on, if only that it rests on nothing."""
    driver = node["driver"]
    assert driver in ("file", "raw", "qcow2", "compress")
    assert ("filename" in node) == (driver == "file")
    assert ("file" in node) == (driver != "file")
    assert ("backing" in node) == (driver == "qcow2")
    for child in (node.get("file"), node.get("backing")):
        if child is not None:
            check_node(child)


def subcommands() -> set[str]:
    """What qemu-img is asked to do by the module."""
    lists = [node.elts for node in ast.walk(modules()["agent/disks/qemu.py"]) if isinstance(node, ast.List)]
    values = [[one.value for one in elements if isinstance(one, ast.Constant)] for elements in lists]
    return {str(one[1]) for one in values if len(one) > 1 and one[0] == "qemu-img"}


NODES = 'json:{"driver":"raw","file":{"driver":"nbd","host":"127.0.0.1","port":"%s"}}'
FLAT_NODES = 'json:{"file.driver":"nbd","file.host":"127.0.0.1","file.port":"%s"}'

BASES: dict[str, Callable[[str], tuple[str, str]]] = {
    "nbd, said to be raw": lambda uri: (uri, "raw"),
    "nbd, said to be qcow2": lambda uri: (uri, "qcow2"),
    "nbd's old way": lambda uri: (f"nbd:127.0.0.1:{port(uri)}", "raw"),
    "nodes": lambda uri: (NODES % port(uri), "raw"),
    "flat nodes": lambda uri: (FLAT_NODES % port(uri), "raw"),
    "http": lambda uri: (f"http://127.0.0.1:{port(uri)}/x", "raw"),
}


def port(uri: str) -> str:
    return uri.rpartition(":")[2].partition("/")[0]


def opens(path: Path, *more: str) -> None:
    """Let QEMU open the image as it likes."""
    need("qemu-io")
    subprocess.run(
        ["qemu-io", "-r", *more, "-c", "read 0 512", str(path)], check=False, capture_output=True, timeout=30
    )


@pytest.mark.parametrize("how", BASES)
def test_a_base_that_is_no_local_file_is_never_connected_to(how: str, tmp_path: Path) -> None:
    with listening() as listener:
        base, base_format = BASES[how](listener.uri)
        top = str(make(tmp_path / "top", base=base, base_format=base_format))
        assert qemu.info(top, "qcow2")["virtual-size"] == SIZE
        assert qemu.info(top, "qcow2", live=True)["virtual-size"] == SIZE
        assert qemu.is_sound(top, "qcow2")
        qemu.repair(top, "qcow2")
        assert host_info.disk(top, "qcow2")["error"] == f"{top} rests on what is no file: {base}"
        for open_ in (image.open_for_reading, image.open_for_filling):
            with pytest.raises(AgentError, match="rests on what is no file"):
                open_(top, "qcow2")
        alone = [Node(top, "qcow2")]
        assert sum(extent.length for extent in qemu.map_extents(alone, 0, SIZE)) == SIZE
        for writable in (False, True):
            qemu.open_nbd(alone, writable=writable).close()
        merged(top, Node(str(make_raw(tmp_path / "base", SIZE)), "raw"))
        assert listener.connections == 0
        if how != "http":  # a module of its own, which need not be installed
            opens(Path(top), "-f", "qcow2")
            assert eventually(lambda: listener.connections > 0), "QEMU itself connects"


FORMATS = sorted(forged(b""))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_raw_disk_with_a_header_is_raw_for_qemu(format_: str, tmp_path: Path) -> None:
    with listening() as listener:
        path = str(make_raw(tmp_path / "disk", MIB, [(0, forged(listener.uri.encode())[format_])]))
        assert qemu.info(path, "raw")["format"] == "raw"
        assert sum(extent.length for extent in qemu.map_extents([Node(path, "raw")], 0, MIB)) == MIB
        with suppress(AgentError):
            assert qemu.is_sound(path, "raw")
        disk = qemu.open_nbd([Node(path, "raw")], writable=False)
        assert disk.size == MIB
        disk.close()
        assert host_info.disk(path, "raw")["virtual_size"] == MIB
    assert listener.connections == 0


def test_an_image_with_another_file_is_not_given_to_qemu(tmp_path: Path, calls: list[Sequence[str]]) -> None:
    """Who can write in a pool's directory may put one in the place of ours."""
    with listening() as listener:
        path = tmp_path / "top"
        path.write_bytes(forged(listener.uri.encode())["qcow2 with a data file"])
        assert header.read(str(path)).data_file
        top = str(path)
        acts: list[Callable[[], object]] = [
            lambda: qemu.info(top, "qcow2"),
            lambda: qemu.resize(top, "qcow2", SIZE),
            lambda: list(qemu.map_extents([Node(top, "qcow2")], 0, SIZE)),
            lambda: qemu.open_nbd([Node(top, "qcow2")], writable=True),
            lambda: merged(top, Node(top, "raw")),
        ]
        for act in acts:
            with pytest.raises(AgentError, match="top keeps its content in another file"):
                act()
        assert not qemu.is_sound(top, "qcow2")
        qemu.repair(top, "qcow2")
        assert calls == []
        with pytest.raises(AgentError, match="top keeps its content in another file"):
            merged(str(make(tmp_path / "over")), Node(top, "qcow2"))
        assert not [word for argv in calls for word in argv if top in word]
        assert listener.connections == 0


LONG = f"60.{os.getpid()}"
"""Seconds, which nobody else sleeps for."""


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qemu-img that reads an image from a server which does not answer."""
    path = make(tmp_path / "disk")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qemu-img").write_text(f"#!/bin/sh\nexec sleep {LONG}\n")
    (programs / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(qemu, "SECONDS", 0.3)
    monkeypatch.setattr(qemu, "run", functools.partial(process.run, seconds=0.3))
    monkeypatch.setattr(qemu, "_SLOWEST", 1 << 40)
    return path


STUCK: dict[str, Callable[[str], object]] = {
    "map": lambda path: list(qemu.map_extents([Node(path, "qcow2")], 0, SIZE)),
    "check": lambda path: qemu.is_sound(path, "qcow2"),
    "merge": lambda path: merged(path, Node(path, "qcow2")),
}


@pytest.mark.parametrize("what", STUCK)
def test_what_does_not_end_is_ended(what: str, stuck: Path) -> None:
    started = time.monotonic()
    with pytest.raises(AgentError, match=r"did not end|printed nothing") as caught:
        STUCK[what](str(stuck))
    assert caught.value.kind == errors.IO
    assert time.monotonic() - started < 10
    assert not processes(f"sleep\x00{LONG}")


def test_a_merge_that_is_let_go_of_ends_soon(stuck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "run", process.run)
    ending = threading.Event()
    threading.Timer(0.3, ending.set).start()
    started = time.monotonic()
    with pytest.raises(AgentError, match="can be repeated") as caught:
        merged(str(stuck), Node(str(stuck), "qcow2"), ending)
    assert caught.value.kind == errors.INTERRUPTED
    assert time.monotonic() - started < 5


def test_a_map_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has told whole counts until then; how it ended is the error."""
    entry = '{"start": 0, "length": 4096, "depth": 0, "zero": true, "data": false}'
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\nprintf '%s,\\n%s' '[{entry}' '{entry[:30]}'\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = qemu.map_extents([Node(str(tmp_path / "disk"), "raw")], 0, SIZE)
    assert next(told).length == 4096
    with pytest.raises(AgentError, match="qemu-img: ended with status -9") as caught:
        next(told)
    assert caught.value.kind == errors.IO


def test_the_time_that_is_given_grows_with_the_file(tmp_path: Path) -> None:
    small, large = make_raw(tmp_path / "small", MIB), make_raw(tmp_path / "large", MIB, [(0, b"x" * MIB)])
    assert qemu._seconds(str(small)) == process.SECONDS
    assert qemu._seconds(str(large)) >= process.SECONDS + 1


def test_a_torn_image_is_not_sound_wherever_it_lies(tmp_path: Path) -> None:
    """`block` is no reason to take a failure for a lock."""
    (tmp_path / 'a block" lock').mkdir()
    path = make(tmp_path / 'a block" lock' / "disk")
    put(path, 40, struct.pack(">Q", 1))  # the L1 table
    assert not qemu.is_sound(str(path), "qcow2")
    os.truncate(path, 40)
    assert not qemu.is_sound(str(path), "qcow2")
    make(path)
    other = qemu.open_nbd([Node(str(path), "qcow2")], writable=True)
    assert qemu.is_sound(str(path), "qcow2"), "another process has it open"
    other.close()


def test_what_is_staged_is_told_without_opening_what_it_names(tmp_path: Path) -> None:
    """A part that somebody has replaced is not whole."""
    part = tmp_path / ".kvm-clone-0f-vda.part"
    record = {"disk": "vda", "part": str(part), "final": str(tmp_path / "vda"), "size": SIZE, "format": "qcow2"}
    state = AssetState(record)
    state.add_durable([[0, SIZE]])
    make(part)
    assert state.as_dict()["durable"] == SIZE
    with listening() as listener:
        part.write_bytes(forged(listener.uri.encode())["qcow2 with a data file"])
        assert state.as_dict()["durable"] == 0
        assert listener.connections == 0
