"""Who may import whom, who may print, and how old a Python the agent runs on."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvm_clone

PACKAGE = Path(next(iter(kvm_clone.__path__)))
AGENT = PACKAGE / "agent"


def modules(below: Path = PACKAGE) -> Iterator[tuple[str, ast.Module]]:
    """Each module's dotted name and its syntax."""
    for file in sorted(below.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), ast.parse(file.read_text(), str(file))


def imported(name: str, tree: ast.AST, *, package: bool) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it, relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imports_of(below: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    for name, tree in modules(below):
        package = (PACKAGE.parent / Path(*name.split("."))).is_dir()
        yield from ((name, target) for target in imported(name, tree, package=package))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_agent_imports_itself_and_the_standard_library() -> None:
    found = list(imports_of(AGENT))
    assert ("kvm_clone.agent.transfer", "kvm_clone.agent.protocol.stream.Incoming") in found
    strangers = [
        (name, target)
        for name, target in found
        if not within(target, "kvm_clone.agent") and target.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not strangers


def test_nothing_imports_the_command_line() -> None:
    found = [(name, target) for name, target in imports_of() if within(target, "kvm_clone.cli")]
    assert [name for name, _ in found if within(name, "kvm_clone.cli")], "the rule sees what it is about"
    assert not [(name, target) for name, target in found if not within(name, "kvm_clone.cli")]


BASE = frozenset(
    {"errors", "findings", "image", "options", "progress", "socket_directory", "gather", "units", "version"}
)
"""Single modules that every floor may import."""

FLOORS: dict[str, frozenset[str]] = {
    "agent": frozenset(),
    "definition": BASE | {"agent"},
    "planning": BASE | {"agent", "definition"},
    "hosts": BASE | {"agent", "definition", "planning"},
    "transfer": BASE | {"agent", "definition", "hosts", "planning"},
    "execution": BASE | {"agent", "definition", "hosts", "planning", "transfer"},
    "upkeep": BASE | {"agent", "definition", "execution", "hosts", "planning"},
    "settings": BASE,
    "results": BASE | {"execution", "hosts", "upkeep"},
    "client": BASE | {"agent", "definition", "execution", "hosts", "planning", "results", "transfer", "upkeep"},
}
"""What each package may import, beside itself. Only kvm_clone.cli may import everything."""

PLAIN_FACTS = ("facts", "domain_facts", "file_names", "identity", "things")
"""What of planning a host's own package may know: the facts that it finds, and no plan."""


def floor(name: str) -> str:
    """The package, or the single module, of the project that the name lies in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "kvm_clone" else ""


@pytest.mark.parametrize("package", FLOORS)
def test_a_floor_imports_what_lies_below(package: str) -> None:
    found = [(name, target) for name, target in imports_of() if floor(name) == package and floor(target)]
    assert found or package in ("agent", "settings")
    allowed = FLOORS[package] | {package}
    assert [(name, target) for name, target in found if floor(target) not in allowed] == []


def test_libvirt_is_asked_in_one_place() -> None:
    """Whoever is above asks a LibvirtHost: no thread, no libvirt error and no connection of its own."""
    users = {name for name, target in imports_of() if within(target, "libvirt") or within(target, "libvirt_qemu")}
    assert "kvm_clone.hosts.libvirt_host" in users
    assert {floor(name) for name in users} == {"hosts"}
    blocking = {f"kvm_clone.hosts.{name}" for name in ("domains", "inventory", "host_things", "libvirt_errors", "cpu")}
    found = [
        (name, target)
        for name, target in imports_of()
        if floor(name) not in ("hosts", "cli", "results") and any(within(target, one) for one in blocking)
    ]
    assert found == []


def test_every_package_has_a_floor() -> None:
    packages = {file.name for file in PACKAGE.iterdir() if file.is_dir() and file.name != "__pycache__"}
    assert packages - {"cli"} == FLOORS.keys() - {"client", "results"}


KNOWN_OF_PLANNING: dict[str, frozenset[str]] = {
    "hosts": frozenset(PLAIN_FACTS),
    "transfer": frozenset({"assets", "storage"}),
}
"""What of planning these packages may know: hosts the facts, a transfer the assets that it moves; neither a plan."""


@pytest.mark.parametrize("package", KNOWN_OF_PLANNING)
def test_hosts_and_transfer_know_nothing_of_plans(package: str) -> None:
    found = {
        target.split(".")[2] for name, target in imports_of() if floor(name) == package and floor(target) == "planning"
    }
    assert found <= KNOWN_OF_PLANNING[package]


def test_steps_know_no_kind_of_asset() -> None:
    found = {target for name, target in imports_of() if name == "kvm_clone.planning.steps"}
    assert "kvm_clone.planning.assets.Asset" in found
    assert not {target for target in found if within(target, "kvm_clone.planning.placement")}


@pytest.mark.parametrize(
    ("package", "module"),
    [
        *(
            (package, module)
            for package in ("definition", "planning")
            for module in ("libvirt", "asyncio", "subprocess", "socket")
        ),
        ("transfer", "libvirt"),
        ("settings", "libvirt"),
    ],
)
def test_a_floor_does_without(package: str, module: str) -> None:
    assert [name for name, target in imports_of(PACKAGE / package) if within(target, module)] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = {name for name, _ in modules()}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, target in imports_of():
        graph[name] |= {one for one in (target, target.rpartition(".")[0]) if one in known and one != name}
    packages = {name for name in known if (PACKAGE.parent / Path(*name.split("."))).is_dir()}
    while free := {name for name, targets in graph.items() if not targets - packages}:
        graph = {name: targets - free for name, targets in graph.items() if name not in free}
    assert graph == {}


def test_plans_are_made_where_libvirt_is_not_installed() -> None:
    names = [name for name, _ in modules() if floor(name) in ("planning", "definition")]
    assert "kvm_clone.planning.sync" in names
    blocked = "import sys\nfor name in ('libvirt', 'libvirt_qemu', 'libvirtmod'):\n    sys.modules[name] = None\n"
    stub = f"import types\npackage = types.ModuleType('kvm_clone')\npackage.__path__ = [{str(PACKAGE)!r}]\n"
    made = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport cases\nprint(len(cases.Case().plan().steps))\n"
    imports = "".join(f"import {name}\n" for name in names)
    script = f"{blocked}{stub}sys.modules['kvm_clone'] = package\n{imports}{made}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 1


def prints_and_exits(tree: ast.AST) -> set[str]:
    """Which of print, exit, quit, sys.exit, SystemExit and the standard streams' write are used."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("print", "exit", "quit", "SystemExit"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in ("sys.exit", "sys.stdout.write", "sys.stderr.write"):
                found.add(text)
    return found


def test_only_the_command_line_prints_and_exits() -> None:
    users = {name: used for name, tree in modules() if (used := prints_and_exits(tree))}
    allowed = {"kvm_clone.agent.__main__": {"print", "sys.exit"}}
    others = {name: used for name, used in users.items() if not within(name, "kvm_clone.cli")}
    assert others == allowed


def test_the_agent_prints_to_stderr_alone() -> None:
    (tree,) = (tree for name, tree in modules(AGENT) if name == "kvm_clone.agent.__main__")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    assert calls
    for call in calls:
        assert [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"] == ["sys.stderr"]


def test_splice_is_used_where_it_may_be_missing() -> None:
    """os.splice came with Python 3.10: one module asks for it by name and does without."""
    found = []
    for name, tree in modules(AGENT):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value == "splice":
                found.append((name, "by name"))
            elif (isinstance(node, ast.Attribute) and node.attr == "splice") or (
                isinstance(node, ast.ImportFrom) and any(alias.name == "splice" for alias in node.names)
            ):
                found.append((name, "directly"))
    assert found == [("kvm_clone.agent.protocol.stream", "by name")]


def runs_on_the_oldest_python(path: Path) -> bool:
    vermin = Path(sys.executable).with_name("vermin")
    argv = [str(vermin), "--target=3.9-", "--violations", "--no-tips", "--no-config-file", str(path)]
    ended = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    assert "Minimum required versions" in ended.stdout
    return ended.returncode == 0


def test_the_agent_runs_on_python_3_9() -> None:
    assert runs_on_the_oldest_python(AGENT)


NEWER = {
    "a match statement": "match 1:\n    case 1:\n        pass\n",
    "os.splice": "import os\nos.splice(0, 1, 2)\n",
    "a strict zip": "zip([1], [2], strict=True)\n",
    "exception groups": "try:\n    pass\nexcept* ValueError:\n    pass\n",
    "dataclass slots": "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass A:\n    pass\n",
    "tomllib": "import tomllib\n",
}


@pytest.mark.parametrize("name", NEWER)
def test_newer_features_are_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / "newer.py").write_text(NEWER[name])
    assert not runs_on_the_oldest_python(tmp_path)
