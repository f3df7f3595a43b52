"""qemu-img and qemu-nbd, as children of the agent."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from typing import Any, Dict, Iterator, List, Optional, Tuple

from .disk import DATA, HOLE, ZERO, Extent
from .errors import IO, AgentError
from .nbd import NbdDisk
from .process import die_with_parent, last_words, run, start
from .wire import ProtocolError

_ACTIVATION_FD = 3
"""The first passed descriptor, by the protocol of sd_listen_fds(3)."""

_EXIT_SECONDS = 120.0
"""How long qemu-nbd may take to close an image after the last client has said goodbye."""


def info(path: str, format_: str, *, live: bool = False) -> Dict[str, Any]:
    """What `qemu-img info` knows of the image. Never probes: the definition says which format the guest sees.

    `live`: a VM may be writing it; metadata alone may be asked for then.
    """
    argv = ["qemu-img", "info", *(["--force-share"] if live else []), "--output=json", "-f", format_, "--", path]
    answer: Dict[str, Any] = json.loads(run(argv))
    return answer


def chain(path: str, format_: str) -> List[Dict[str, Any]]:
    """What is known of the image and of each image that it rests on, the top first."""
    argv = ["qemu-img", "info", "--backing-chain", "--output=json", "-f", format_, "--", path]
    answer: List[Dict[str, Any]] = json.loads(run(argv))
    return answer


def create(
    path: str, format_: str, size: int, options: Dict[str, str], backing: Optional[Tuple[str, str]] = None
) -> None:
    """Make an empty image of `size` bytes at `path`; an existing file there is taken over.

    `backing`: path and format of the image that it rests on.
    """
    argv = ["qemu-img", "create", "-q", "-f", format_]
    if options:
        argv += ["-o", ",".join(f"{key}={value}" for key, value in sorted(options.items()))]
    if backing is not None:
        argv += ["-b", backing[0], "-F", backing[1]]
    run([*argv, "--", path, str(size)])


def resize(path: str, format_: str, size: int) -> None:
    """Make the image `size` bytes large."""
    run(["qemu-img", "resize", "-q", "-f", format_, "--", path, str(size)])


def is_sound(path: str, format_: str) -> bool:
    """Whether the image can be opened and its metadata contradict nothing; clusters that nothing refers to are no harm.

    An image that another process has open is taken for sound.
    """
    status, said = _check(path, format_)
    return b"lock" in said if status == _CHECK_FAILED else status != _CHECK_CORRUPT


def repair(path: str, format_: str) -> None:
    """Free the clusters that nothing refers to: a killed qemu-nbd leaves some."""
    _check(path, format_, "-r", "leaks")


def _check(path: str, format_: str, *options: str) -> Tuple[int, bytes]:
    argv = ["qemu-img", "check", "-q", "-f", format_, *options, "--", path]
    child = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, said = child.communicate()
    return child.returncode, said


_CHECK_FAILED, _CHECK_CORRUPT = 1, 2
"""Exit statuses of qemu-img check."""


def map_extents(path: str, format_: str, start_at: int, end: int, *, shared: bool = False) -> Iterator[Extent]:
    """The image's extents, read from `qemu-img map` as it prints them, so that memory stays flat.

    `shared`: also of an image that a VM is writing, as its tables are just now. Raises AgentError.

    A data extent without a host offset does not lie in the file as the guest sees it: it is compressed, since
    encrypted images and external data files are refused before.
    """
    argv = [
        "qemu-img",
        "map",
        *(["--force-share"] if shared else []),
        "--output=json",
        "-f",
        format_,
        f"--start-offset={start_at}",
    ]
    argv += [f"--max-length={end - start_at}", "--", path]
    child = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    try:
        for line in child.stdout:
            # One entry a line: "[{…},", "{…},", … "{…}]"
            entry = line.strip().lstrip(b"[").rstrip(b",]")
            if entry:
                yield _extent(json.loads(entry))
    finally:
        child.stdout.close()  # a reader that stops early ends qemu-img by SIGPIPE
        _, stderr = child.communicate()
    if child.returncode:
        raise AgentError(IO, last_words("qemu-img", child.returncode, stderr))


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


def open_nbd(path: str, format_: str, *, writable: bool, compress: bool = False) -> NbdDisk:
    """The image through a qemu-nbd of its own, which ends when the disk is closed.

    With `compress`, whole clusters that were never written before are stored compressed.
    """
    argv = ["qemu-nbd", "--discard=unmap"] if writable else ["qemu-nbd", "--read-only"]
    if compress:
        name = path.replace(",", ",,")
        argv += [
            "--image-opts",
            f"driver=compress,file.driver={format_},file.file.driver=file,file.file.filename={name}",
        ]
    else:
        argv += ["--format", format_, "--", path]
    return QemuNbdDisk(argv)


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

    def before_exec() -> None:
        die_with_parent()
        os.dup2(listener.fileno(), _ACTIVATION_FD)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")

    # Occupies descriptor 3 if nothing does, lest Popen's own pipe gets the number that before_exec writes over.
    occupied = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, _ACTIVATION_FD)
    try:
        return start(
            argv,
            before_exec,
            pass_fds=[_ACTIVATION_FD],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(occupied)
