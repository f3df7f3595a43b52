"""The agent's calls: one method for each row of the agent's table (agent/server.py), with its arguments and answer.

Each raises AgentCallError, of the kind `protocol` for an answer that is malformed; LockedError while another operation
holds the lock; TransferError when the connection is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from kvm_clone.agent.disks.image import RAW
from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.hosts import answers
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.readers import listed, mapped, nothing, optional, pair, record, text, truth, whole
from kvm_clone.planning.facts import Directory, HostFacts, ImageFacts
from kvm_clone.planning.things import Resources

_T = TypeVar("_T")
Progress = Callable[[dict[str, Any]], None]
Pairs = Sequence[Sequence[int]]
"""[start, end) pairs in bytes."""


class Caller(Protocol):
    """What carries a call to the agent and its answer back."""

    name: str

    async def call(self, name: str, progress: Progress | None = None, /, **arguments: Any) -> Any:
        """Call the agent."""


class AgentClient:
    """The agent of one host."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def _ask(
        self, read: Callable[[Any], _T], name: str, progress: Progress | None = None, /, **arguments: Any
    ) -> _T:
        answer = await self._caller.call(name, progress, **arguments)
        try:
            return read(answer)
        except (ValueError, KeyError, TypeError) as error:
            why = f"the agent's answer to {name} is malformed ({error}): {str(answer)[:200]}"
            raise AgentCallError(kinds.PROTOCOL, why, self._caller.name) from error

    # The host

    async def ping(self) -> None:
        """Nothing: the agent is there."""
        return await self._ask(nothing, "ping")

    async def host(self) -> HostFacts:
        """The host's name, Python and QEMU tools; its UUID is libvirt's to say."""
        return await self._ask(answers.host(self._caller.name), "host")

    async def resources(self, addresses: Sequence[str]) -> Resources:
        """Huge pages, NUMA nodes, CPUs, USB devices, and which addresses are the host's."""
        return await self._ask(answers.resources, "resources", addresses=list(addresses))

    async def probe(self, ssh: Sequence[str], known_hosts: str, measured: bool = True) -> answers.Probe:
        """Whether the host can run a command by `ssh`."""
        read = record(answers.Probe)
        return await self._ask(read, "probe", ssh=list(ssh), known_hosts=known_hosts, measured=measured)

    async def relay(self, fenced: bool) -> int:
        """Open libvirt's socket; the number of the channel that carries it."""
        return await self._ask(whole, "relay", fenced=fenced)

    # Files and directories

    async def directory(self, path: str, stems: Sequence[str] = (), tried: bool = True) -> Directory:
        """What the directory is and can do, and its entries that begin with the stems."""
        return await self._ask(answers.directory, "directory", path=path, stems=list(stems), tried=tried)

    async def exists(self, path: str) -> bool:
        """Whether the path is there."""
        return await self._ask(truth, "exists", path=path)

    async def look(self, paths: Sequence[str]) -> dict[str, str]:
        """What each path is: file, directory, socket, fifo, char, block, missing or unknown."""
        return await self._ask(mapped(text), "look", paths=list(paths))

    async def free(self, path: str) -> int:
        """Bytes that the path's filesystem has room for."""
        return await self._ask(whole, "free", path=path)

    async def fingerprint(self, path: str, image_format: str = RAW) -> str:
        """The fingerprint of an image with all that it rests on; of format raw, of the file alone."""
        return await self._ask(text, "fingerprint", path=path, image_format=image_format)

    async def fingerprints(self, paths: Sequence[str]) -> list[str | None]:
        """The fingerprint of each file, None of one that cannot be looked at."""
        return await self._ask(listed(optional(text), len(paths)), "fingerprints", paths=list(paths))

    async def uses(
        self,
        candidates: Sequence[str],
        claims: Sequence[Sequence[str]],
        directories: Sequence[str],
        elsewhere: Sequence[str],
        processes: bool = False,
    ) -> list[answers.Use]:
        """Who uses each candidate, in their order."""
        return await self._ask(
            listed(record(answers.Use), len(candidates)),
            "uses",
            candidates=list(candidates),
            claims=[list(claim) for claim in claims],
            directories=list(directories),
            elsewhere=list(elsewhere),
            processes=processes,
        )

    async def marks(self, operation: str, directories: Sequence[str]) -> list[str | None]:
        """For each directory the one that an agent of the operation has marked, if they are the same."""
        return await self._ask(
            listed(optional(text), len(directories)), "marks", operation=operation, directories=list(directories)
        )

    # Images

    async def disk(self, path: str, image_format: str, live: bool = False) -> ImageFacts:
        """What is known of an image file; `live`: a VM may be writing it."""
        read = answers.image(path, image_format)
        return await self._ask(read, "disk", path=path, image_format=image_format, live=live)

    async def lock_image(self, path: str, image_format: str) -> None:
        """Keep every QEMU from writing the image, and what it rests on."""
        return await self._ask(nothing, "lock_image", path=path, image_format=image_format)

    async def unlock_images(self) -> None:
        """Let others write the images again."""
        return await self._ask(nothing, "unlock_images")

    async def data_in(self, path: str, image_format: str, ranges: Pairs | None = None, own: bool = False) -> int:
        """How many bytes of the content in the ranges (None: in all) are not known to be zero."""
        pairs = None if ranges is None else [list(one) for one in ranges]
        return await self._ask(whole, "data_in", path=path, image_format=image_format, ranges=pairs, own=own)

    async def ranges_of(self, path: str, image_format: str, data: bool) -> answers.Ranges:
        """Where the image is known to be zero, or with `data` where it is not."""
        return await self._ask(listed(pair), "ranges_of", path=path, image_format=image_format, data=data)

    async def digests(self) -> list[str]:
        """The digest functions that the host has, the fastest first."""
        return await self._ask(listed(text), "digests")

    async def digest(
        self, path: str, image_format: str, how: Sequence[str], ranges: Pairs, progress: Progress | None
    ) -> dict[int, str]:
        """The digest in hexadecimal of what lies in each segment, by its first byte."""
        asked = {"path": path, "image_format": image_format, "how": list(how)}
        return await self._ask(answers.digests, "digest", progress, **asked, ranges=[list(one) for one in ranges])

    async def blocks(self, path: str, image_format: str, how: Sequence[str], ranges: Pairs) -> dict[int, str]:
        """The blocks' digests of each segment, joined, in base64."""
        asked = {"path": path, "image_format": image_format, "how": list(how)}
        return await self._ask(answers.digests, "blocks", **asked, ranges=[list(one) for one in ranges])

    # A running VM

    async def dirty(self, uri: str, bitmap: str) -> answers.Ranges:
        """What a dirty bitmap of an NBD export names."""
        return await self._ask(listed(pair), "dirty", uri=uri, bitmap=bitmap)

    async def reader(self, domain: str) -> str:
        """Which operation copies the domain (by its UUID) by a backup job; nothing when none does."""
        return await self._ask(text, "reader", domain=domain)

    async def guard(self, domain: str, socket: str, operation: str) -> bool:
        """Take the lock on backups of the domain; whether the agent could thaw it."""
        return await self._ask(truth, "guard", domain=domain, socket=socket, operation=operation)

    async def freezing(self, frozen: bool) -> None:
        """The guest's filesystems are about to be frozen, or have been thawed."""
        return await self._ask(nothing, "freezing", frozen=frozen)

    async def unguard(self) -> None:
        """The job is over."""
        return await self._ask(nothing, "unguard")

    async def remove_scratch(self, paths: Sequence[str]) -> None:
        """Remove scratch files and sockets of a backup job."""
        return await self._ask(nothing, "remove_scratch", paths=list(paths))

    # Operations that were interrupted

    async def staged(self, directories: Sequence[str], name: str | None = None) -> list[answers.Journalled]:
        """The operations whose journals lie there; one that is malformed has an `error`."""
        return await self._ask(listed(answers.journalled), "staged", directories=list(directories), name=name)

    async def record_outcome(
        self, directory: str, name: str, operation: str, directories: Sequence[str], committed: bool
    ) -> None:
        """Journal whether libvirt took the definition."""
        where = {"directory": directory, "name": name, "operation": operation, "directories": list(directories)}
        return await self._ask(nothing, "record_outcome", **where, committed=committed)

    async def sweep(self, directories: Sequence[str]) -> list[str]:
        """Remove what operations left that ended before they had begun; the files."""
        return await self._ask(listed(text), "sweep", directories=list(directories))

    async def recover(self, directory: str, name: str, operation: str, directories: Sequence[str]) -> list[str]:
        """Undo an operation, or finish a committed one; what could not be removed."""
        where = {"directory": directory, "name": name, "operation": operation, "directories": list(directories)}
        return await self._ask(listed(text), "recover", **where)

    # The operation that the agent has

    async def hold(self, name: str, about: dict[str, Any]) -> None:
        """Take the lock on operations on the VM of that name."""
        return await self._ask(nothing, "hold", name=name, about=about)

    async def stage(
        self,
        directory: str,
        name: str,
        operation: str,
        about: dict[str, Any],
        directories: Sequence[str],
        resume: bool = False,
        keep: bool = False,
        finishing: bool = False,
        discards: str = "",
        marks: Sequence[str] | None = None,
    ) -> None:
        """Take the lock and begin the journal, or continue it."""
        return await self._ask(
            nothing,
            "stage",
            directory=directory,
            name=name,
            operation=operation,
            about=about,
            directories=list(directories),
            resume=resume,
            keep=keep,
            finishing=finishing,
            discards=discards,
            marks=None if marks is None else list(marks),
        )

    async def remove(self, files: Sequence[dict[str, str]]) -> list[answers.Removed]:
        """Remove files, each given by `path` and `identity`."""
        return await self._ask(listed(answers.removed, len(files)), "remove", files=list(files))

    async def release(self) -> None:
        """Release the lock."""
        return await self._ask(nothing, "release")

    async def unmark(self) -> None:
        """Remove the marks in directories."""
        return await self._ask(nothing, "unmark")

    async def create(self, disk: str, final: str, spec: dict[str, Any]) -> str:
        """Create a staged disk; its path."""
        return await self._ask(text, "create", disk=disk, final=final, spec=spec)

    async def publish(self, disk: str, final: str) -> None:
        """Give a staged disk its final name."""
        return await self._ask(nothing, "publish", disk=disk, final=final)

    async def note(self, record: str, fields: dict[str, Any]) -> None:
        """Append a record to the journal."""
        return await self._ask(nothing, "note", record=record, fields=fields)

    async def overlays(self) -> list[answers.Overlay]:
        """The overlays of the committed VM that are still there."""
        return await self._ask(listed(record(answers.Overlay)), "overlays")

    async def merge(self) -> None:
        """Merge the overlays into what they rest on."""
        return await self._ask(nothing, "merge")

    async def merged(self) -> None:
        """Remove the overlays, which no definition names any more."""
        return await self._ask(nothing, "merged")

    async def seal(self) -> dict[str, str] | None:
        """The fingerprint of each disk of the committed VM; None when somebody has written them since."""
        return await self._ask(optional(mapped(text)), "seal")

    async def undo(self, past_commit: bool = False) -> list[str]:
        """Undo the operation; what could not be removed."""
        return await self._ask(listed(text), "undo", past_commit=past_commit)

    async def finish(self) -> None:
        """Remove the journal: the operation is complete."""
        return await self._ask(nothing, "finish")
