"""The agent's calls as the controller makes them: the same table as the agent's, and answers that are checked."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvm_clone
from kvm_clone.agent.host import host_info, things, uses
from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.agent.server import Server
from kvm_clone.agent.staging.hold import Hold
from kvm_clone.agent.staging.stage import Stage
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.agent_errors import AgentCallError

METHODS = {name: call for name, call in vars(AgentClient).items() if not name.startswith("_")}
SENT_BY_THE_SERVER = {"self", "held"}
"""Arguments that the agent gives to itself."""


def arguments(call: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(call).parameters) - SENT_BY_THE_SERVER


def behind(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """What the agent's row calls in the end, where it hands all arguments on."""
    if name in ("hold", "stage"):
        return Hold if name == "hold" else Stage
    if name == "uses":
        return uses.uses
    if name == "exists":
        return os.path.exists
    if call.__name__ == "<lambda>" and name != "ping":
        return getattr(Stage, name)  # type: ignore[no-any-return]
    return call


def table() -> dict[str, Callable[..., Any]]:
    return {name: behind(name, call) for name, call in Server(0, 1)._calls.items()}


def test_both_tables_have_the_same_calls() -> None:
    assert METHODS.keys() == table().keys()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_both_tables_name_the_same_arguments(name: str) -> None:
    assert arguments(METHODS[name]) == arguments(table()[name])


class Answering:
    """Answers every call alike, and keeps what was asked."""

    name = "a"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def call(self, name: str, progress: Any = None, /, **arguments: Any) -> Any:
        self.asked.append((name, arguments))
        return self.answer


def sample(one: inspect.Parameter) -> Any:
    if one.name == "ranges":
        return []
    return ["x"] if str(one.annotation).startswith("Sequence") else {}


def samples(method: Callable[..., Any]) -> dict[str, Any]:
    return {one.name: sample(one) for one in inspect.signature(method).parameters.values() if one.name != "self"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_makes_its_call_and_takes_no_malformed_answer(name: str) -> None:
    """No answer of the protocol is a list within a list within a list."""
    given = samples(METHODS[name])
    caller = Answering([[["nonsense"]]])
    with pytest.raises(AgentCallError, match=f"^a: the agent's answer to {name} is malformed") as caught:
        asyncio.run(getattr(AgentClient(caller), name)(**given))
    assert caught.value.kind == kinds.PROTOCOL
    ((called, sent),) = caller.asked
    assert called == name
    assert sent.keys() == given.keys() - {"progress"}


HERE = ("boot", "libvirt", "machine")
HOST = {
    "identity": dict.fromkeys(HERE, "x"),
    "hostname": "a",
    "python": "3.11",
    "qemu_img": None,
    "qemu_nbd": "7.2",
    "time": 1.5,
    "locks": "",
}
RAW = {
    "regular": True,
    "device": False,
    "virtual_size": 1 << 40,
    "allocated": 0,
    "data": 1,
    "stored": 0,
    "mode": 0o640,
    "user": "root",
    "group": "kvm",
    "fingerprint": "1:2:3:4:5",
    "layers": [],
}
QCOW2 = {**RAW, "image": {"cluster-size": 65536, "format-specific": {"data": {"corrupt": False}}}}
DIRECTORY = {
    "path": "/d",
    "exists": True,
    "writable": False,
    "free": 0,
    "names": [],
    "more": False,
    "inodes": 1,
    "filesystem": 1,
    "reflink": False,
    "longest": 255,
    "abilities": {},
}
RESOURCES = {
    "hugepages": {"2048": [8, 4]},
    "default_hugepage": 2048,
    "hugetlbfs": True,
    "nodes": "0-1",
    "cpus": None,
    "usb": ["1d6b:0002"],
    "addresses": {"192.0.2.7": False, "a.name": None},
}
JOURNALLED = {
    "directory": "/d",
    "path": "/d/j",
    "operation": "aa",
    "name": "web",
    "active": False,
    "holder": "",
    "foreign": "",
    "changed": 1.0,
    "defining": False,
    "committed": False,
    "remove": [],
    "forget": [],
    "published": [],
    "disks": {},
}
WHOLE: list[tuple[str, dict[str, Any], Any]] = [
    ("host", {}, HOST),
    ("disk", {"path": "/d", "image_format": "raw"}, RAW),
    ("disk", {"path": "/d", "image_format": "qcow2"}, QCOW2),
    ("disk", {"path": "/d", "image_format": "raw"}, {"error": "it is not there"}),
    ("directory", {"path": "/d"}, DIRECTORY),
    ("directory", {"path": "/d"}, {**DIRECTORY, "names": ["\udcff"]}),
    ("resources", {"addresses": []}, RESOURCES),
    ("staged", {"directories": []}, [JOURNALLED]),
    ("staged", {"directories": []}, [{"directory": "/d", "path": "/d/j", "error": "torn"}]),
]
"""Answers that are well formed, each with every field that it may not lack."""


@pytest.mark.parametrize(("name", "given", "answer"), WHOLE)
def test_an_answer_lacks_no_field_and_has_none_of_another_type(name: str, given: dict[str, Any], answer: Any) -> None:
    def asked(what: Any) -> Any:
        return asyncio.run(getattr(AgentClient(Answering(what)), name)(**given))

    asked(answer)
    many = isinstance(answer, list)
    about = answer[0] if many else answer
    for field in set(about) - {"image"}:
        less = {key: value for key, value in about.items() if key != field}
        for changed in (less, {**about, field: object()}):
            with pytest.raises(AgentCallError, match="malformed"):
                asked([changed] if many else changed)


def test_what_a_real_agent_says_is_read(tmp_path: Path) -> None:
    """In this process: the answers travel as JSON, so that tuples become lists."""
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    said: list[tuple[str, dict[str, Any], Any]] = [
        ("host", {}, host_info.host()),
        ("disk", {"path": "a.raw", "image_format": "raw"}, host_info.disk(str(tmp_path / "a.raw"), "raw")),
        ("disk", {"path": "b.raw", "image_format": "raw"}, host_info.disk(str(tmp_path / "b.raw"), "raw")),
        ("directory", {"path": "/"}, host_info.directory(str(tmp_path), ["a"])),
        ("directory", {"path": "/"}, host_info.directory(str(tmp_path), tried=False)),
        ("directory", {"path": "/"}, host_info.directory(str(tmp_path / "missing"))),
        ("resources", {"addresses": []}, things.resources(["127.0.0.1", "a.name"])),
    ]
    for name, given, answer in said:
        caller = Answering(json.loads(json.dumps(answer)))
        asyncio.run(getattr(AgentClient(caller), name)(**given))


MALFORMED: list[tuple[str, dict[str, Any], Any]] = [
    ("host", {}, {"hostname": "a"}),
    ("host", {}, {**HOST, "identity": {"boot": "x"}}),
    ("host", {}, {**HOST, "time": float("nan")}),
    ("disk", {"path": "/d", "image_format": "raw"}, {"error": None}),
    ("disk", {"path": "/d", "image_format": "raw"}, {**RAW, "layers": [["/b"]]}),
    ("disk", {"path": "/d", "image_format": "raw"}, {**RAW, "data_file": 1}),
    ("disk", {"path": "/d", "image_format": "qcow2"}, {**QCOW2, "image": [1]}),
    ("disk", {"path": "/d", "image_format": "qcow2"}, {**QCOW2, "image": {"snapshots": [{}]}}),
    ("disk", {"path": "/d", "image_format": "qcow2"}, {**RAW, "image": {"format-specific": {"data": {"x": 1}}}}),
    ("directory", {"path": "/d"}, {**DIRECTORY, "abilities": {"naming": "link"}}),
    ("directory", {"path": "/d"}, {**DIRECTORY, "free": -1}),
    ("directory", {"path": "/d"}, {**DIRECTORY, "names": [1]}),
    ("resources", {"addresses": []}, {**RESOURCES, "hugepages": {"2048": [8]}}),
    ("resources", {"addresses": []}, {**RESOURCES, "hugepages": {"big": [8, 4]}}),
    ("staged", {"directories": []}, [{**JOURNALLED, "disks": {"vda": {"part": "/d/p"}}}]),
    ("staged", {"directories": []}, [{**JOURNALLED, "source": "a"}]),
    ("staged", {"directories": []}, [{"error": "torn"}]),
    ("free", {"path": "/"}, True),
    ("free", {"path": "/"}, -1),
    ("fingerprints", {"paths": ["/a", "/b"]}, ["1"]),
    ("probe", {"ssh": [], "known_hosts": ""}, {"error": "", "rate": "fast"}),
    ("remove", {"files": [{"path": "/a", "identity": "1:2"}]}, [{"path": "/a", "result": "error"}]),
    ("ranges_of", {"path": "/d", "image_format": "raw", "data": True}, [[1, 2, 3]]),
    ("overlays", {}, [{"path": "/d", "base": None, "base_format": "raw"}]),
    ("seal", {}, {"vda": 1}),
    ("undo", {}, None),
]


@pytest.mark.parametrize(("name", "given", "answer"), MALFORMED)
def test_malformed(name: str, given: dict[str, Any], answer: Any) -> None:
    with pytest.raises(AgentCallError, match="malformed"):
        asyncio.run(getattr(AgentClient(Answering(answer)), name)(**given))


def test_nobody_else_calls_the_agent_by_a_string() -> None:
    root = Path(kvm_clone.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] != "agent" and path.name != "agent_client.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "call"
    ]
    assert found == []
