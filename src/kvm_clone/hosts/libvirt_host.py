"""A host's libvirt, as everything above asks it: one coroutine for each question or change.

The calls themselves block; they are in domains.py, live.py, inventory.py, host_things.py and verdict.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import libvirt

from kvm_clone.definition.claims import Claim
from kvm_clone.definition.domain_xml import DomainXml
from kvm_clone.definition.references import Reference
from kvm_clone.gather import undisturbed
from kvm_clone.hosts import domains, host_things, inventory, live, verdict
from kvm_clone.hosts.domains import Fenced, Listed
from kvm_clone.hosts.libvirt_errors import failing_as, message_of
from kvm_clone.hosts.verdict import Verdict
from kvm_clone.planning.domain_facts import Abilities, BackupJob, Domain, Live, Pool
from kvm_clone.planning.things import Objects

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")

_CLOSE_SECONDS = 5.0
"""How long libvirt may take to say goodbye."""


@dataclass(frozen=True)
class Frozen:
    """What came of freezing a guest's filesystems: how many were, or why none.

    `perhaps`: the guest may freeze all the same, since it took too long, or the connection broke.
    """

    count: int = 0
    refusal: str = ""
    perhaps: bool = False


@dataclass(frozen=True)
class Thawed:
    """What came of thawing: whether all was frozen until then, or why the guest does not say that it is thawed."""

    lasted: bool = False
    trouble: str = ""


class LibvirtHost:
    """A host's libvirt, for looking at it, and for reading a running VM of it.

    Every call raises TransferError, and InterruptedTransferError when the daemon is gone.
    """

    def __init__(self, host: str, connection: libvirt.virConnect) -> None:
        self._host = host
        self._connection = connection

    async def _ask(
        self,
        what: str,
        subject: str,
        work: Callable[Concatenate[libvirt.virConnect, _Arguments], _Answer],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Answer:
        with failing_as(what, subject):
            return await asyncio.to_thread(work, self._connection, *arguments, **options)

    async def _to_its_end(
        self,
        work: Callable[Concatenate[libvirt.virConnect, _Arguments], _Answer],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Answer:
        """Call it and wait for its end, cancelled or not: what libvirt is doing must not come about unseen."""
        return await undisturbed(asyncio.to_thread(work, self._connection, *arguments, **options))

    async def is_alive(self) -> bool:
        """Return whether the connection is still there."""
        with contextlib.suppress(libvirt.libvirtError):
            return bool(await asyncio.to_thread(self._connection.isAlive))
        return False

    async def close(self) -> None:
        """Close the connection, also one whose host is gone.

        libvirt waits for the daemon's answer, which never comes from an agent that hangs. The call ends when the host's
        connection does, which is closed next.
        """
        closing = asyncio.ensure_future(asyncio.to_thread(_close, self._connection))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.shield(closing)

    async def find(self, name: str) -> Domain | None:
        """Return the domain of that name, None when there is none."""
        return await self._ask(f"asking {self._host} for {name!r}", name, domains.find, name)

    async def with_uuid(self, uuid: str) -> str:
        """Return the name of the domain of that UUID, empty when there is none."""
        return await self._ask(f"asking {self._host} for the VM {uuid}", self._host, domains.with_uuid, uuid)

    async def defined_by(self, name: str, operation: str) -> bool:
        """Return whether the domain of that name carries our mark of that operation."""
        return await self._ask(f"asking {self._host} for {name!r}", name, domains.defined_by, name, operation)

    async def is_saved_with(self, name: str, disks: tuple[str, ...]) -> bool:
        """Return whether libvirt keeps a managed save of the domain that has any of these disks."""
        what = f"asking {self._host} for the saved state of {name!r}"
        return await self._ask(what, name, domains.is_saved_with, name, disks)

    async def names(self) -> dict[str, str]:
        """Return every domain's UUID by its name, running or not."""
        return await self._ask(f"asking libvirt on {self._host}", self._host, domains.names)

    async def pools(self) -> tuple[Pool, ...]:
        """Return every storage pool."""
        return await self._ask(f"asking libvirt on {self._host}", self._host, domains.pools)

    async def abilities(self, xml: DomainXml) -> Abilities:
        """Return what the host can give a VM of this definition."""
        return await self._ask(f"asking libvirt on {self._host}", self._host, domains.abilities, xml)

    async def host_uuid(self) -> str:
        """Return the host's UUID, empty where libvirt does not say."""
        return await self._ask(f"asking libvirt on {self._host}", self._host, domains.host_uuid)

    async def version(self) -> int:
        """Return libvirt's version: 1,000,000 times the major number, 1,000 times the minor, and the release."""
        return int(await self._ask(f"asking libvirt on {self._host}", self._host, lambda found: found.getLibVersion()))

    async def objects(self, wanted: Collection[Reference]) -> Objects:
        """Return what the host's libvirt has of what the references name."""
        return await self._ask(f"asking libvirt on {self._host}", self._host, host_things.objects, wanted)

    async def claims(self) -> list[Claim]:
        """Return every file that any domain names; what cannot be established is a claim of its own."""
        return await self._ask(f"asking libvirt on {self._host} what its VMs use", self._host, inventory.claims)

    async def list_all(self) -> list[Listed]:
        """Return every domain with its disks, by name."""
        return await self._ask(f"listing the VMs of {self._host}", self._host, domains.list_all, self._host)

    async def judge(self, xml: str, name: str) -> Verdict:
        """Return what libvirt says of a definition whose name is impossible: see verdict.py. `name`: the VM's own."""
        what = f"asking libvirt on {self._host} for its word on the definition"
        return await self._ask(what, name, verdict.judge, xml)

    async def look(self, name: str) -> Live:
        """Look at a running domain."""
        return await self._ask(f"asking {self._host} for {name!r}", name, live.look, name)

    async def changed_since(self, name: str, checkpoint: str) -> dict[str, int]:
        """Return how many bytes of each disk have changed since the checkpoint, by its target."""
        what = f"asking {self._host} for the changes of {name}"
        return await self._ask(what, name, live.changed_since, name, checkpoint)

    async def our_jobs(self) -> list[live.OurJob]:
        """Return the backup jobs of ours, of all domains."""
        return await self._ask(f"asking libvirt on {self._host} for backup jobs", self._host, live.our_jobs)

    async def begin_job(self, name: str, job: BackupJob) -> None:
        """Begin the job: from here on its socket offers each disk as it is now."""
        with failing_as(f"beginning the backup job on {self._host}", name):
            await self._to_its_end(live.begin, name, job)

    async def try_job(self, name: str, job: BackupJob) -> str:
        """Begin the job; return why libvirt refuses it, nothing when it has begun."""
        try:
            await self._to_its_end(live.begin, name, job)
        except libvirt.libvirtError as error:
            return message_of(error)
        return ""

    async def end_job(self, name: str) -> int:
        """End our backup job of the domain, and no other; return the bytes of scratch that it took."""
        with failing_as(f"ending the backup job of {name} on {self._host}", name):
            return await self._to_its_end(live.end, name)

    async def delete_checkpoints(self, name: str, wanted: tuple[str, ...]) -> list[str]:
        """Delete those of the checkpoints that nothing rests on; return their names."""
        with failing_as(f"deleting checkpoints on {self._host}", name):
            return await self._to_its_end(live.delete_checkpoints, name, wanted)

    async def freeze(self, name: str) -> Frozen:
        """Freeze the guest's filesystems."""
        started = time.monotonic()
        try:
            return Frozen(await self._to_its_end(live.freeze, name))
        except libvirt.libvirtError as error:
            return Frozen(0, message_of(error), live.may_be_frozen(error, time.monotonic() - started))

    async def thaw(self, name: str, count: int | None) -> Thawed:
        """Thaw the guest's filesystems. `count`: how many were frozen, None if that is not known."""
        try:
            return Thawed(await self._to_its_end(live.thaw, name, count))
        except libvirt.libvirtError as error:
            return Thawed(trouble=message_of(error))


class FencedLibvirt(LibvirtHost):
    """A host's libvirt by way of the agent that holds an operation's lock, for changing it."""

    def __init__(self, host: str, connection: libvirt.virConnect) -> None:
        super().__init__(host, connection)
        self._fenced = Fenced(connection)

    async def _change(
        self,
        what: str,
        subject: str,
        work: Callable[Concatenate[Fenced, _Arguments], _Answer],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> _Answer:
        with failing_as(what, subject):
            return await asyncio.to_thread(work, self._fenced, *arguments, **options)

    async def define(self, name: str, xml: str) -> None:
        """Define a domain."""
        await self._change(f"defining {name} on {self._host}", name, domains.define, xml)

    async def undefine(self, name: str, *, keep_variables: bool) -> None:
        """Undefine the domain with its TPM state and, unless they are kept, its UEFI variables."""
        what = f"removing {name!r} from {self._host}"
        await self._change(what, name, domains.undefine, name, keep_variables=keep_variables)

    async def stop(self, name: str) -> bool:
        """Stop the domain at once if it runs; return whether it did."""
        return await self._change(f"stopping {name} on {self._host}", name, domains.stop, name)

    async def start(self, name: str) -> None:
        """Start the domain."""
        await self._change(f"starting {name} on {self._host} again", name, domains.start, name)

    async def forget_state(self, name: str, own: tuple[str, ...], disks: tuple[str, ...]) -> list[str]:
        """Remove what libvirt kept beside a definition that has been replaced: see domains.forget_state."""
        what = f"removing what {self._host} keeps of the old {name}"
        return await self._change(what, name, domains.forget_state, name, own, disks)

    async def refresh_pools(self, directories: set[str]) -> None:
        """Let libvirt see new files in the active pools of these directories."""
        what = f"refreshing the pools of {self._host}"
        await self._change(what, self._host, domains.refresh_pools, directories)

    async def seal(self, name: str, images: Mapping[str, str]) -> None:
        """Record in the definition how it and its images are now."""
        await self._change(f"sealing {name}", name, domains.seal, name, images)

    async def settle_pending(self, name: str) -> None:
        """Drop from the definition what its commit has left to be done."""
        await self._change(f"sealing {name}", name, domains.settle_pending, name)


def _close(connection: libvirt.virConnect) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()
