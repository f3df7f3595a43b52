"""`kvm-clone clone`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from kvm_clone.api import Client, CloneResult
from kvm_clone.cli import context, output, progress
from kvm_clone.config import Output, Settings
from kvm_clone.options import CloneOptions, Route
from kvm_clone.progress import OnEvent
from kvm_clone.units import format_bytes, format_duration, format_rate

HOST_HELP = "An alias from ssh_config, user@host, ssh://user@host:port, or localhost."


def clone_command(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"The host that has the VM. {HOST_HELP}")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The host that gets the clone, named likewise.")],
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM's name. Put -- before one that starts with a dash.")],
    new_name: Annotated[
        str | None,
        typer.Option("--new-name", metavar="NAME", help="The clone's name; by default the VM's own."),
    ] = None,
    preserve_uuid: Annotated[bool, typer.Option("--preserve-uuid", help="Keep the VM's UUID.")] = False,
    preserve_mac: Annotated[bool, typer.Option("--preserve-mac", help="Keep the MAC addresses.")] = False,
    pool: Annotated[
        str | None,
        typer.Option("--pool", metavar="NAME", help="The destination's storage pool for the new disks."),
    ] = None,
    route: Annotated[
        Route | None,
        typer.Option("--route", help="direct: the source host connects to the destination; relay: through here."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Digest both ends before committing (the default)."),
    ] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", metavar="N", help="Disks at once.")] = None,
    bandwidth_limit: Annotated[
        str | None,
        typer.Option("--bandwidth-limit", metavar="RATE", help="For all disks together: 100M or 1G (MiB/s, GiB/s)."),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="TIME", help="For the whole operation: 90, 30m, 2h.")
    ] = None,
    ssh_config: context.SshConfigOption = None,
    ssh_key: context.SshKeyOption = None,
    ssh_option: context.SshOptionOption = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    output_format: Annotated[
        Output | None,
        typer.Option("--output", help="json: one result document on stdout, and nothing else there."),
    ] = None,
    log_level: context.LogLevelOption = None,
    config: context.ConfigFileOption = None,
) -> None:
    """Clone a VM that is shut off, with all its own disks, to another host.

    The destination is as before until every disk is proven equal to the source's; any failure rolls everything back.
    """
    flags: dict[str, object] = {
        "pool": pool,
        "route": route,
        "verify": verify,
        "parallel": parallel,
        "bandwidth_limit": bandwidth_limit,
        "timeout": timeout,
        "ssh_config_path": ssh_config,
        "ssh_key_path": ssh_key,
        "ssh_options": ssh_option or None,
        "output": output_format,
        "log_level": log_level,
    }
    settings = context.load(ctx, config, flags)
    options = CloneOptions(
        new_name=new_name,
        preserve_uuid=preserve_uuid,
        preserve_mac=preserve_mac,
        pool=settings.pool,
        route=settings.route,
        verify=settings.verify,
        parallel=settings.parallel,
        bandwidth_limit=settings.bandwidth_bytes_per_second,
        timeout=settings.timeout_seconds,
    )
    with progress.watcher(quiet=quiet) as on_event:
        result = context.run(_clone(settings, source, destination, vm, options, on_event))
    if settings.output is Output.JSON:
        output.print_json(asdict(result))
    else:
        _print(result)


async def _clone(
    settings: Settings, source: str, destination: str, vm: str, options: CloneOptions, on_event: OnEvent
) -> CloneResult:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.clone(source, destination, vm, options, on_event=on_event)


def _print(result: CloneResult) -> None:
    rate = result.bytes_sent / result.copy_seconds if result.copy_seconds else 0.0
    print(f"{result.vm} on {result.source} is cloned to {result.destination} as {result.name} ({result.uuid})")
    for disk in result.disks:
        print(f"  {disk.target}: {disk.destination} ({disk.format}, {format_bytes(disk.virtual_size)})")
    print(
        f"  {format_bytes(result.bytes_sent)} sent in {format_duration(result.copy_seconds)} ({format_rate(rate)}), "
        f"{result.route} route: {result.route_reason}"
    )
    if not result.disks:
        print("  the VM has no disks of its own")
    elif result.verified:
        print(f"  every byte proven equal in {format_duration(result.prove_seconds)}")
    else:
        print("  not verified, as asked with --no-verify")
