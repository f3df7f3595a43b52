"""`kvm-clone list`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvm_clone.cli import context, output
from kvm_clone.cli.groups import grouped
from kvm_clone.cli.options import HOST_HELP
from kvm_clone.cli.words import name_argument
from kvm_clone.client import Client
from kvm_clone.errors import ExitCode, UsageError
from kvm_clone.hosts.domains import STATES, DiskUse, Listed
from kvm_clone.results import HostListing
from kvm_clone.settings.config import Output, Settings
from kvm_clone.units import format_bytes

_COLUMNS = ("host", "name", "state", "vCPUs", "memory", "disks (virtual, allocated)")


@grouped
def list_command(
    ctx: typer.Context,
    hosts: Annotated[list[str], name_argument("HOST...", HOST_HELP)],
    state: Annotated[
        str | None, typer.Option("--state", help="Only VMs in this state, such as running or shut-off.")
    ] = None,
    *,
    connecting: context.Connecting,
) -> None:
    """List the VMs of several hosts, which are asked at the same time.

    A host that cannot be asked is listed with its error, which sets the exit code. The others are still listed.
    """
    wanted = _state(state)
    settings = connecting.load(ctx)
    listings = context.run(_list(settings, hosts))
    if settings.output is Output.JSON:
        output.print_json({"hosts": [_document(listing, wanted) for listing in listings]})
    else:
        _print(listings, wanted)
    failed = [listing.error for listing in listings if listing.error is not None]
    for error in failed:
        output.report(error, as_json=False)
    if failed:
        raise typer.Exit(max(error.exit_code for error in failed if error) if len(failed) == 1 else ExitCode.CONNECT)


def _state(text: str | None) -> str | None:
    if text is None:
        return None
    wanted = text.replace("-", " ").replace("_", " ").lower()
    wanted = {"shutoff": "shut off", "stopped": "shut off"}.get(wanted, wanted)
    if wanted not in STATES.values():
        known = ", ".join(sorted(set(STATES.values())))
        raise UsageError(f"{text!r} is no state of a VM", remedy=f"name one of: {known}")
    return wanted


async def _list(settings: Settings, hosts: list[str]) -> list[HostListing]:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.list_vms(hosts)


def _shown(listing: HostListing, wanted: str | None) -> list[Listed]:
    return [vm for vm in listing.vms if wanted is None or vm.state == wanted]


def _document(listing: HostListing, wanted: str | None) -> dict[str, Any]:
    document: dict[str, Any] = {"host": listing.host, "vms": [asdict(vm) for vm in _shown(listing, wanted)]}
    if listing.error is not None:
        document["error"] = output.error_document(listing.error)
    return document


def _print(listings: list[HostListing], wanted: str | None) -> None:
    rows = []
    for listing in listings:
        if listing.error is not None:
            rows.append((listing.host, "-", f"error: {listing.error}", "-", "-", "-"))
        rows += [
            (
                vm.host,
                vm.name,
                vm.state,
                str(vm.vcpus),
                format_bytes(vm.memory),
                "; ".join(map(_disk, vm.disks)),
            )
            for vm in _shown(listing, wanted)
        ]
    if sys.stdout.isatty():
        table = Table(*_COLUMNS)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _disk(disk: DiskUse) -> str:
    if disk.virtual_size is None or disk.allocated is None:
        return f"{disk.target} unknown"
    return f"{disk.target} {format_bytes(disk.virtual_size)}, {format_bytes(disk.allocated)}"
