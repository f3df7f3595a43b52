"""The agent as it travels: a zip file of the package, the loader that takes it from its input, and its identity.

What goes into the agent's input: the loader, 8 hexadecimal digits of the zip's length in bytes, its SHA-256 as 64
hexadecimal digits, and the zip. What follows are the agent's frames.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import shlex
import zipfile
from pathlib import Path

import kvm_clone.agent
from kvm_clone.version import __version__

_AGENT = Path(kvm_clone.agent.__file__).parent

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The zip format's first date: the same files make the same bytes, so that the hash names a version."""

_SILENCE_SECONDS = 30
"""How long nothing may come before an agent is there: a host that lost its power closes no connection, and the login of
another one would wait for the rest of the agent for hours."""

_LOADER = """
import sys
def fail(kind, error, trace):
    sys.stderr.write("kvm-clone: the agent cannot run here: %s: %s\\n" % (kind.__name__, error))
sys.excepthook = fail
import hashlib, os, signal
if sys.version_info < (3, 9):
    sys.exit("kvm-clone: this host has Python %d.%d, the agent needs 3.9 or newer" % sys.version_info[:2])
def take(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit("kvm-clone: the agent did not arrive whole")
        signal.alarm(SECONDS)
        data += part
    return data
head = take(72)
try:
    body = take(int(head[:8], 16))
except ValueError:
    sys.exit("kvm-clone: the agent arrived damaged")
if hashlib.sha256(body).hexdigest().encode() != head[8:]:
    sys.exit("kvm-clone: the agent arrived damaged")
fd = os.memfd_create("kvm-clone-agent")
view = memoryview(body)
while view:
    view = view[os.write(fd, view):]
path = "/proc/self/fd/%d" % fd
sys.path.insert(0, path)
from kvm_clone.agent.__main__ import main
signal.alarm(0)
main(path, VERSION + " " + head[8:24].decode())
"""


NAME = "kvm-clone-agent"
"""The last word of an agent's command line, for people who look at their processes."""


def loader() -> str:
    """The Python program that takes the agent from its input and runs it."""
    text = _LOADER.strip().replace("VERSION", repr(__version__), 1)
    return text.replace("SECONDS", str(_SILENCE_SECONDS), 1) + "\n"


def remote_command(python: str = "python3") -> str:
    """What a remote shell is asked to run. exec, so that no shell stands between us and the agent's end.

    The loader comes by its input, a byte at a time, lest more than it is read. What the shell gets has single quotes
    around letters, digits, parentheses and double quotes: sh, zsh, csh and fish all take that for one plain word.
    Whatever the login's locale, Python's text is UTF-8.
    """
    read = f'b"".join(os.read(0,1)for _ in range({len(loader())}))'
    code = f"import os,signal;signal.alarm({_SILENCE_SECONDS});exec({read})"
    return f"exec {shlex.quote(python)} -I -X utf8 -c '{code}' {NAME}"


@functools.cache
def package() -> bytes:
    """The zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        # The controller's own __init__ stays at home: it imports what hosts do not have.
        archive.writestr(_entry("kvm_clone/__init__.py"), "")
        for file in sorted(_AGENT.rglob("*.py")):
            name, source = f"kvm_clone/agent/{file.relative_to(_AGENT)}", file.read_bytes()
            archive.writestr(_entry(name), source)
            bytecode = compiled(file, source)
            if bytecode is not None:
                archive.writestr(_entry(f"{name}c"), bytecode)
    return buffer.getvalue()


def compiled(path: Path, source: bytes) -> bytes | None:
    """The module's bytecode as this Python has cached it, None where it has not.

    A .pyc file is (PEP 552) a magic number, 4 bytes of flags, 8 bytes by which its source is known, and the code. A
    host with our version of Python takes it, and is spared a fifth of a second of compiling; others take the source.
    There is no file beside it there to be compared with, so it says that it is not to be checked.
    """
    try:
        cached = Path(importlib.util.cache_from_source(str(path))).read_bytes()
        about = path.stat()
    except (OSError, NotImplementedError):
        return None
    known = bytes(4) + int(about.st_mtime).to_bytes(4, "little") + (about.st_size).to_bytes(4, "little")
    if cached[:16] != importlib.util.MAGIC_NUMBER + known:
        return None
    unchecked = (1).to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + unchecked + importlib.util.source_hash(source) + cached[16:]


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def preamble() -> str:
    """What goes before the zip into the agent's input."""
    return f"{loader()}{len(package()):08x}{hashlib.sha256(package()).hexdigest()}"


def identity() -> str:
    """What the agent says of itself behind the marker."""
    return f"{__version__} {hashlib.sha256(package()).hexdigest()[:16]}"
