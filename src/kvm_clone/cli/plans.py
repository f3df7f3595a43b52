"""Plans on the command line: shown by --dry-run, saved by --plan-out, run by `kvm-clone apply`."""

from __future__ import annotations

import json
import os
import posixpath
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from kvm_clone.cli import context, output
from kvm_clone.client import Client, Request
from kvm_clone.errors import ExitCode, UsageError
from kvm_clone.findings import Severity
from kvm_clone.options import CloneOptions, Options, SyncOptions, Verify
from kvm_clone.planning import steps
from kvm_clone.planning.assets import Asset
from kvm_clone.planning.plan import Plan
from kvm_clone.planning.steps import Step
from kvm_clone.settings import bounded
from kvm_clone.settings.config import Output, Settings
from kvm_clone.units import format_bytes
from kvm_clone.version import __version__

FORMAT = 2
"""Of the saved document; another one is refused."""

_LARGEST = 16 * 1024 * 1024
"""Bytes of a saved plan."""

_STYLES = {Severity.BLOCKING: "bold red", Severity.WARNING: "yellow", Severity.INFO: ""}


def show(settings: Settings, request: Request, file: Path | None, *, dry_run: bool) -> int:
    """Plan, print what would be done, and save it to `file` if one is given; the exit code."""
    plan, delta = context.run(_plan(settings, request, measured=dry_run))
    refusal = plan.refusal()
    if file is not None and refusal is None:
        _save(file, document(request, plan, delta))
    if settings.output is Output.JSON:
        output.print_json(document(request, plan, delta))
    else:
        _print(plan, delta)
        if file is not None and refusal is None and not dry_run:
            print(f"saved; run it with: kvm-clone apply {file}")
    return int(refusal.exit_code if refusal is not None else ExitCode.DONE)


Delta = Mapping[str, int | None]
"""Bytes that would be sent, by disk; None where only the run can tell. Empty where nobody asked."""


async def _plan(settings: Settings, request: Request, *, measured: bool) -> tuple[Plan, Delta]:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        if measured and isinstance(request.options, SyncOptions):
            return await client.measure(request)
        return await client.plan(request), {}


def document(request: Request, plan: Plan, delta: Delta) -> dict[str, Any]:
    """The stable form of a plan."""
    return {
        "format": FORMAT,
        "version": __version__,
        "request": {"command": _command(request.options), **asdict(request)},
        "facts": plan.facts.digest,
        "name": plan.name,
        "action": plan.decision.action,
        "runs": plan.refusal() is None,
        "route": {"route": plan.route, "reason": plan.route_reason},
        "disks": [
            {
                "target": disk.target,
                "source": disk.image.path,
                "destination": disk.final,
                "format": disk.image.format,
                "virtual_size": disk.image.virtual_size,
                "data": disk.image.data,
                "durable": disk.staged.durable if disk.staged else 0,
                "replica": disk.base.path if disk.base else None,
                "to_send": delta.get(disk.target),
            }
            for disk in plan.disks
        ],
        "findings": [asdict(finding) for finding in plan.findings],
        "steps": [{"step": type(step).__name__, "text": describe(step)} for step in plan.steps],
    }


def describe(step: Step) -> str:  # noqa: C901 - one line for each kind of step
    """What a step does, for people."""
    match step:
        case steps.RemoveExisting(paths):
            return f"remove the existing VM{_listed(paths)}"
        case steps.SettleStage(committed=committed):
            return f"note that the earlier attempt {'has' if committed else 'has not'} committed"
        case steps.DiscardStage(directory):
            return f"undo the earlier attempt in {directory}"
        case steps.TakeLock():
            return "lock"
        case steps.ReleaseLock():
            return "unlock"
        case steps.BeginStage(directory, resume):
            return f"lock, and {'go on with the' if resume else 'begin a'} journal in {directory}"
        case steps.CreateDisk(disk):
            return f"{'take up' if disk.staged else 'make'} the staged image of {disk.key} ({disk.source.format})"
        case steps.CopyDisks(disks):
            return f"send the content of {_targets(disks)}"
        case steps.BeginBackup(job, quiesce):
            since = f", with what changed since {job.incremental}" if job.incremental else ""
            where = ", ".join(sorted({posixpath.dirname(disk.scratch) for disk in job.disks}))
            return f"take one point in time of the running source (quiesce {quiesce}){since}; scratch in {where}"
        case steps.EndBackup():
            return "end the backup job and remove its scratch"
        case steps.ProveDisks(disks, proof):
            return f"digest {'what was sent of ' if proof is Verify.SENT else ''}{_targets(disks)} and compare"
        case steps.VerifyExisting(disks):
            return f"digest {_targets(disks)} on both hosts and compare"
        case steps.CheckSource():
            return "make sure that the source has not changed"
        case steps.PublishDisk(disk):
            return f"give {disk.key} its final name, {disk.place.path}"
        case steps.StopDomain():
            return "stop the existing VM"
        case steps.DefineDomain():
            return "define the VM: the commit"
        case steps.RemoveReplaced(paths, _):
            return f"remove what only the VM as it was had{_listed(paths)}"
        case steps.MergeDisks():
            return "merge the overlays into the replica's images, and define it onto those"
        case steps.SealReplica():
            return "record how it is now"
        case steps.DropCheckpoints(names):
            return f"delete the source's checkpoint {', '.join(names)}"
        case steps.TakeUpCommitted(directory):
            return f"go on with what has committed in {directory}"
        case steps.EndStage():
            return "remove the journal, and unlock"


def _targets(disks: tuple[Asset, ...]) -> str:
    return ", ".join(disk.key for disk in disks)


def _listed(paths: tuple[str, ...]) -> str:
    return f": {', '.join(paths)}" if paths else ""


def _print(plan: Plan, delta: Delta) -> None:
    console = Console(highlight=False, soft_wrap=True)
    data = sum(disk.image.data for disk in plan.disks)
    console.print(Text(f"{plan.name}: {plan.decision.action}, {format_bytes(data)} of content, {plan.route} route "))
    for target, size in delta.items():
        console.print(Text(f"  {target}: {'what has changed' if size is None else format_bytes(size)} would be sent"))
    for finding in plan.findings:
        console.print(Text(f"  {finding.severity}: {finding.text}", style=_STYLES[finding.severity]))
        if finding.remedy:
            console.print(Text(f"    {finding.remedy}"))
    for number, step in enumerate(plan.steps, 1):
        console.print(Text(f"  {number}. {describe(step)}"))
    if plan.refusal() is not None:
        console.print(Text("this plan cannot be run", style="bold red"))


def _save(file: Path, saved: Mapping[str, Any]) -> None:
    try:
        # O_NONBLOCK: opening a FIFO would wait for somebody to read it.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(json.dumps(saved, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write the plan to {file}: {error.strerror}", remedy="name another file") from error


def read(file: Path) -> tuple[Request, str]:
    """A saved plan's request, and the digest of the facts that it rests on. Raises UsageError."""
    try:
        saved = json.loads(bounded.read(file, _LARGEST))
        if saved["format"] != FORMAT:
            raise UsageError(f"{file} is a plan of another format", remedy="make it again with --plan-out")
        return _request(saved["request"]), str(saved["facts"])
    except OSError as error:
        raise UsageError(f"cannot read the plan {file}: {error.strerror}", remedy="name a saved plan") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is not a saved plan", remedy="make one with clone --plan-out") from error


def _command(options: Options) -> str:
    return "sync" if isinstance(options, SyncOptions) else "clone"


def _request(saved: Mapping[str, Any]) -> Request:
    """The request. Raises ValueError, KeyError and TypeError for what --plan-out never wrote."""
    kind = SyncOptions if saved["command"] == "sync" else CloneOptions
    if not set(saved["options"]) <= {field.name for field in fields(kind)}:
        raise ValueError("an option that the command does not have")
    made = TypeAdapter(kind).validate_python(saved["options"])
    source, destination, vm = (saved[key] for key in ("source", "destination", "vm"))
    if not all(isinstance(name, str) and name.strip() for name in (source, destination, vm)):
        raise TypeError("a host or a VM without a name")
    return Request(source, destination, vm, made)
