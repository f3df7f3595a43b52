"""No second door: what changes a host goes through a fenced connection, or through the agent that holds the lock."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import kvm_clone

PACKAGE = Path(next(iter(kvm_clone.__path__)))

CHANGING = (
    *("abort", "attach", "backupBegin", "blockCommit", "blockCopy", "blockPull", "blockRebase", "blockResize", "build"),
    *("checkpointCreate", "create", "define", "delete", "destroy", "detach", "fsFreeze", "fsThaw", "injectNMI"),
    *("managedSaveRemove", "migrate", "qemuAgentCommand", "qemuMonitorCommand", "reboot", "refresh", "rename", "reset"),
    *("restore", "resume", "revert", "save", "send", "setAutostart", "setMetadata", "shutdown", "snapshotCreate"),
    *("suspend", "undefine", "update", "upload", "wipe"),
)
"""How the names of libvirt's methods begin that change something."""

ELSEWHERE = {
    "kvm_clone/hosts/verdict.py": {"defineXML", "undefine"},
    "kvm_clone/hosts/live.py": {"abortJob", "backupBegin", "delete", "fsFreeze", "fsThaw", "qemuAgentCommand"},
}
"""A definition that is only judged, under a name that no libvirt takes. And the backup job, the freeze and the
checkpoints of a running source, which its agent guards by a lock of its own."""


def _methods() -> set[str]:
    kinds = (
        libvirt.virConnect,
        libvirt.virDomain,
        libvirt.virDomainCheckpoint,
        libvirt.virDomainSnapshot,
        libvirt.virNetwork,
        libvirt.virStoragePool,
        libvirt.virStorageVol,
    )
    return {name for kind in kinds for name in dir(kind) if any(name.startswith(word) for word in CHANGING)}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.is_relative_to(PACKAGE / "agent"):
            continue
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield str(file.relative_to(PACKAGE.parent)), node


def _calls(function: ast.AST) -> set[str]:
    called = {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    return called & _methods()


def _talks_to_libvirt(path: str) -> bool:
    return "import libvirt" in (PACKAGE.parent / path).read_text()


def _is_fenced(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = next(iter(function.args.args), None)
    return first is not None and first.annotation is not None and ast.unparse(first.annotation) == "Fenced"


def test_the_rule_sees_what_it_is_about() -> None:
    found = {call for path, function in functions() if _talks_to_libvirt(path) for call in _calls(function)}
    assert {"defineXML", "destroy", "undefineFlags", "setMetadata", "managedSaveRemove", "delete", "refresh"} <= found
    assert {"backupBegin", "abortJob"} <= found


def test_libvirt_is_changed_through_a_fenced_connection_alone() -> None:
    doors = [
        (path, function.name, call)
        for path, function in functions()
        if _talks_to_libvirt(path) and not _is_fenced(function)
        for call in sorted(_calls(function) - ELSEWHERE.get(path, set()))
    ]
    assert doors == []


@pytest.mark.parametrize(
    ("call", "modules"),
    [
        ("remove", {"kvm_clone/hosts/vms.py"}),
        ("undo", {"kvm_clone/execution/rollback.py"}),
        ("remove_scratch", {"kvm_clone/execution/backup.py", "kvm_clone/upkeep/leftovers.py"}),
    ],
)
def test_files_are_removed_by_few(call: str, modules: set[str]) -> None:
    users = {
        path
        for path, function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == call
        and ast.unparse(node.func.value).endswith("agent")
    }
    assert users == modules
