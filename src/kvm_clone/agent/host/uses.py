"""Who uses a file of this host: what decides whether it may be removed, or written into.

The controller reports what the definitions of this host's VMs name (`Claim`); this module finds out which files those
are, by device and inode, so that another name of a file is the same file. What cannot be established is an answer of
its own, "unknown", and whoever asks takes it for "used".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
import threading
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from kvm_clone.agent.disks import chain, fingerprint, header
from kvm_clone.agent.disks.image_lock import is_locked_by_qemu
from kvm_clone.agent.process import other_processes
from kvm_clone.agent.protocol.errors import AgentError

FREE, USED, UNKNOWN, ABSENT, ODD = "free", "used", "unknown", "absent", "odd"
"""What is answered of a file: nobody uses it; somebody does; not to be established; not there; no regular file."""

IMAGE, FILE, TREE, DOUBT = "image", "file", "tree", "doubt"
"""What a claim is of: an image with everything it rests on; one file; a directory with all below; what nobody knows."""

SECONDS = 60.0
"""How long the whole question may take: a path may lead to a server that does not answer."""

_SCAN_SECONDS = 20.0
"""How long the images of a directory may take to be looked at."""

_OURS = re.compile(r"\.kvm-clone-.*|kvm-clone-[0-9a-zA-Z]+-[^/]*\.qcow2")
"""Names of staged files and of overlays that are about to be merged: they rest on what they will become."""

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("QQ")  # struct loop_info64 of linux/loop.h begins with lo_device, lo_inode
_LOOP_INFO_BYTES = 232

_Id = Tuple[int, int]


class Claim(NamedTuple):
    """What a definition names. `by`: whose it is, for people. `format`: an image's, empty where nobody says."""

    by: str
    kind: str
    path: str
    format: str = ""


def uses(
    candidates: List[str],
    claims: List[List[str]],
    directories: List[str],
    elsewhere: List[str],
    *,
    processes: bool = False,
    held: Sequence[_Id] = (),
) -> List[Dict[str, Any]]:
    """What is known of each candidate's use, in their order: `path`, `real`, `identity`, `state`, and `why`.

    `claims`: as lists of Claim's fields. `directories`: where images may lie that rest on a candidate though no VM has
    them. `elsewhere`: fingerprints (facts.fingerprint) of the files of a VM on another host, which may see the same
    filesystem. `processes`: also look for processes that have a candidate open, and for QEMU's locks. `held`: device
    and inode of files that are locked by this process itself.
    """
    answers: List[Dict[str, Any]] = []

    def work() -> None:
        index = _Index([Claim(*claim) for claim in claims])
        index.add_loops()
        asked = [_Candidate(path) for path in candidates]
        index.add_images(directories, {one.id for one in asked if one.id})
        index.add_elsewhere(asked, elsewhere)
        if processes:
            index.add_processes({one.id for one in asked if one.id})
            index.add_locks([one for one in asked if one.id not in held])
        answers.extend(index.judge(one) for one in asked)

    if not _within(SECONDS, work):
        why = f"the files that VMs use could not be looked at within {SECONDS:.0f} s"
        return [{"path": path, "real": path, "identity": "", "state": UNKNOWN, "why": why} for path in candidates]
    return answers


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Do the work on a thread of its own; whether it ended in time. What it raises is raised."""
    failures: List[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()


class _Candidate:
    """A file that is asked about; `id` is its device and inode, None if it is not there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.real = os.path.realpath(path)
        self.regular = False
        self.id: Optional[_Id] = None
        self.stat: Optional[os.stat_result] = None
        self.error = ""
        try:
            self.stat = os.stat(path)
            self.id = (self.stat.st_dev, self.stat.st_ino)
            self.regular = stat.S_ISREG(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self.error = f"{path} cannot be looked at: {error.strerror}"


class _Index:
    """What is in use, by device and inode, by path and below directories; and what is not known."""

    def __init__(self, claims: Iterable[Claim]) -> None:
        self._ids: Dict[_Id, str] = {}
        self._lasting: Dict[str, str] = {}
        self._paths: Dict[str, str] = {}
        self._trees: Dict[_Id, str] = {}
        self._raw: Set[_Id] = set()
        self._doubts: List[str] = []
        for claim in dict.fromkeys(claims):
            self._add(claim)

    def _add(self, claim: Claim) -> None:
        if claim.kind == DOUBT:
            self._doubts.append(f"{claim.by}: {claim.path}")
        elif claim.kind == TREE:
            self._add_path(claim.by, claim.path, self._trees)
        elif claim.kind == FILE:
            self._add_path(claim.by, claim.path, self._ids)
        else:
            try:
                for node in chain.walk(claim.path, claim.format):
                    found = self._add_path(claim.by, node.path, self._ids)
                    if found and node.format == chain.RAW:
                        self._raw.add(found)
            except chain.UnknownError as error:
                self._doubts.append(f"{claim.by}: {error}")

    def _add_path(self, by: str, path: str, ids: Dict[_Id, str]) -> Optional[_Id]:
        self._paths.setdefault(os.path.realpath(path), by)
        try:
            about = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):  # what is not there is no file that could be asked about
            return None
        except OSError as error:
            self._doubts.append(f"{by}: {path} cannot be looked at: {error.strerror}")
            return None
        found = (about.st_dev, about.st_ino)
        ids.setdefault(found, by)
        lasting = _lasting(about)
        if not lasting.startswith("0:"):
            self._lasting.setdefault(lasting, by)
        return found

    def add_loops(self) -> None:
        """Files behind loop devices: a VM, a mount or the device mapper may have those."""
        with contextlib.suppress(FileNotFoundError):  # a kernel without any
            for name in os.listdir("/sys/block"):
                if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file"):
                    self._add_loop(name)

    def _add_loop(self, name: str) -> None:
        by = f"the loop device {name}"
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8") as file:
            self._add_path(by, file.read().rstrip("\n"), self._ids)
        with contextlib.suppress(OSError):  # without the device's node the path has to do
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                answer = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO_BYTES))
                self._ids.setdefault(_LOOP_INFO.unpack_from(answer), by)
            finally:
                os.close(fd)

    def add_images(self, directories: Sequence[str], wanted: Set[_Id]) -> None:
        """Images of these directories that rest on a candidate, whether a VM has them or not."""
        deadline = time.monotonic() + _SCAN_SECONDS
        for directory in directories if wanted else ():
            try:
                for path in _files_in(directory):
                    if time.monotonic() > deadline:
                        self._doubts.append(f"{directory} has too many files to look for images that rest on others")
                        return
                    self._add_image(path, wanted)
            except (FileNotFoundError, NotADirectoryError):  # a pool's directory may be gone
                continue
            except OSError as error:
                why = error.strerror or str(error)
                self._doubts.append(f"{directory} cannot be searched for images that rest on others: {why}")

    def _add_image(self, path: str, wanted: Set[_Id]) -> None:
        with contextlib.suppress(OSError, AgentError, chain.UnknownError):  # no VM has it, and nothing reads it
            about = os.stat(path)
            own = (about.st_dev, about.st_ino)
            if own in wanted or own in self._raw or header.guess(header.beginning(path)) != chain.QCOW2:
                return
            for node in chain.walk(path, chain.QCOW2):
                with contextlib.suppress(FileNotFoundError):
                    below = os.stat(node.path)
                    if (below.st_dev, below.st_ino) in wanted:
                        self._ids.setdefault((below.st_dev, below.st_ino), f"the image {path}")

    def add_elsewhere(self, candidates: Sequence[_Candidate], fingerprints: Sequence[str]) -> None:
        """Files of another host that are candidates: inode, size and times are equal, whatever the device's number."""
        theirs = {text.partition(":")[2] for text in fingerprints}
        for one in candidates:
            if one.stat and one.id and _lasting(one.stat) in theirs:
                self._ids.setdefault(one.id, "the source VM")

    def add_processes(self, wanted: Set[_Id]) -> None:
        """Processes, other than this one and its children, that have a candidate open, or mapped into their memory."""
        others = other_processes()
        if 1 not in others:  # procfs may be mounted with hidepid, for all but root
            self._doubts.append("not all processes of this host can be looked at by this user")
        for pid in others:
            try:
                for number in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):  # closed meanwhile
                        about = os.stat(f"/proc/{pid}/fd/{number}")
                        if (about.st_dev, about.st_ino) in wanted:
                            self._ids.setdefault((about.st_dev, about.st_ino), f"process {pid} ({_name(pid)})")
                for one in _mapped(pid) & wanted:
                    self._ids.setdefault(one, f"process {pid} ({_name(pid)})")
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            except PermissionError:
                self._doubts.append(f"the open files of process {pid} cannot be looked at by this user")
                return

    def add_locks(self, candidates: Sequence[_Candidate]) -> None:
        """QEMU's locks, which a filesystem that several hosts share carries from one to the other."""
        for one in candidates:
            if one.regular and one.id:
                try:
                    if is_locked_by_qemu(one.path):
                        self._ids.setdefault(one.id, "a process that holds QEMU's lock on it")
                except OSError as error:
                    self._doubts.append(f"the locks on {one.path} cannot be looked at: {error.strerror}")

    def judge(self, one: _Candidate) -> Dict[str, Any]:
        """The answer for one candidate."""
        identity = f"{one.id[0]}:{one.id[1]}" if one.id else ""
        state, why = self._state(one)
        return {"path": one.path, "real": one.real, "identity": identity, "state": state, "why": why}

    def _state(self, one: _Candidate) -> Tuple[str, str]:
        by = self._ids.get(one.id, "") if one.id else ""
        by = by or self._paths.get(one.real, "") or self._above(one.real) or self._by_another_filesystem(one)
        if by:
            return USED, f"{by} uses it"
        if one.error:
            return UNKNOWN, one.error
        if one.id is None:
            return ABSENT, "it is not there"
        if not one.regular:
            return ODD, "it is no regular file"
        if self._doubts:
            more = f" (and {len(self._doubts) - 1} more reasons)" if len(self._doubts) > 1 else ""
            return UNKNOWN, f"what the VMs of this host use is not known: {self._doubts[0]}{more}"
        return FREE, ""

    def _by_another_filesystem(self, one: _Candidate) -> str:
        """Who has the file by a mount that numbers its device otherwise: an overlay, or what the host exports itself.

        Inode, size and times, in nanoseconds, are equal then. An inode of 0 says nothing: see filesystem.py.
        """
        lasting = _lasting(one.stat) if one.stat and one.regular else "0:"
        return "" if lasting.startswith("0:") else self._lasting.get(lasting, "")

    def _above(self, path: str) -> str:
        """Who has a directory that the path lies below, nothing when nobody has."""
        while self._trees and path != "/":
            path = os.path.dirname(path)
            with contextlib.suppress(OSError):
                about = os.stat(path)
                by = self._trees.get((about.st_dev, about.st_ino))
                if by:
                    return by
        return ""


def _lasting(about: os.stat_result) -> str:
    """A fingerprint without the device; it begins with 0 where it says nothing."""
    try:
        return fingerprint.of_stat(about).partition(":")[2]
    except OSError:  # a block device of which the kernel tells nothing
        return "0:"


def _files_in(directory: str) -> Iterator[str]:
    """The regular files of the directory, and those that its links lead to, that are not staged by us.

    Raises OSError when the directory cannot be listed.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if not _OURS.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    if entry.is_file():  # or a link to one
                        yield entry.path


def _mapped(pid: int) -> Set[_Id]:
    """Device and inode of the files that the process has mapped: it may have closed them since. Raises OSError.

    Nothing is known of the maps of a process that has privileges which root here has not, as outside of a container.
    """
    found: Set[_Id] = set()
    with contextlib.suppress(PermissionError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, _, _, device, inode, *_ = line.split()
            major, minor = (int(part, 16) for part in device.split(":"))
            found.add((os.makedev(major, minor), int(inode)))
    return found


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "ended"
