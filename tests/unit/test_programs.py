"""scripts/programs.list names every program that the project asks for, and scripts/install goes by it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from python_use import Project, Use
from shell_use import HOLE, Slot, Unknown, shell_text

REPOSITORY = Path(__file__).resolve().parents[2]
LIST = REPOSITORY / "scripts/programs.list"
INSTALLED = ("runtime", "lab", "dev", "test", "bench", "fresh")
BEFORE = frozenset({"given", "debian"})

# What is installed, beside what is there before, where a file's programs are asked for. The first that fits counts.
GROUPS = {
    "scripts/install": frozenset[str](),
    "scripts/fresh": frozenset({"fresh"}),
    "scripts/check": frozenset({"runtime", "dev"}),
    "scripts/demo": frozenset({"runtime", "lab", "dev"}),
    "scripts/test": frozenset({"runtime", "lab", "dev", "test"}),
    ".ci/run": frozenset({"fresh"}),
    "Makefile": frozenset[str](),
    "bench/": frozenset({"runtime", "lab", "dev", "bench"}),
    "lab/": frozenset({"lab"}),
    "src/": frozenset({"runtime", "lab"}),
    "tests/": frozenset({"runtime", "lab", "dev", "test"}),
}

# Commands whose program no one can read from the source: what they run, and that it is listed, was looked at.
FOLLOWED: dict[tuple[str, str], tuple[str, ...]] = {
    ("bench/delta.py", "…"): (),  # kvm-clone itself
    ("lab/kclab/cli.py", "…"): (),  # what the user of `lab/lab exec` asks for
    ("scripts/demo", "…"): (),  # kvm-clone itself
    ("scripts/fresh", '… -euc …; clean_path=…; enter "$@" fresh'): ("bash",),  # bash, by its own path
    ("scripts/fresh", '… bash -euc …; try "$@"'): ("bash",),  # after the environment's variables
    ("scripts/fresh", "…"): ("bash", "debootstrap"),  # what it runs in namespaces of its own
    ("scripts/install", "…"): (),  # apt-config's output
    ("scripts/install", "… -c import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))"): ("python3",),
    ("scripts/install", "… -m venv --clear"): ("python3",),
    ("tests/agent/test_limits.py", "…"): (),  # the shell's own words, which set limits
    ("tests/agent/test_limits.py", "… -I -X utf8"): ("python3",),
    ("tests/agent/test_limits.py", "………………"): (),
    ("tests/agent/test_limits.py", "… … …"): (),
    ("tests/agent/test_limits.py", "… … … …"): (),
    ("tests/agent/test_process.py", "…"): ("setpriv", "sh", "sleep", "true"),  # what a PATH of its own has
    ("tests/unit/test_children.py", "…"): ("sh",),  # a shell's script, behind one that ignores Ctrl-C
    ("tests/e2e/pools.py", "… /var/lib/libvirt/images/own"): ("mount",),  # with the callers' options
    ("tests/e2e/test_preflight.py", "… /var/lib/libvirt/images/own"): ("mount",),  # with the callers' options
    ("tests/e2e/test_retry.py", "… clone … --retries"): (),  # kvm-clone itself
    ("tests/e2e/test_uses.py", "…"): ("mount", "virsh", "qemu-img"),  # what a table makes, and undoes
}


class Line(NamedTuple):
    """One line of the list."""

    group: str
    package: str
    programs: tuple[str, ...]


def lines() -> list[Line]:
    split = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    return [Line(group, package, tuple(programs)) for group, package, *programs in split]


def test_the_list_is_well_formed() -> None:
    found = lines()
    assert {line.group for line in found} == {*INSTALLED, *BEFORE}
    named = [(line.group, program) for line in found for program in line.programs]
    assert len(named) == len(set(named)), "a group names a program once"
    assert all(re.fullmatch(r"-|[a-z0-9][a-z0-9.+-]+", line.package) for line in found)


def python_uses() -> Iterator[Use]:
    files = [
        file
        for place in ("tests", "lab", "bench", "scripts", "src")
        for file in sorted((REPOSITORY / place).rglob("*.py"))
    ]
    for place, use in Project((str(file.relative_to(REPOSITORY)), file.read_text()) for file in files).uses():
        # What the product runs on hosts depends on how they are reached; there, what can be read is enough.
        if not (isinstance(use, Unknown) and place.startswith("src/")):
            yield place, use


def shell_uses() -> Iterator[Use]:
    files = [file for file in (REPOSITORY / "scripts").iterdir() if file.is_file()]
    scripts = [file for file in files if file.read_text().startswith("#!/bin/bash")]
    for file in (*scripts, REPOSITORY / ".ci/run"):
        yield from asked_in(str(file.relative_to(REPOSITORY)), file.read_text())
    recipes = re.findall(r"^\t@?(.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    variables = re.compile(r"\$\(\w+\)")
    yield from asked_in("Makefile", variables.sub(HOLE, "\n".join(recipes)).replace("$$", "$"))


def asked_in(place: str, text: str) -> Iterator[Use]:
    return ((place, one) for one in shell_text(text) if not isinstance(one, Slot))


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return [*python_uses(), *shell_uses()]


def groups_of(place: str) -> frozenset[str]:
    return BEFORE | next(groups for start, groups in GROUPS.items() if place.startswith(start))


def test_every_program_that_is_used_is_listed_where_it_is_needed(uses: list[Use]) -> None:
    listed = {group: {program for line in lines() if line.group == group for program in line.programs} for group in
              (*INSTALLED, *BEFORE)}  # fmt: skip
    missing: dict[str, list[str]] = {}
    for place, use in uses:
        programs = FOLLOWED.get((place.partition(":")[0], use.text), ()) if isinstance(use, Unknown) else (use,)
        for program in programs:
            # A test may want a program that no machine has.
            if "no-such" not in program and not any(program in listed[group] for group in groups_of(place)):
                missing.setdefault(program, []).append(place)
    assert not missing, "name these in scripts/programs.list, in a group that the place's command installs"


def test_every_command_can_be_followed_to_its_program(uses: list[Use]) -> None:
    unknown = [(place, use.text) for place, use in uses if isinstance(use, Unknown)]
    lost = [(place, text) for place, text in unknown if (place.partition(":")[0], text) not in FOLLOWED]
    assert not lost, "write the program's name where it is run, or say in FOLLOWED what is run there"


# Of shell texts.

SHELL = {
    "one": ("jq . file", {"jq"}),
    "several": ("a; b && c || d | e & f\ng", set("abcdefg")),
    "with a path": ("/usr/bin/jq; /sbin/tc; ./own; lab/lab up; /opt/own", {"jq", "tc"}),
    "builtins": ("cd /; echo jq; export A=b; [ -e jq ] || exit", set()),
    "assignments": ("A=1 jq; B=$(awk 1); C+=2; d[1]=3 sed", {"jq", "awk", "sed"}),
    "arrays": ("a=(jq b $(awk 1)) sed", {"awk", "sed"}),
    "keywords": ("if a; then b; elif c; then d; else e; fi", set("abcde")),
    "loops": ("while ! a; do b; done; for x in jq $(c); do d; done; until e; do f; done", set("abcdef")),
    "case": ("case $x in jq|'a)') b ;; *) c;; esac; d", set("bcd")),
    "case in a substitution": ("x=$(case y in (a) b ;; esac) ; c", set("bc")),
    "groups": ("(a; b); { c; }; f() { d; }; f; ! e", set("abcde")),
    "functions": ("own() { jq; }; function other { own; }; other", {"jq"}),
    "tests": ("[[ jq == $(a) && -n x ]] && b; (( jq < 1 )) && c", set("abc")),
    "redirections": ("a >jq 2>&1 <b; <c d; e <<<jq; f &>g; h > >(i)", set("adefhi")),
    "quotes": ("a \"$(b 'c' \"$(d)\")\" 'e; f' \"g; h\"; i", set("abdi")),
    "backticks": ("a `b c`", set("ab")),
    "parameters": ("a ${x:-$(b)} ${#x} $((1 + 2)) $1 $?; c", set("abc")),
    "comments": ("a # b; c\nd#e f", {"a", "d#e"}),
    "continued lines": ("a \\\n b; c", set("ac")),
    "here-documents": ("a <<END; b\nc $(d)\nEND\ne <<'END'\nf $(g)\nEND\nh", set("abdeh")),
    "shells": ("sh -c 'a; b'; bash -euc 'c'; zsh -f -c d", {*"abcd", "sh", "bash", "zsh"}),
    "what runs others": ("timeout -k 5 9 a; env -u X Y=1 b; nice -n 9 c; exec d; xargs -n 1 e; nohup f; sudo g",
                         {*"abcdefg", "timeout", "env", "nice", "xargs", "nohup", "sudo"}),
    "asked whether it is there": ("command -v a; command b", set("ab")),
    "in namespaces": ("nsenter --target 1 -- a; ip netns exec x b; unshare --propagation private c; chroot . d",
                      {*"abcd", "nsenter", "ip", "unshare", "chroot"}),
    "by find": ("find . -name x -exec a {} +", {"find", "a"}),
    "by traps and eval": ("trap 'a; b' EXIT; trap c; eval 'd; e'", set("abde")),
    "on a host": ("lab/lab exec kc-b -- a; ssh -p 22 kc-b 'b; c'; ssh -F x -- kc-b d", {*"abcd", "ssh"}),
    "of one's own shell": ("kill 1; true", set()),
    "programs that a shell has, run by others": ("timeout 1 kill 1", {"timeout", "kill"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHELL)
def test_a_shell_text_asks_for(case: str) -> None:
    text, programs = SHELL[case]
    assert set(shell_text(text)) == programs


@pytest.mark.parametrize("text", ["$x a", '"${x[@]}"', "a; $(b) c", f"{HOLE} a", "eval $x", "ssh h $x", "timeout 5 $x"])
def test_a_shell_text_asks_for_something_unknown(text: str) -> None:
    assert [one for one in shell_text(text) if isinstance(one, Unknown)]


# Of Python. Each is a module's text; what is said of `lab` holds as in tests/e2e/labclient.py.

HEAD = """
import asyncio, functools, os, shlex, shutil, subprocess, sys
from pathlib import Path
class Lab:
    def run(self, host, *argv, check=True):
        return finished(entered(host, *argv))
    def ssh(self, host, command):
        return subprocess.run(["ssh", "-F", str(self.config), host, command])
def entered(host, *argv):
    return ["nsenter", "--target", str(pid(host)), "--", *argv]
def finished(argv):
    return subprocess.run(argv)
def need(*programs):
    for program in programs:
        if shutil.which(program) is None:
            raise KeyError(program)
def sh(lab: Lab, text):
    lab.run("kc-a", "sh", "-c", text)
"""
PYTHON = {
    "a list": "subprocess.run(['jq', x])",
    "a keyword": "subprocess.Popen(args=['jq', x])",
    "a name": "argv = ['jq', x]\nsubprocess.check_output(argv)",
    "a name in a function": "def f():\n    argv = ['jq']\n    argv += [x]\n    subprocess.run(argv)",
    "a sum": "subprocess.run(['jq'] + rest)",
    "spliced in": "JQ = ('jq', '-r')\nsubprocess.run([*JQ, x])",
    "one of two": "subprocess.run(['jq' if x else 'awk'])\nsubprocess.run(['jq'] if x else ['awk'])",
    "a constant": "NAME = 'jq'\nsubprocess.run([NAME])",
    "a dictionary's": "WAYS = {'a': ['jq', x], 'b': ['awk']}\nsubprocess.run(WAYS[x])",
    "unpacked": "program, *rest = 'jq -r'.split()\nsubprocess.run([program, *rest])",
    "in a loop that counts": "for n, name in enumerate(('jq', 'awk')):\n    os.system(f'{name} {n}')",
    "a part of a sequence": "ALL = 'exec jq -r'.split()[1:]\nsubprocess.run(ALL)",
    "a test's parameter in a text": (
        "@pytest.mark.parametrize('n', ['jq', 'awk'])\ndef test_x(lab: Lab, n):\n    sh(lab, f'cd / && {n} x')"
    ),
    "a field of a case": (
        "class Case:\n    make: str\n    more: str = 'awk'\nCASES = {'a': Case('jq .')}\n"
        "def test_x(lab: Lab, a):\n    case = CASES[a]\n    sh(lab, f'cd /; {case.make}; {case.more}')"
    ),
    "joined": "def f(lab: Lab, *argv):\n    lab.ssh('a', ' '.join(argv))\nf(lab, 'exec', 'jq', x)",
    "joined words": "os.system(' '.join(['jq', x]))",
    "given to a function that returns it": "def f(a):\n    return [*a, '-r']\nsubprocess.run(f(['jq']))",
    "a default": "def f(a='jq'):\n    return f'exec {shlex.quote(a)} -r'\nos.system(f())",
    "split": "subprocess.run('jq -r'.split())",
    "in a loop": "for name in ('jq', 'awk'):\n    subprocess.run([name])",
    "in a loop over rows": "for argv, other in ((['jq'], 1), (['awk'], 2)):\n    subprocess.run(argv)",
    "imported": "from subprocess import run as go\ngo(['jq'])",
    "by asyncio": "async def f():\n    await asyncio.create_subprocess_exec('jq', x)",
    "by asyncio's shell": "async def f():\n    await asyncio.create_subprocess_shell('jq .; awk')",
    "in place of this process": "os.execvp('jq', ['jq'])\nos.execlp('jq', 'jq', x)",
    "by os.system": "os.system('jq .')",
    "asked for": "need('sh', 'jq')",
    "found": "subprocess.run([shutil.which('jq'), x])",
    "on a host": "def test_x(lab: Lab):\n    lab.run('kc-a', 'jq', x)",
    "on a host, of a lab that is not said to be one": "f = lambda lab: lab.run('kc-a', 'jq', x)",
    "in a shell on a host": "def test_x(lab: Lab):\n    lab.run('kc-a', 'sh', '-c', f'cd {x} && jq {x}')",
    "through a function": "def test_x(lab: Lab):\n    sh(lab, 'ls | jq .')",
    "through two functions": "def own(lab: Lab, text):\n    sh(lab, text)\nown(lab, text='jq')",
    "through an inner function": "def f(argv):\n    def g():\n        subprocess.run(argv)\n    g()\nf(['jq'])",
    "through a method": "class C:\n    def go(self, *a):\n        finished(a)\n    def f(self):\n        self.go('jq')",
    "partly": "functools.partial(finished, ['jq'])",
    "over ssh": "def test_x(lab: Lab):\n    lab.ssh('kc-a', 'jq . file')",
    "behind options": "subprocess.run(['timeout', '-k', '5', '9', 'jq'])",
    "quoted": "subprocess.run(['sh', '-c', shlex.quote('jq')])",
    "of a test's parameter": "@pytest.mark.parametrize('n', ['jq', 'awk'])\ndef test_x(n):\n    subprocess.run([n])",
    "of one parameter of several": "@pytest.mark.parametrize('a, n', [(1, 'jq')])\ndef test_x(a, n):\n    need(n)",
}


def uses_of(text: str) -> set[str | Unknown]:
    return {use for _, use in Project([("tests/e2e/test_x.py", f"{HEAD}\n{text}\n")]).uses()}


@pytest.mark.parametrize("case", PYTHON)
def test_a_module_asks_for(case: str) -> None:
    found = uses_of(PYTHON[case])
    assert "jq" in found
    assert ("awk" in PYTHON[case]) == ("awk" in found)
    assert not [use for use in found if isinstance(use, Unknown)]


UNKNOWN = {
    "a name that is nowhere": "subprocess.run(argv)",
    "an attribute": "subprocess.run(self.argv)",
    "the text of a file": "os.system(Path('x').read_text())",
    "a test's parameter from elsewhere": "def test_x(argv):\n    subprocess.run(argv)",
    "a hole on a host": "def test_x(lab: Lab):\n    lab.run('kc-a', f'{x}', 'y')",
    "a hole in a shell": "def test_x(lab: Lab):\n    sh(lab, f'cd /; {x} y')",
    "spliced arguments": "def test_x(lab: Lab):\n    lab.run('kc-a', *x)",
    "under another name": "go = subprocess.run\ngo(['jq'])",
    "handed on": "f(x, subprocess.run)",
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_module_asks_for_something_unknown(case: str) -> None:
    assert [use for use in uses_of(UNKNOWN[case]) if isinstance(use, Unknown)]


OWN = {
    "this Python": "subprocess.run([sys.executable, '-c', x])",
    "a path": "subprocess.run([str(ROOT / 'own')])\nsubprocess.run([f'{x}/own'])",
    "a path in a text": "def f(a):\n    return f'exec {a} -c {shlex.quote(\"jq; jq\")}'\nos.system(f(sys.executable))",
    "a method that is not a lab's": "Lab().go('jq')",
    "functions that run nothing": "print('jq'); run('jq')",
}


@pytest.mark.parametrize("case", OWN)
def test_a_module_asks_for_nothing(case: str) -> None:
    assert uses_of(OWN[case]) == uses_of("")


# The scripts.


def script(name: str, *arguments: str, path: object = os.environ["PATH"]) -> tuple[int, str]:
    argv = [str(REPOSITORY / "scripts" / name), *arguments]
    done = subprocess.run(argv, env={"PATH": str(path), "HOME": "/"}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory with little more than a shell; other programs are where scripts/install looks beyond PATH."""
    for program in ("bash", "dirname", "sort"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    return tmp_path


def test_a_check_names_what_is_missing(bare: Path) -> None:
    said = "scripts/install: not there: cc pkg-config python3 ssh\n"
    assert script("install", "--check", "runtime", path=bare) == (1, said)


def test_a_check_is_content(bare: Path) -> None:
    for line in lines():
        for program in line.programs if line.group == "bench" else ():
            (bare / program).touch(mode=0o755)
    assert script("install", "--check", "bench", path=bare) == (0, "")


def test_where_there_is_no_apt_the_programs_are_named(bare: Path) -> None:
    code, said = script("install", "bench", "lab", path=bare)
    assert code == 1
    named = said.removeprefix("scripts/install: this is no Debian or Ubuntu: install these commands yourself: ").split()
    # What a Debian need not have installed is asked for elsewhere; what only a Debian has is not.
    assert {"nbdcopy", "virsh", "qemu-ga", "git"} <= set(named)
    assert not {"bash", "sort", "apt-get", "nbdkit"} & set(named)


@pytest.mark.parametrize("group", ["given", "everything", "-"])
def test_a_group_that_is_none(group: str) -> None:
    said = f"scripts/install: no group '{group}': there are runtime lab dev test bench fresh\n"
    assert script("install", group) == (1, said)


def test_a_part_of_a_fresh_machine_that_is_none() -> None:
    said = "scripts/fresh: no part 'everything': there are programs, demo and test\n"
    assert script("fresh", "demo", "everything") == (1, said)


def test_a_fresh_machine_where_there_is_no_apt(bare: Path) -> None:
    said = "scripts/fresh: this is no Debian or Ubuntu: there is no apt to make a new one with\n"
    assert script("fresh", path=bare) == (1, said)
