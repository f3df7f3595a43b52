"""What the steps of one run share."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from kvm_clone.errors import KvmCloneError
from kvm_clone.execution.backup import Backup
from kvm_clone.execution.stages import TABLE, Row, Stage
from kvm_clone.hosts import connections, vms
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.host import Host
from kvm_clone.hosts.libvirt_host import FencedLibvirt, LibvirtHost
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.plan import Plan
from kvm_clone.progress import Note, OnEvent, Phase, PhaseStarted
from kvm_clone.transfer.content import Content


@dataclass
class Context:
    """One run: its plan, both hosts, how far it is, and what came of it so far.

    `libvirt`: the destination's, for looking. `parts`: the staged file by disk. `contents`: inode, size and mtime of
    the files that the replaced VM had, as they were at the commit. `stopped`: the VM to be replaced ran, and was
    stopped by this run.
    """

    plan: Plan
    source: Host
    destination: Host
    libvirt: LibvirtHost
    content: Content
    backup: Backup
    on_event: OnEvent
    stage: Stage = Stage.LOOKING
    fenced: FencedLibvirt | None = None
    stopped: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Row:
        """What an early end means now."""
        return TABLE[self.stage]

    @property
    def changing(self) -> FencedLibvirt:
        """Libvirt at the destination, to change something there: the agent holds the operation's lock."""
        assert self.fenced is not None, "a step that changes the destination comes after the lock"
        return self.fenced

    async def open_fence(self) -> None:
        """Open libvirt for `changing`; the agent has just taken the lock. Raises ConnectError, TransferError."""
        self.fenced = await connections.open_fenced(self.destination)

    async def close_fence(self) -> None:
        """Close what `open_fence` has opened, if anything."""
        if self.fenced is not None:
            await self.fenced.close()
            self.fenced = None

    @property
    def agent(self) -> AgentClient:
        """The destination's agent."""
        return self.destination.agent

    async def note(self, record: str, /, **fields: Any) -> None:
        """Journal a record at the destination."""
        await self.agent.note(record, fields)

    def where(self, directory: str, operation: str) -> dict[str, Any]:
        """The operation that is meant, and where its files may lie."""
        directories = sorted({*self.plan.facts.destination.directories, directory})
        return {"directory": directory, "name": self.plan.name, "operation": operation, "directories": directories}

    def staged(self, disks: tuple[Asset, ...]) -> list[tuple[Asset, str]]:
        """The disks, each with its staged file."""
        return [(disk, self.parts[disk.key]) for disk in disks]

    def say(self, phase: Phase, text: str) -> None:
        """Report that a phase begins."""
        self.on_event(PhaseStarted(phase, text))

    def warn(self, text: str) -> None:
        """Report a warning, which the result has too."""
        self.warnings.append(text)
        self.on_event(Note(text, warning=True))

    def count_removed(self, done: vms.Removal) -> None:
        """Add to the result what was removed, and warn of what was not."""
        self.removed += done.removed
        for text in done.kept:
            self.warn(text)

    async def after_commit(self, work: Awaitable[Any]) -> None:
        """Await work past the commit: the clone is whole, so that a failure is a warning and changes nothing."""
        try:
            await work
        except KvmCloneError as error:
            self.warn(f"{self.plan.name} is complete, but tidying up failed: {error}")
