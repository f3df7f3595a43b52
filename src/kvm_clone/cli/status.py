"""`kvm-clone status` and `kvm-clone cleanup`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from kvm_clone.cli import context, output, streams
from kvm_clone.cli.groups import grouped
from kvm_clone.cli.words import name_argument, name_option
from kvm_clone.client import Client
from kvm_clone.errors import ExitCode, KvmCloneError, UsageError
from kvm_clone.results import StagedListing
from kvm_clone.settings.config import Output, Settings
from kvm_clone.units import format_bytes, format_duration, parse_duration
from kvm_clone.upkeep import operation_log
from kvm_clone.upkeep.leftovers import StagedData
from kvm_clone.upkeep.operation_log import Operation

_FOLLOW_SECONDS = 0.5


@grouped
def status_command(
    ctx: typer.Context,
    operation: Annotated[str | None, name_argument("[ID]", "One operation, with its log.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With ID: keep printing until the operation ends.")] = False,
    host: Annotated[
        list[str] | None,
        name_option("--host", "Also list what is staged there. May be repeated.", metavar="HOST"),
    ] = None,
    *,
    connecting: context.Connecting,
) -> None:
    """List this machine's operations and what is staged on hosts: state, age, size, and how to resume it."""
    settings = connecting.load(ctx)
    if operation is not None:
        _show_one(settings, operation, follow=follow)
        return
    listings = context.run(_staged(settings, host or []))
    found = operation_log.operations()
    if settings.output is Output.JSON:
        output.print_json({"operations": [_document(one) for one in found], "hosts": [_host(one) for one in listings]})
    else:
        for one in found:
            print(_line(one))
        for listing in listings:
            _print_host(listing)
    _exit_with_errors(listings)


@grouped
def cleanup_command(
    ctx: typer.Context,
    hosts: Annotated[
        list[str] | None,
        name_argument("[HOST]...", "By default the destinations of this machine's interrupted operations."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="TIME", help="Only what has not changed for this long, such as 7d or 12h."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed.")] = False,
    *,
    connecting: context.Connecting,
) -> None:
    """Remove what interrupted operations have staged on hosts.

    It searches the directories of the hosts' storage pools, and those where this machine's operations staged data.
    Nothing without kvm-clone's mark, and nothing of a running operation, is removed.
    """
    settings = connecting.load(ctx)
    age = _age(older_than)
    named = hosts or sorted({one.destination for one in operation_log.operations() if one.state == operation_log.KEPT})
    listings = context.run(_clean(settings, named, age, dry_run=dry_run))
    if not dry_run:
        _end_logs(listings, everything=older_than is None)
    if settings.output is Output.JSON:
        output.print_json({"dry_run": dry_run, "hosts": [_host(one) for one in listings]})
    else:
        for listing in listings:
            for data in listing.staged:
                done = _prospect(data) if dry_run else listing.done.get(data.path, "left as it is")
                print(f"{data.host}: {data.name or data.path}, {format_bytes(data.size)}: {done}")
            for data in listing.active:
                print(f"{data.host}: {data.name or data.path}: left as it is, its operation is running")
            for name in listing.jobs:
                print(f"{listing.host}: the backup job of {name}: {'would be ended' if dry_run else 'ended'}")
        if not any(listing.staged or listing.jobs for listing in listings):
            print("nothing to remove")
    _exit_with_errors(listings)


def _end_logs(listings: list[StagedListing], *, everything: bool) -> None:
    """Write into this machine's logs which operations can no longer be resumed.

    `everything`: all that is staged in the directories that were searched is in the listings, whatever its age.
    """
    kept = [one for one in operation_log.operations() if one.state == operation_log.KEPT]
    for listing in listings:
        for one in kept:
            if one.destination == listing.host:
                end = _end_of(one, listing, everything=everything)
                if end is not None:
                    operation_log.end(one.operation, operation_log.FAILED, f"cleaned up: {end}")


def _end_of(one: Operation, listing: StagedListing, *, everything: bool) -> str | None:
    """Why an operation can no longer be resumed after a cleanup of its destination, None if it may still be.

    Warns about an operation whose staged data may lie where the cleanup did not look.
    """
    found = [data for data in (*listing.staged, *listing.active) if data.operation == one.operation]
    if found:
        done = [listing.done[data.path] for data in found if data.path in listing.done and not data.foreign]
        return "; ".join(done) or None
    if not everything or listing.errors:
        return None
    if one.directories:
        return f"nothing of it is staged in {', '.join(one.directories)}"
    print(
        f"kvm-clone: nothing of operation {one.operation} ({one.vm} as {one.name}) is staged in the directories of "
        f"{listing.host}'s storage pools; its log does not say where else it may be\n"
        f"  what to do: {_command(one)} --resume finishes it, --force instead of --resume discards it",
        file=sys.stderr,
    )
    return None


def _age(text: str | None) -> float:
    try:
        return parse_duration(text) if text is not None else 0.0
    except ValueError as error:
        raise UsageError(f"--older-than {text}: {error}", remedy="write 7d, 12h or 30m") from None


async def _staged(settings: Settings, hosts: list[str]) -> list[StagedListing]:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.staged(hosts)


async def _clean(settings: Settings, hosts: list[str], age: float, *, dry_run: bool) -> list[StagedListing]:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.cleanup(hosts, older_than=age, dry_run=dry_run)


def _show_one(settings: Settings, name: str, *, follow: bool) -> None:
    one = _known(name)
    if settings.output is Output.JSON:
        output.print_json({**_document(one), "log": list(one.entries)})
        return
    print(_line(one))
    shown = 0
    while True:
        for entry in one.entries[shown:]:
            print(_entry(entry), flush=True)
        shown = len(one.entries)
        if not follow or one.state != operation_log.RUNNING or not streams.has_reader():
            return
        time.sleep(_FOLLOW_SECONDS)
        one = _known(name)


def _known(name: str) -> Operation:
    if not operation_log.is_name(name):
        text = f"{name!r} is no operation: the name of one is 12 hexadecimal digits, in lower case"
        raise UsageError(text, subject=name, remedy="see them all: kvm-clone status")
    one = operation_log.read(name)
    if one is None:
        raise UsageError(f"this machine knows no operation {name}", remedy="see them all: kvm-clone status")
    return one


def _line(one: Operation) -> str:
    age = format_duration(max(0.0, time.time() - one.changed))
    text = f"{one.operation}  {one.state}, {age} ago: {one.vm} from {one.source} to {one.destination} as {one.name}"
    if one.state == operation_log.KEPT:
        text += f"; resume it: {_command(one)} --resume"
    return text


def _command(one: Operation) -> str:
    return f"kvm-clone {one.command} {one.source} {one.destination} {one.vm}{_named(one)}"


def _named(one: Operation) -> str:
    if one.name == one.vm:
        return ""
    return f" {'--target-name' if one.command == 'sync' else '--new-name'} {one.name}"


def _entry(entry: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(entry["time"], UTC).astimezone().isoformat(sep=" ", timespec="seconds")
    what = {
        "begin": lambda: f"begin {entry.get('action', '')}",
        "step": lambda: f"{entry['step']}: {entry['result']} after {entry['seconds']} s",
        "end": lambda: f"{entry['state']} {entry['text']}".rstrip(),
    }
    return f"  {when}  {what.get(entry.get('event', ''), lambda: str(entry))()}"


def _document(one: Operation) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key not in ("entries", "directories")}


def _host(listing: StagedListing) -> dict[str, Any]:
    staged = [{**asdict(data), "done": listing.done.get(data.path, "")} for data in listing.staged]
    errors = [output.error_document(error) for error in listing.errors]
    return {"host": listing.host, "staged": staged, "jobs": list(listing.jobs), "errors": errors}


def _print_host(listing: StagedListing) -> None:
    for data in listing.staged:
        print(_staged_line(data))
    for name in listing.jobs:
        print(f"{listing.host}: the backup job of {name} has no reader; end it: kvm-clone cleanup {listing.host}")
    if not (listing.staged or listing.jobs or listing.errors):
        print(f"{listing.host}: nothing staged")


def _staged_line(data: StagedData) -> str:
    if data.error:
        return f"{data.host}: {data.path}: {data.error}"
    state = "running" if data.active else "interrupted"
    state += f" on {data.foreign}" if data.foreign else ""
    text = f"{data.host}: {data.name} from {data.source}, {state}, {format_duration(data.age)} old"
    if data.foreign:
        return f"{text}, in {data.directory}, which both hosts see; it is left to {data.foreign}"
    drop = "" if data.active else f"; resume it with {data.kind} --resume, or discard it: kvm-clone cleanup {data.host}"
    return f"{text}, {format_bytes(data.size)} staged in {data.directory}{drop}"


def _prospect(data: StagedData) -> str:
    """What a cleanup would do, as far as that is known without asking libvirt."""
    if data.error:
        return f"would be left as it is: {data.error}"
    if data.foreign:
        return f"would be left to {data.foreign}, whose operation it is"
    return "would be left as it is: its operation is running" if data.active else "would be removed"


def _exit_with_errors(listings: list[StagedListing]) -> None:
    errors: list[KvmCloneError] = [error for listing in listings for error in listing.errors]
    for error in errors:
        output.report(error, as_json=False)
    if errors:
        codes = {error.exit_code for error in errors}
        raise typer.Exit(codes.pop() if len(codes) == 1 else ExitCode.CONNECT)
