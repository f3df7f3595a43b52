"""What names stand for in Python modules: values, functions and classes, as far as they are written down."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
Values = dict[str, list[ast.expr]]
NOTHING = ast.Constant(None)
"""Stands for a value that is not written down."""


@dataclass(eq=False)
class Module:
    """A module by the names that it has at its top; `imports` has dotted names."""

    path: str
    tree: ast.Module
    functions: dict[str, Function] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = f"{node.module}." if node.module else ""
                self.imports |= {alias.asname or alias.name: base + alias.name for alias in node.names}
        self.functions = {one.name: one for one in self.tree.body if isinstance(one, Function)}
        self.values = assigned(self.tree.body)


@dataclass(frozen=True)
class Parameter:
    """A name that is a parameter of this function."""

    name: str
    function: Function | ast.Lambda


@dataclass(frozen=True)
class Scope:
    """Where an expression stands: its module, class, and functions from the innermost on."""

    module: Module
    functions: tuple[Function | ast.Lambda, ...] = ()
    owner: str = ""
    given: tuple[tuple[Parameter, ast.expr, Scope], ...] = ()
    """What a caller gives for parameters, and where the caller stands."""


@dataclass(frozen=True)
class Target:
    """A function that a call may mean. `certain`: it is the only one; `bound`: its first parameter is given."""

    function: Function
    scope: Scope
    bound: bool = False
    certain: bool = True


def assigned(body: Iterable[ast.AST]) -> Values:
    """The values that each name gets in a body, functions in it left out; what `for` gives is starred."""
    found: Values = {}
    for node in within(body):
        for target, value in _bindings(node):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
    return found


def within(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes and all below them, functions left out."""
    for node in nodes:
        if not isinstance(node, FUNCTIONS):
            yield node
            yield from within(ast.iter_child_nodes(node))


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            parts = target.elts if isinstance(target, ast.Tuple) else []
            yield from ((one, ast.Subscript(node.value, ast.Constant(at))) for at, one in enumerate(parts))
            yield target, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        if isinstance(node.target, ast.Tuple):
            yield from ((one, ast.Starred(column(node.iter, at))) for at, one in enumerate(node.target.elts))
        else:
            yield node.target, ast.Starred(node.iter)
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, node.context_expr


def column(rows: ast.expr, number: int) -> ast.expr:
    """The items of that number of rows that are written out."""
    if isinstance(rows, ast.Call) and isinstance(rows.func, ast.Name):
        sources = {"enumerate": [NOTHING, *rows.args], "zip": rows.args}.get(rows.func.id, [])
        return sources[number] if number < len(sources) else NOTHING
    return ast.Tuple([row.elts[number] for row in items(rows) if isinstance(row, (ast.Tuple, ast.List))])


def items(value: ast.expr) -> Sequence[ast.expr]:
    """The elements of a collection that is written out, or the values of such a dictionary."""
    if isinstance(value, ast.Dict):
        return value.values
    return value.elts if isinstance(value, (ast.List, ast.Tuple, ast.Set)) else []


def parameters(function: Function | ast.Lambda) -> list[ast.arg]:
    """All parameters."""
    given = function.args
    several = [one for one in (given.vararg, given.kwarg) if one is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *several]


def results(function: Function) -> list[ast.expr]:
    """What a function may return."""
    return [node.value for node in within(function.body) if isinstance(node, ast.Return) and node.value is not None]


def parametrized(test: Function, name: str) -> Sequence[ast.expr]:
    """The values that pytest gives to a parameter of a test, as far as they are written there."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize" and len(mark.args) > 1:
            names = [one.strip() for one in str(getattr(mark.args[0], "value", "")).split(",")]
            if name in names:
                rows = column(mark.args[1], names.index(name)) if len(names) > 1 else mark.args[1]
                return items(rows) or [ast.Starred(rows)]
    return []


class Names:
    """The names of a project: of each module by its last name, and the methods of all classes."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self._modules: dict[str, list[Module]] = {}
        self._methods: dict[str, list[Target]] = {}
        self._local: dict[int, tuple[Values, dict[str, Function]]] = {}
        self._fields: dict[tuple[str, str], Mapping[str, ast.expr | None]] = {}
        self._found: dict[tuple[str, str], Module | None] = {}
        for module in modules:
            self._modules.setdefault(Path(module.path).stem, []).append(module)
            for owner in (node for node in module.tree.body if isinstance(node, ast.ClassDef)):
                self._fields[module.path, owner.name] = {
                    one.target.id: one.value
                    for one in owner.body
                    if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
                }
                for one in owner.body:
                    if isinstance(one, Function):
                        static = any(
                            isinstance(how, ast.Name) and how.id == "staticmethod" for how in one.decorator_list
                        )
                        target = Target(one, Scope(module, (one,), owner.name), bound=not static)
                        self._methods.setdefault(one.name, []).append(target)

    def dotted(self, given: ast.expr, scope: Scope) -> str:
        """The full name of what comes from an import, or nothing."""
        if isinstance(given, ast.Attribute):
            before = self.dotted(given.value, scope)
            return f"{before}.{given.attr}" if before else ""
        return scope.module.imports.get(given.id, "") if isinstance(given, ast.Name) else ""

    def meaning(self, given: ast.expr, scope: Scope) -> tuple[Sequence[ast.expr], Scope] | Parameter:
        """The values that a name may have and where they stand, or the parameter that it is."""
        if isinstance(given, ast.Subscript):
            found = self.meaning(given.value, scope)
            if isinstance(found, Parameter):
                return [], scope
            return [one for value in found[0] for one in items(value)], found[1]
        if isinstance(given, ast.Name):
            if (parameter := self._parameter(given.id, scope)) is not None:
                return self._given(parameter, scope)
            for number, function in enumerate(scope.functions):
                if values := self._locals(function)[0].get(given.id):
                    return values, replace(scope, functions=scope.functions[number:])
            if given.id in scope.module.values:
                return scope.module.values[given.id], Scope(scope.module)
        if isinstance(given, ast.Attribute) and not self.dotted(given, scope):
            made = self._made(given.value, scope)
            where = made[0][1] if made else scope
            return [one for call, _ in made for one in self._field(call, given.attr, where)], where
        module, name = self._imported(given, scope)
        return (module.values.get(name, []), Scope(module)) if module else ([], scope)

    def targets(self, function: ast.expr, scope: Scope) -> Iterator[Target]:
        """The functions of the project that may be called."""
        if isinstance(function, ast.Name) and (found := self._visible(function.id, scope)):
            yield Target(found, Scope(scope.module, (found,)))
            return
        module, name = self._imported(function, scope)
        if module and name in module.functions:
            yield Target(module.functions[name], Scope(module, (module.functions[name],)))
        elif isinstance(function, ast.Attribute) and not self.dotted(function, scope):
            owner = self._class_of(function.value, scope)
            for method in self._methods.get(function.attr, ()):
                if owner in ("", method.scope.owner):
                    yield replace(method, certain=bool(owner))

    def _made(self, value: ast.expr, scope: Scope, deep: int = 0) -> list[tuple[ast.Call, Scope]]:
        """The calls by which a value is made, as far as they are written down."""
        if isinstance(value, ast.Call):
            return [(value, scope)]
        found = self.meaning(value, scope) if deep < 4 and isinstance(value, (ast.Name, ast.Subscript)) else ([], scope)
        if isinstance(found, Parameter):
            return []
        return [made for one in found[0] for made in self._made(one, found[1], deep + 1)]

    def _field(self, call: ast.Call, name: str, scope: Scope) -> list[ast.expr]:
        """What a call gives for a field of the class that it makes."""
        module, owner = self._imported(call.func, scope)
        if isinstance(call.func, ast.Name) and module is None:
            module, owner = scope.module, call.func.id
        fields = self._fields.get((module.path, owner), {}) if module else {}
        named = {one.arg: one.value for one in call.keywords if one.arg}
        value = {**fields, **dict(zip(fields, call.args, strict=False)), **named}.get(name) if fields else None
        return [] if value is None else [value]

    def _parameter(self, name: str, scope: Scope) -> Parameter | None:
        """The parameter that a name is, unless it gets another value."""
        for function in scope.functions:
            if name in self._locals(function)[0]:
                return None
            if any(one.arg == name for one in parameters(function)):
                return Parameter(name, function)
        return None

    def _given(self, parameter: Parameter, scope: Scope) -> tuple[Sequence[ast.expr], Scope] | Parameter:
        for known, value, caller in scope.given:
            if known == parameter:
                return [value], caller
        if isinstance(parameter.function, ast.Lambda):
            return [], scope
        if parameter.function.name.startswith("test_"):
            return parametrized(parameter.function, parameter.name), Scope(scope.module)
        return parameter

    def _imported(self, given: ast.expr, scope: Scope) -> tuple[Module | None, str]:
        before, _, name = self.dotted(given, scope).rpartition(".")
        key = (scope.module.path, before)
        if key not in self._found:
            self._found[key] = self._module(before.split("."), scope.module)
        return self._found[key], name

    def _module(self, dotted: list[str], importer: Module) -> Module | None:
        """The module whose path is most like a dotted name, which may be relative; one beside the importer first."""

        def likeness(module: Module) -> tuple[int, bool]:
            path = Path(module.path).with_suffix("")
            same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(dotted), reversed(path.parts), strict=False))
            return len(list(same)), path.parent == Path(importer.path).parent

        found = [one for one in self._modules.get(dotted[-1], []) if one is not importer]
        return max(found, key=likeness, default=None)

    def _visible(self, name: str, scope: Scope) -> Function | None:
        for function in scope.functions:
            if name in self._locals(function)[1]:
                return self._locals(function)[1][name]
        return scope.module.functions.get(name)

    def _class_of(self, value: ast.expr, scope: Scope) -> str:
        """The name of the class of a value, as far as it is written down."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            return value.func.id if value.func.id[:1].isupper() else ""
        if not isinstance(value, ast.Name):
            return ""
        if value.id == "self":
            return scope.owner
        if parameter := self._parameter(value.id, scope):
            hint = next(one.annotation for one in parameters(parameter.function) if one.arg == value.id)
            return ast.unparse(hint).strip("'\"") if hint else ""
        found = self.meaning(value, scope)
        values = [] if isinstance(found, Parameter) else found[0]
        return next((self._class_of(one, scope) for one in values if isinstance(one, ast.Call)), "")

    def _locals(self, function: Function | ast.Lambda) -> tuple[Values, dict[str, Function]]:
        """The values and the functions that are made in a function."""
        if isinstance(function, ast.Lambda):
            return {}, {}
        if id(function) not in self._local:
            inner = {one.name: one for one in ast.walk(function) if isinstance(one, Function) and one is not function}
            self._local[id(function)] = (assigned(function.body), inner)
        return self._local[id(function)]
