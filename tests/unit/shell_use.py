"""Which programs a shell text and a command line ask for, as far as they tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

HOLE = "\0"
"""Stands in a word for what is only known when it runs."""


class Unknown(NamedTuple):
    """A command whose program cannot be read from the text."""

    text: str


class Slot(NamedTuple):
    """A parameter of a function in a command line."""

    name: str
    kind: str
    """What it is: `one` word, `all` words of a command, `each` a program, a `shell` text, a `line` of words of one."""
    owner: int = 0
    """Identifies the function."""


Word = str | Slot
# What a command line asks for: a program, or what a slot's function is given.
Asked = str | Unknown | Slot

_BUILTINS = """
. : [ alias bg break builtin cd command continue declare echo eval exec exit export false fg for getopts hash jobs kill
let local mapfile printf pwd read readonly return select set shift shopt source test times trap true type ulimit umask
unset wait
"""
BUILTINS = frozenset(_BUILTINS.split())
# The words of a shell's own after which a command begins, and after which none does.
OPENING = frozenset({"if", "then", "elif", "else", "while", "until", "do", "!", "{", "time"})
CLOSING = frozenset({"fi", "done", "}"})
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "tcsh", "csh", "fish", "ksh"})
# Programs that run another one: their options that take a value, and how many words stand before the command.
RUNNERS: dict[str, tuple[frozenset[str], int]] = {
    **{name: (frozenset(), 0) for name in ("builtin", "command", "nohup", "setsid")},
    **{name: (frozenset(), 1) for name in ("chroot", "taskset")},
    "env": (frozenset({"-u", "-C"}), 0),
    "exec": (frozenset({"-a"}), 0),
    "flock": (frozenset({"-w", "-E"}), 1),
    "ionice": (frozenset({"-c", "-n"}), 0),
    "nice": (frozenset({"-n"}), 0),
    "nsenter": (frozenset({"-t", "--target"}), 0),
    "runuser": (frozenset({"-u"}), 0),
    "setpriv": (frozenset({"--pdeathsig", "--reuid", "--regid"}), 0),
    "stdbuf": (frozenset({"-i", "-o", "-e"}), 0),
    "sudo": (frozenset({"-u"}), 0),
    "timeout": (frozenset({"-k", "-s", "--signal", "--kill-after"}), 1),
    "unshare": (frozenset({"--propagation"}), 0),
    "xargs": (frozenset({"-n", "-P", "-I", "-d", "-L"}), 0),
}
SSH_VALUES = frozenset(f"-{letter}" for letter in "BbcDEeFIiJLlmOopQRSWw")


def asked(words: Sequence[Word], *, shell: bool = False) -> Iterator[Asked]:
    """What a command line asks for: its program, and those that its program runs in turn; `shell`: a shell reads it."""
    if not words:
        return
    head = words[0]
    if isinstance(head, Slot):
        yield head
    elif not head or (head[0] in f"{HOLE}-" and "/" not in head):
        yield Unknown(_shown(words[:4]))
    else:
        name = program_name(head)
        if name is not None and not (shell and name in BUILTINS):
            yield name
        yield from _nested(name or head, words[1:], shell=shell)


def program_name(word: str) -> str | None:
    """The name of a program that the system has; None for one of the project's own by its path."""
    # No program's name has a space: the text is split elsewhere.
    word = word.split()[0]
    if "/" not in word:
        return word
    found = re.fullmatch(r"/(?:usr/(?:local/)?)?s?bin/([^/]+)", word)
    return found[1] if found else None


def shell_text(word: Word) -> Iterable[Asked]:
    """What a word asks for when a shell reads it; functions that it defines are its own."""
    if isinstance(word, Slot):
        return [word._replace(kind="line" if word.kind == "all" else "shell")]
    script = _Script(word)
    script.read("")
    return [one for one in script.found if not (isinstance(one, str) and one in script.functions)]


def _shown(words: Sequence[Word]) -> str:
    return " ".join(word.name if isinstance(word, Slot) else word.replace(HOLE, "…") for word in words)


def _nested(name: str, words: Sequence[Word], *, shell: bool) -> Iterable[Asked]:
    """What a program runs that is given these words."""
    if name in SHELLS:
        return _texts(_after(words, r"-\w*c"))
    if name in RUNNERS and not (name == "command" and words[:1] == ["-v"]):
        values, before = RUNNERS[name]
        return asked(_operands(words, values)[before:], shell=shell and name in BUILTINS)
    other = OTHERS.get(name.rpartition("/")[2])
    return other(words) if other else ()


def _texts(words: Sequence[Word]) -> Iterable[Asked]:
    return shell_text(words[0]) if words else ()


def _after(words: Sequence[Word], pattern: str) -> Sequence[Word]:
    """The words after the first one that matches."""
    places = (place for place, word in enumerate(words) if isinstance(word, str) and re.fullmatch(pattern, word))
    return words[next(places, len(words)) + 1 :]


def _of_ssh(words: Sequence[Word]) -> Iterable[Asked]:
    operands = _after(words, "--") if "--" in words else _operands(words, SSH_VALUES)
    # What follows an unknown word may be another option.
    return _texts([word for word in operands[1:2] if isinstance(word, Slot) or not word.startswith("-")])


OTHERS: dict[str, Callable[[Sequence[Word]], Iterable[Asked]]] = {
    "command": lambda words: asked(words[1:2], shell=True),
    "eval": _texts,
    "find": lambda words: asked(_after(words, "-exec|-execdir|-ok")),
    "ip": lambda words: asked(_after(words, "exec")[1:]),
    "lab": lambda words: asked(_after(words, "--")) if words[:1] == ["exec"] else (),
    "ssh": _of_ssh,
    "trap": lambda words: _texts(words[:1]) if len(words) > 1 else (),
}


def _operands(words: Sequence[Word], values: frozenset[str]) -> Sequence[Word]:
    """The words without the options before them, and without assignments."""
    number = 0
    while number < len(words):
        word = words[number]
        if word == "--":
            return words[number + 1 :]
        if isinstance(word, Slot) or not re.match(r"-|\w+=", word):
            break
        number += 2 if word in values else 1
    return words[number:]


class _Script:
    """A reader of shell text, exact enough to find where commands begin."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: list[Asked] = []
        self.functions: set[str] = set()
        self._documents: list[tuple[str, bool]] = []
        # Of each open `case`: whether a pattern comes next.
        self._cases: list[bool] = []

    def read(self, end: str) -> None:
        """Read commands up to `end`, which is `)`, a backtick, or nothing for the whole text."""
        words: list[Word] = []
        cases, self._cases = self._cases, []
        while self.at < len(self.text):
            if self._cases and self._cases[-1]:
                self._pattern()
            elif end and self._take(re.escape(end)):
                break
            elif self._take(r"[ \t]+|\\\n|#[^\n]*"):
                pass
            elif found := self._take(r"(?:\d*|\{\w+\}|&)(<<<|<<-?|<>|<&|>&|>>|>\||<(?!\()|>(?!\())[ \t]*"):
                self._redirected(found[1])
            elif found := self._take(r";;&?|&&|\|\||\|&|[;&|)\n]|\((?!\()"):
                self._finish(words)
                words = []
                self._separated(found[0])
            else:
                words = self._next(words)
        self._finish(words)
        self._cases = cases

    def word(self) -> str:
        """Read a word, with a hole for each part that is expanded."""
        parts = [""]
        while self.at < len(self.text):
            if found := self._take(r"[^\s;&|()<>'\"$`\\]+"):
                parts.append(found[0])
            elif self.text[self.at] in "'\"$`\\":
                parts.append(self._piece())
            elif parts[-1].endswith("=") and self._take(r"\("):
                self._array()
            elif parts == [""] and self._take(r"[<>]\("):
                self.read(")")
                parts.append(HOLE)
            else:
                break
        return "".join(parts)

    def _take(self, pattern: str) -> re.Match[str] | None:
        """Read what matches here."""
        found = re.compile(pattern).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def _next(self, words: list[Word]) -> list[Word]:
        """Take one more word; the words of the command that it belongs to."""
        if words:
            before = self.at
            word = self.word()
            self.at += self.at == before
            return [*words, word]
        if self._take(r"\(\("):
            self._until("))")
        elif self._take(r"\[\[(?=\s)"):
            self._until(" ]]")
        elif found := self._take(r"(?:function\s+)?([\w.-]+)[ \t]*\(\)|function\s+([\w.-]+)"):
            self.functions.add(found[1] or found[2])
        elif self._take(r"case\s+"):
            self.word()
            self._take(r"\s+in\b")
            self._cases.append(True)
        elif self._take(r"esac\b"):
            self._cases = self._cases[:-1]
        else:
            word = self.word()
            if word not in OPENING | CLOSING and not re.match(r"\w+(\[[^]]*\])?\+?=", word):
                return [word]
        return words

    def _finish(self, words: list[Word]) -> None:
        self.found += asked(words, shell=True)

    def _separated(self, separator: str) -> None:
        if separator.startswith(";;") and self._cases:
            self._cases[-1] = True
        elif separator == "\n":
            self._read_documents()

    def _pattern(self) -> None:
        """Read a pattern of `case` with its parenthesis, or the end of the `case`."""
        self._take(r"(\s|#[^\n]*)*")
        if self._take(r"esac\b"):
            self._cases.pop()
        else:
            self._until(")")
            self._cases[-1] = False

    def _until(self, end: str) -> None:
        """Read quoted and expanded parts, and all others, up to the text `end`."""
        while self.at < len(self.text) and not self._take(re.escape(end)):
            if self.text[self.at] in "'\"$`\\":
                self._piece()
            else:
                self.at += 1

    def _array(self) -> None:
        while self.at < len(self.text) and not self._take(r"\)"):
            if not self._take(r"(\s|#[^\n]*)+") and not self.word():
                self.at += 1

    def _piece(self) -> str:
        """Read a quoted or expanded part of a word."""
        if found := self._take(r"\\(.?)|'([^']*)'?"):
            return found[1] or found[2] or ""
        if self._take('"'):
            return self._quoted()
        if self._take("`"):
            self.read("`")
        elif self._take(r"\$\(\("):
            self._until("))")
        elif self._take(r"\$\("):
            self.read(")")
        elif self._take(r"\$\{"):
            self._until("}")
        elif not self._take(r"\$(\w+|[@*#?$!-])"):
            self.at += 1
            return "$"
        return HOLE

    def _quoted(self) -> str:
        parts = []
        while self.at < len(self.text) and not self._take('"'):
            plain = self._take(r"[^\"$`\\]+")
            parts.append(plain[0] if plain else self._piece())
        return "".join(parts)

    def _redirected(self, operator: str) -> None:
        quoted = self.text[self.at : self.at + 1] in ("'", '"', "\\")
        word = self.word()
        if operator in ("<<", "<<-"):
            self._documents.append((word, quoted))

    def _read_documents(self) -> None:
        """Read the here-documents that begin on this line."""
        documents, self._documents = self._documents, []
        for word, quoted in documents:
            found = self._take(rf"(?sm)(.*?)^\t*{re.escape(word)}$\n?")
            if found and not quoted:
                inner = _Script(found[1])
                inner._until("\0")
                self.found += inner.found
