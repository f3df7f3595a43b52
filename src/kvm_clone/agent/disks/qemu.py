"""qemu-img and qemu-nbd, as children of the agent: the one place that starts them.

Each is told what to open as a tree of nodes (`json:`), every layer with its path and format and what it rests on, so
that QEMU guesses no format and opens nothing that a header names but we do not.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from kvm_clone.agent.disks import device, header
from kvm_clone.agent.disks.chain import QCOW2, Node
from kvm_clone.agent.disks.disk import DATA, HOLE, ZERO, Extent
from kvm_clone.agent.disks.nbd import NbdDisk
from kvm_clone.agent.process import SECONDS, finished, last_words, run, start
from kvm_clone.agent.protocol.errors import IO, UNSUPPORTED, AgentError
from kvm_clone.agent.protocol.wire import ProtocolError

_ACTIVATED = ("sh", "-c", 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null', "sh")
"""Runs a command with the socket that is its stdin as descriptor 3, by the protocol of sd_listen_fds(3)."""

_EXIT_SECONDS = 120.0
"""How long qemu-nbd may take to close an image after the last client has said goodbye."""

_SLOWEST = 1 << 20
"""Bytes a second that qemu-img gets through at least, of what it has to read or write."""


def _node(chained: Sequence[Node], **options: Any) -> Dict[str, Any]:
    """The top layer as QEMU opens it, with all that it rests on. `options` are the driver's."""
    top, *below = chained
    _check_sole(top)
    below_format = {"driver": _protocol(top.path), "filename": top.path}
    node: Dict[str, Any] = {"driver": top.format, **options, "file": below_format}
    if top.format == QCOW2:
        node["backing"] = _node(below) if below else None
    return node


def _protocol(path: str) -> str:
    """The driver that opens the path: `file` refuses devices."""
    try:
        return "host_device" if device.is_device(os.stat(path)) else "file"
    except OSError:  # QEMU says what is wrong with it
        return "file"


def _check_sole(node: Node) -> None:
    """Raises AgentError (unsupported) for an image whose header has QEMU open another file than those of the tree."""
    there = node.format == QCOW2 and os.path.exists(node.path)
    if there and header.beginning(node.path).startswith(header.MAGIC) and header.read(node.path).data_file:
        raise AgentError(UNSUPPORTED, f"{node.path} keeps its content in another file")


def _name(node: Dict[str, Any]) -> str:
    return "json:" + json.dumps(node)


def _seconds(path: str) -> float:
    """How long qemu-img may take for all of the file."""
    return SECONDS + os.stat(path).st_blocks * 512 / _SLOWEST


def info(path: str, format_: str, *, live: bool = False) -> Dict[str, Any]:
    """What `qemu-img info` knows of the image alone.

    `live`: a VM may be writing it; metadata alone may be asked for then.
    """
    shared = ["--force-share"] if live else []
    answer: Dict[str, Any] = json.loads(
        run(["qemu-img", "info", *shared, "--output=json", _name(_node([Node(path, format_)]))])
    )
    return answer


def version(program: str) -> str:
    """What the program says of its version."""
    return run([program, "--version"])


def create(path: str, format_: str, size: int, options: Dict[str, str], below: Optional[Node] = None) -> None:
    """Make an empty image of `size` bytes at `path`; an existing file there is taken over.

    `below`: the image that it rests on, which is not opened.
    """
    argv = ["qemu-img", "create", "-q", "-f", format_]
    if options:
        argv += ["-o", ",".join(f"{key}={value}" for key, value in sorted(options.items()))]
    if below is not None:
        argv += ["-u", "-b", below.path, "-F", below.format]
    run([*argv, "--", path, str(size)])


def resize(path: str, format_: str, size: int) -> None:
    """Make the image `size` bytes large."""
    run(["qemu-img", "resize", "-q", _name(_node([Node(path, format_)])), str(size)])


def is_sound(path: str, format_: str) -> bool:
    """Whether the image can be opened and its metadata contradict nothing; clusters that nothing refers to are no harm.

    An image that another process has open is taken for sound.
    """
    status, said = _check(path, format_)
    return _LOCKED.search(said) is not None if status == _CHECK_FAILED else status != _CHECK_CORRUPT


def repair(path: str, format_: str) -> None:
    """Free the clusters that nothing refers to: a killed qemu-nbd leaves some."""
    _check(path, format_, "-r", "leaks")


def _check(path: str, format_: str, *options: str) -> Tuple[int, bytes]:
    try:
        argv = ["qemu-img", "check", "-q", *options, _name(_node([Node(path, format_)]))]
    except AgentError as error:  # QEMU is not let near it
        return _CHECK_CORRUPT, str(error).encode()
    child = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, said = finished(child, argv[0], _seconds(path))
    return child.returncode, said


_LOCKED = re.compile(rb'Failed to get (shared )?"[^"]*" lock')
"""What qemu-img says of an image that another process has open."""

_CHECK_FAILED, _CHECK_CORRUPT = 1, 2
"""Exit statuses of qemu-img check."""


def map_extents(chained: Sequence[Node], start_at: int, stop: int, *, shared: bool = False) -> Iterator[Extent]:
    """The extents of the top layer, read from `qemu-img map` as it prints them, so that memory stays flat.

    `shared`: also of an image that a VM is writing, as its tables are just now. Raises AgentError.

    A data extent without a host offset does not lie in the file as the guest sees it: it is compressed, since
    encrypted images and external data files are refused before.
    """
    argv = ["qemu-img", "map", *(["--force-share"] if shared else []), "--output=json", f"--start-offset={start_at}"]
    argv += [f"--max-length={stop - start_at}", _name(_node(chained))]
    child = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    try:
        for line in _lines(child):
            # One entry a line: "[{…},", "{…},", … "{…}]"
            entry = line.strip().lstrip(b"[").rstrip(b",]")
            if entry:
                yield _extent(json.loads(entry))
    finally:
        child.stdout.close()  # a reader that stops early ends qemu-img by SIGPIPE
        _, stderr = finished(child, argv[0], SECONDS)
    if child.returncode:
        raise AgentError(IO, last_words("qemu-img", child.returncode, stderr))


def _lines(child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What the child prints, by lines, however slowly they are taken. Raises AgentError when it prints nothing more."""
    assert child.stdout is not None
    descriptor, rest = child.stdout.fileno(), b""
    while True:
        if not select.select([descriptor], [], [], SECONDS)[0]:
            child.kill()
            raise AgentError(IO, f"qemu-img printed nothing for {SECONDS:.0f} s")
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        *lines, rest = (rest + part).split(b"\n")
        yield from lines  # a last one without its end is of a child that failed


def _extent(entry: Dict[str, Any]) -> Extent:
    host: Optional[int] = entry.get("offset")
    layer = entry.get("depth", 0)
    if entry["zero"]:
        # "present" tells an explicit zero from a hole; QEMU before 6.1 does not say it.
        kind = ZERO if entry.get("present") and not entry["data"] else HOLE
        return Extent(entry["start"], entry["length"], kind, layer=layer)
    if not entry["data"]:
        return Extent(entry["start"], entry["length"], HOLE, layer=layer)
    return Extent(entry["start"], entry["length"], DATA, host, compressed=host is None, layer=layer)


def open_nbd(chained: Sequence[Node], *, writable: bool, compress: bool = False) -> NbdDisk:
    """The top layer through a qemu-nbd of its own, which ends when the disk is closed.

    With `compress`, whole clusters that were never written before are stored compressed.
    """
    node = _node(chained)
    argv = ["qemu-nbd", "--discard=unmap"] if writable else ["qemu-nbd", "--read-only"]
    return QemuNbdDisk([*argv, _name({"driver": "compress", "file": node} if compress else node)])


class QemuNbdDisk(NbdDisk):
    """An NBD disk that owns its server."""

    def __init__(self, argv: List[str]) -> None:
        # An abstract socket, handed over ready: no name in any filesystem, and no wait for the server to listen.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind("")
            listener.listen(1)
            self._child = _start_activated(argv, listener)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(listener.getsockname())
        try:
            super().__init__(connection)
        except (OSError, ProtocolError) as error:
            connection.close()
            raise AgentError(IO, self._end()) from error

    def close(self) -> None:
        """See Disk. Raises AgentError when qemu-nbd could not close the image in order."""
        super().close()
        if self._child.returncode is None:
            said = self._end()
            if self._child.returncode:
                raise AgentError(IO, said)

    def _end(self) -> str:
        """Wait until qemu-nbd has ended; its last words."""
        try:
            _, stderr = self._child.communicate(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            _, stderr = self._child.communicate()
        return last_words("qemu-nbd", self._child.returncode, stderr)


def _start_activated(argv: List[str], listener: socket.socket) -> subprocess.Popen[bytes]:
    """Start qemu-nbd with the listening socket as systemd's socket activation would, sd_listen_fds(3)."""
    return start(argv, before=_ACTIVATED, stdin=listener, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
