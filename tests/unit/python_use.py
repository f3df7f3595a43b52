"""Which programs Python modules ask for: what reaches subprocess and its like, followed back to the words.

A function that hands a parameter of its own on as a command is followed to its callers. What cannot be followed is
reported as unknown.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product

from python_names import (
    FUNCTIONS,
    NOTHING,
    Function,
    Module,
    Names,
    Parameter,
    Scope,
    Target,
    items,
    parameters,
    results,
)
from shell_use import HOLE, Asked, Slot, Unknown, Word, asked, shell_text

Words = tuple[Word, ...]
Use = tuple[str, str | Unknown]
"""A place, as file:line, and what it runs."""

# How a command is handed over: `all` its words in one argument, `rest` for those from an argument on, `one` program's
# name, a `shell` text; with the number of the argument.
OUTSIDE = {
    **{f"subprocess.{name}": ("all", 0) for name in ("run", "Popen", "call", "check_call", "check_output")},
    **{f"os.{name}": ("all", 1) for name in ("execv", "execve", "execvp", "execvpe", "posix_spawn", "posix_spawnp")},
    **{f"os.{name}": ("rest", 1) for name in ("execl", "execlp", "execle", "execlpe")},
    **{f"os.{name}": ("shell", 0) for name in ("system", "popen")},
    "asyncio.create_subprocess_exec": ("rest", 0),
    "asyncio.create_subprocess_shell": ("shell", 0),
    "shutil.which": ("one", 0),
}
# What is also named where nothing is run, as in isinstance().
CLASSES = frozenset({"subprocess.Popen"})
OWN = f"./{HOLE}"
"""A path: the program is not looked for by its name."""
# Where following ends: this deep, and with this many ways for one command.
DEEP = 14
MANY = 48


def _same(words: Words) -> Words:
    return words


def _path(words: Words) -> Words:
    return words if isinstance(words[0], str) and words[0][:1] != HOLE else (OWN,)


def _split(words: Words) -> Words:
    return tuple(words[0].split()) if isinstance(words[0], str) else words


def _quoted(words: Words) -> Words:
    return (shlex.quote(words[0]),) if isinstance(words[0], str) else words


def _spaced(words: Words) -> Words:
    return words if len(words) == 1 else (" ".join(HOLE if isinstance(word, Slot) else word for word in words),)


# What functions and methods make of the words that they are given, where these can be followed.
COLLECTIONS = frozenset({"list", "tuple", "sorted", "reversed", "join"})
METHODS = frozenset(
    {"split", "replace", "strip", "lstrip", "rstrip", "format", "removeprefix", "removesuffix", "encode"}
)
SEQUENCES = {**dict.fromkeys(COLLECTIONS - {"join"}, _same), "split": _split, "shlex.split": _split}
TEXTS = {
    **dict.fromkeys(METHODS - {"split"}, _same),
    **dict.fromkeys(("shutil.which", "textwrap.dedent"), _same),
    **dict.fromkeys(("str", "pathlib.Path"), _path),
    "shlex.quote": _quoted,
    "join": _spaced,
}


class Project:
    """The modules, and what their functions are found to run."""

    def __init__(self, files: Iterable[tuple[str, str]]) -> None:
        self._modules = [Module(path, ast.parse(text)) for path, text in files]
        self._names = Names(self._modules)
        self._calls = [call for module in self._modules for call in _calls(module.tree, Scope(module))]
        # The parameters of each function that are commands, and how.
        self._runners: dict[Function | ast.Lambda, set[tuple[str, str]]] = {}

    def uses(self) -> list[Use]:
        """What each call runs."""
        while True:
            before = {function: set(slots) for function, slots in self._runners.items()}
            found = [use for call, scope in self._calls for use in self._of_call(call, scope)]
            if self._runners == before:
                return [*found, *self._references()]

    def _references(self) -> Iterator[Use]:
        """What runs a command, but is kept under another name or handed on instead of called."""
        for module in self._modules:
            for node in ast.walk(module.tree):
                given = [node.value] if isinstance(node, (ast.Assign, ast.keyword, ast.Return)) else []
                given += node.args[1:] if isinstance(node, ast.Call) else []
                for one in given:
                    if one is not None and self._names.dotted(one, Scope(module)) in OUTSIDE.keys() - CLASSES:
                        yield f"{module.path}:{one.lineno}", Unknown(ast.unparse(one))

    def _of_call(self, call: ast.Call, scope: Scope) -> Iterator[Use]:
        place = f"{scope.module.path}:{call.lineno}"
        for one in dict.fromkeys(self._asked_by(call, scope)):
            if isinstance(one, Slot):
                function = next(outer for outer in scope.functions if id(outer) == one.owner)
                self._runners.setdefault(function, set()).add((one.name, one.kind))
            else:
                yield place, one

    def _asked_by(self, call: ast.Call, scope: Scope) -> Iterator[Asked]:
        function, given = call.func, list(call.args)
        if given and self._names.dotted(function, scope) == "functools.partial":
            function, *given = given
        outside = self._names.dotted(function, scope)
        named = {word.arg: word.value for word in call.keywords if word.arg}
        if outside in OUTSIDE:
            kind, number = OUTSIDE[outside]
            rest = given[number:] or [one for name, one in named.items() if name in ("args", "argv", "cmd", "command")]
            if rest:
                many = kind == "rest"
                yield from self._take(ast.List(rest) if many else rest[0], "all" if many else kind, scope)
            return
        for target in self._names.targets(function, scope):
            for name, kind in sorted(self._runners.get(target.function, ())):
                arguments = _argument(target, name, given, named)
                found = [one for argument in arguments for one in self._take(argument, kind, scope)]
                yield from (one for one in found if target.certain or isinstance(one, str))

    def _take(self, given: ast.expr, kind: str, scope: Scope) -> Iterator[Asked]:
        """What an argument of this kind asks for."""
        for words in self._ways(given, scope, many=kind in ("all", "each", "line")):
            if kind in ("shell", "line"):
                yield from shell_text(_spaced(words)[0])
            elif kind == "each":
                for word in words:
                    if isinstance(word, Slot) and word.kind == "all":
                        yield word._replace(kind="each")
                    else:
                        yield from asked([word])
            else:
                yield from asked(words)

    def _ways(self, given: ast.expr, scope: Scope, deep: int = 0, *, many: bool) -> list[Words]:
        """The words that an expression may stand for: `many` words of a sequence, or a single one."""
        if deep == DEEP:
            return [(HOLE,)]
        found: Iterable[Words]
        if branches := _branches(given):
            found = [words for one in branches for words in self._ways(one, scope, deep + 1, many=many)]
        elif isinstance(given, (ast.Name, ast.Attribute, ast.Subscript)):
            found = self._named(given, scope, deep, many=many)
        elif isinstance(given, ast.Call):
            found = self._result(given, scope, deep, many=many)
        elif isinstance(given, ast.Starred):
            found = self._elements(given.value, scope, deep, many=many)
        else:
            found = (self._sequence if many else self._word)(given, scope, deep + 1)
        return list(dict.fromkeys(islice(found, MANY))) or [(HOLE,)]

    def _sequence(self, given: ast.expr, scope: Scope, deep: int) -> Iterable[Words]:
        """The words of a sequence that is written out."""
        match given:
            case ast.List() | ast.Tuple() | ast.Set():
                spliced = [isinstance(one, ast.Starred) for one in given.elts]
                parts = [one.value if isinstance(one, ast.Starred) else one for one in given.elts]
                each = zip(parts, spliced, strict=True)
                return _joined([self._ways(one, scope, deep, many=many) for one, many in each])
            case ast.BinOp(left, ast.Add(), right):
                return _joined([self._ways(one, scope, deep, many=True) for one in (left, right)])
        return []

    def _word(self, given: ast.expr, scope: Scope, deep: int) -> Iterable[Words]:
        """A single word that is written out."""
        match given:
            case ast.Constant(str(text)):
                return [(text,)]
            case ast.JoinedStr(parts):
                return map(_text, _joined([self._ways(one, scope, deep, many=False) for one in parts]))
            case ast.BinOp(left, ast.Add(), right):
                return map(_text, _joined([self._ways(one, scope, deep, many=False) for one in (left, right)]))
            case ast.BinOp(_, ast.Div(), last):
                return (_text((f"{OWN}/", *words)) for words in self._ways(last, scope, deep, many=False))
        return []

    def _named(self, given: ast.expr, scope: Scope, deep: int, *, many: bool) -> list[Words]:
        if self._names.dotted(given, scope) == "sys.executable":
            return [(OWN,)]
        meaning = self._names.meaning(given, scope)
        if isinstance(meaning, Parameter):
            return [(Slot(meaning.name, "all" if many else "one", id(meaning.function)),)]
        found = [words for one in meaning[0] for words in self._ways(one, meaning[1], deep + 1, many=many)]
        match given:
            case ast.Subscript(value, ast.Constant(int(at))) if not found and not many:
                return [words[at : at + 1] or (HOLE,) for words in self._ways(value, scope, deep + 1, many=True)]
            case ast.Subscript(value, ast.Slice(ast.Constant(int(at)), None)) if not found and many:
                return [words[at:] or (HOLE,) for words in self._ways(value, scope, deep + 1, many=True)]
        return found

    def _elements(self, given: ast.expr, scope: Scope, deep: int, *, many: bool) -> list[Words]:
        """What one element of a collection stands for."""
        meaning = self._names.meaning(given, scope)
        if isinstance(meaning, Parameter):
            return [(HOLE,)] if many else [(Slot(meaning.name, "each", id(meaning.function)),)]
        rows, where = ([given], scope) if items(given) else meaning
        each = [element for row in rows for element in items(row)]
        return [words for one in each for words in self._ways(one, where, deep + 1, many=many)]

    def _result(self, call: ast.Call, scope: Scope, deep: int, *, many: bool) -> Iterable[Words]:
        """What a call gives."""
        function = call.func
        plain = (
            function.id
            if isinstance(function, ast.Name)
            else function.attr
            if isinstance(function, ast.Attribute)
            else ""
        )
        changes = SEQUENCES if many else TEXTS
        change = changes.get(self._names.dotted(function, scope)) or changes.get(plain)
        if change:
            method = (
                isinstance(function, ast.Attribute) and plain in METHODS and not self._names.dotted(function, scope)
            )
            value = function.value if isinstance(function, ast.Attribute) and method else next(iter(call.args), NOTHING)
            return [change(words) for words in self._ways(value, scope, deep + 1, many=plain in COLLECTIONS)]
        targets = [one for one in self._names.targets(function, scope) if one.certain]
        return [words for one in targets for words in self._returned(one, call, scope, deep, many=many)]

    def _returned(self, target: Target, call: ast.Call, scope: Scope, deep: int, *, many: bool) -> Iterator[Words]:
        """What a function of the project returns when it is given these arguments."""
        named = {word.arg: word.value for word in call.keywords if word.arg}
        given = [
            (Parameter(one.arg, target.function), value, scope)
            for one in parameters(target.function)
            for value in _argument(target, one.arg, call.args, named) or _default(target.function, one.arg)
        ]
        inner = replace(target.scope, given=tuple(given))
        for value in results(target.function):
            yield from self._ways(value, inner, deep + 1, many=many)


def _calls(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.Call, Scope]]:
    """All calls below a node, and where they stand."""
    if isinstance(node, ast.ClassDef):
        scope = Scope(scope.module, scope.functions, node.name)
    elif isinstance(node, FUNCTIONS):
        scope = Scope(scope.module, (node, *scope.functions), scope.owner)
    elif isinstance(node, ast.Call):
        yield node, scope
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, scope)


def _branches(given: ast.expr) -> Sequence[ast.expr]:
    """The expressions that another one is, whichever it is."""
    match given:
        case ast.IfExp(_, first, second):
            return [first, second]
        case ast.BoolOp(_, values):
            return values
        case ast.Await(value) | ast.NamedExpr(_, value) | ast.FormattedValue(value):
            return [value]
    return []


def _joined(parts: Sequence[Sequence[Words]]) -> Iterator[Words]:
    for chosen in product(*parts):
        yield tuple(word for words in chosen for word in words)


def _text(words: Words) -> Words:
    return ("".join(HOLE if isinstance(word, Slot) else word for word in words),)


def _argument(target: Target, name: str, given: Sequence[ast.expr], named: Mapping[str, ast.expr]) -> list[ast.expr]:
    """What a call gives for a parameter, or nothing."""
    if name in named:
        return [named[name]]
    wanted = target.function.args
    positional = [one.arg for one in (*wanted.posonlyargs, *wanted.args)][int(target.bound) :]
    if wanted.vararg is not None and wanted.vararg.arg == name:
        return [ast.List(list(given[len(positional) :]))]
    if name not in positional:
        return []
    number = positional.index(name)
    spliced = any(isinstance(one, ast.Starred) for one in given[: number + 1])
    return [NOTHING] if spliced else list(given[number : number + 1])


def _default(function: Function, name: str) -> list[ast.expr]:
    positional = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    defaults = dict(zip(reversed(positional), reversed(function.args.defaults), strict=False))
    return [defaults.get(name, NOTHING)]
