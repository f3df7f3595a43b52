"""`kvm-clone clone`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from kvm_clone.api import Client, CloneResult, Request
from kvm_clone.cli import context, output, plans, progress
from kvm_clone.config import Output, Settings
from kvm_clone.errors import DomainExistsError, UsageError
from kvm_clone.options import CloneOptions, Retry, Route
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
    idempotent: Annotated[
        bool,
        typer.Option("--idempotent", help="Succeed if the clone is there and up to date; resume; replace if shut off."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start over; stop and replace what is there.")] = False,
    cleanup_existing: Annotated[
        bool,
        typer.Option("--cleanup-existing", help="Like --force, but remove the existing VM before copying."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted attempt.")] = False,
    verify_existing: Annotated[
        bool, typer.Option("--verify-existing", help="With --idempotent: digest a clone that seems up to date.")
    ] = False,
    keep_partial: Annotated[
        bool, typer.Option("--keep-partial/--no-keep-partial", help="Keep what was copied after an interruption.")
    ] = True,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, help="How often a dropped connection is taken up again.")
    ] = 3,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another operation on the same VM.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing anywhere.")] = False,
    plan_out: Annotated[
        Path | None, typer.Option("--plan-out", metavar="FILE", help="Save the plan for `kvm-clone apply`.")
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

    The destination is as before until every disk is proven equal to the source's. An interruption keeps what was
    copied, for --resume or --idempotent to go on with; a failure that no retry can mend is rolled back.
    """
    flags: dict[str, object] = {
        "pool": pool,
        "route": route,
        "verify": verify,
        "parallel": parallel,
        "bandwidth_limit": bandwidth_limit,
        "timeout": timeout,
        **context.connection_flags(ssh_config, ssh_key, ssh_option, output_format, log_level),
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
        retry=_retry(idempotent, force, cleanup_existing, resume),
        retries=retries,
        keep_partial=keep_partial,
        wait=wait,
        verify_existing=verify_existing,
    )
    request = Request(source, destination, vm, options)
    if dry_run or plan_out is not None:
        raise typer.Exit(plans.show(settings, request, plan_out, dry_run=dry_run))
    run_clone(settings, request, quiet=quiet)


def _retry(idempotent: bool, force: bool, cleanup_existing: bool, resume: bool) -> Retry:
    given = {
        Retry.IDEMPOTENT: idempotent,
        Retry.FORCE: force,
        Retry.CLEANUP_EXISTING: cleanup_existing,
        Retry.RESUME: resume,
    }
    chosen = [retry for retry, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} contradict each other", remedy="give one of them")
    return chosen[0] if chosen else Retry.NONE


def run_clone(settings: Settings, request: Request, *, quiet: bool, expected: str | None = None) -> None:
    """Clone, and print the result. At a terminal, ask what to do with a VM that is there already.

    `expected`: the digest of the facts that a saved plan rests on.
    """
    try:
        with progress.watcher(quiet=quiet) as on_event:
            result = context.run(_clone(settings, request, on_event, expected))
    except DomainExistsError as error:
        retry = _ask(error) if request.options.retry is Retry.NONE else None
        if retry is None:
            raise
        if retry is Retry.NONE:
            print("skipped", file=sys.stderr)
            return
        run_clone(settings, replace(request, options=replace(request.options, retry=retry)), quiet=quiet)
        return
    if settings.output is Output.JSON:
        output.print_json(asdict(result))
    else:
        _print(result)


def _ask(error: DomainExistsError) -> Retry | None:
    """What the user at the terminal wants; None to abort, which is also the answer where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    output.report(error, as_json=False)
    answers = {"s": Retry.NONE, "c": Retry.FORCE, "r": Retry.RESUME}
    text = "[s]kip, [c]lean up and retry, [r]esume if possible, [A]bort? "
    print(text, end="", file=sys.stderr, flush=True)
    return answers.get(sys.stdin.readline().strip().lower()[:1])


async def _clone(settings: Settings, request: Request, on_event: OnEvent, expected: str | None) -> CloneResult:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.run(request, on_event=on_event, expected=expected)


def _print(result: CloneResult) -> None:
    if not result.changed:
        print(f"{result.name} on {result.destination} is there already and up to date ({result.uuid}): nothing to do")
        return
    rate = result.bytes_sent / result.copy_seconds if result.copy_seconds else 0.0
    print(f"{result.vm} on {result.source} is cloned to {result.destination} as {result.name} ({result.uuid})")
    for disk in result.disks:
        print(f"  {disk.target}: {disk.destination} ({disk.format}, {format_bytes(disk.virtual_size)})")
    if result.bytes_reused:
        print(
            f"  {format_bytes(result.bytes_reused)} were there already, {format_bytes(result.bytes_resent)} sent again"
        )
    for thing in result.removed:
        print(f"  removed: {thing}")
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
