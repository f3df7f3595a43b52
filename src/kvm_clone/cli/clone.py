"""`kvm-clone clone`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer

from kvm_clone.cli import context, options, output, plans, progress
from kvm_clone.cli.words import naming
from kvm_clone.client import Client, Request
from kvm_clone.errors import DomainExistsError
from kvm_clone.options import CloneOptions, Quiesce, Retry, Verify
from kvm_clone.progress import OnEvent
from kvm_clone.results import Result
from kvm_clone.settings.config import Output, Settings
from kvm_clone.units import format_bytes, format_duration, format_rate


def clone_command(
    ctx: typer.Context,
    source: options.Source,
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="The host that gets the clone, named likewise.", callback=naming("DST"))
    ],
    vm: options.Vm,
    new_name: Annotated[
        str | None,
        typer.Option(
            "--new-name",
            metavar="NAME",
            help="The clone's name; by default the VM's own.",
            callback=naming("--new-name"),
        ),
    ] = None,
    preserve_uuid: Annotated[bool, typer.Option("--preserve-uuid", help="Keep the VM's UUID.")] = False,
    preserve_mac: Annotated[bool, typer.Option("--preserve-mac", help="Keep the MAC addresses.")] = False,
    pool: options.Pool = None,
    route: options.RouteOption = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Digest both ends before committing (the default)."),
    ] = None,
    parallel: options.Parallel = None,
    bandwidth_limit: options.BandwidthLimit = None,
    timeout: options.Timeout = None,
    quiesce: options.QuiesceOption = Quiesce.AUTO,
    track: options.Track = False,
    idempotent: Annotated[
        bool,
        typer.Option("--idempotent", help="Succeed if the clone is there and up to date; resume; replace if shut off."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start over; stop and replace what is there.")] = False,
    cleanup_existing: Annotated[
        bool,
        typer.Option("--cleanup-existing", help="Like --force, but remove the existing VM before copying."),
    ] = False,
    resume: options.Resume = False,
    verify_existing: Annotated[
        bool, typer.Option("--verify-existing", help="With --idempotent: digest a clone that seems up to date.")
    ] = False,
    keep_partial: options.KeepPartial = True,
    retries: options.Retries = 3,
    wait: options.Wait = False,
    dry_run: options.DryRun = False,
    plan_out: options.PlanOut = None,
    ssh_config: context.SshConfigOption = None,
    ssh_key: context.SshKeyOption = None,
    ssh_option: context.SshOptionOption = None,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = None,
    log_level: context.LogLevelOption = None,
    config: context.ConfigFileOption = None,
) -> None:
    """Clone a VM, with all its own disks, to another host; one that runs at one consistent point in time.

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
    given = {
        Retry.IDEMPOTENT: idempotent,
        Retry.FORCE: force,
        Retry.CLEANUP_EXISTING: cleanup_existing,
        Retry.RESUME: resume,
    }
    asked = CloneOptions(
        new_name=new_name,
        preserve_uuid=preserve_uuid,
        preserve_mac=preserve_mac,
        pool=settings.pool,
        route=settings.route,
        verify=Verify.FULL if settings.verify else Verify.OFF,
        parallel=settings.parallel,
        bandwidth_limit=settings.bandwidth_bytes_per_second,
        timeout=settings.timeout_seconds,
        quiesce=quiesce,
        track=track,
        retry=options.retry_of(given),
        retries=retries,
        keep_partial=keep_partial,
        wait=wait,
        verify_existing=verify_existing,
    )
    request = Request(source, destination, vm, asked)
    if dry_run or plan_out is not None:
        raise typer.Exit(plans.show(settings, request, plan_out, dry_run=dry_run))
    run_request(settings, request, quiet=quiet)


def run_request(settings: Settings, request: Request, *, quiet: bool, expected: str | None = None) -> None:
    """Clone or sync, and print the result. At a terminal, ask what to do with a VM that is there already.

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
        again = replace(request, options=replace(request.options, retry=retry))
        run_request(settings, again, quiet=quiet, expected=expected)
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


async def _clone(settings: Settings, request: Request, on_event: OnEvent, expected: str | None) -> Result:
    async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
        return await client.run(request, on_event=on_event, expected=expected)


def _print(result: Result) -> None:
    if not result.changed:
        print(f"{result.name} on {result.destination} is there already and up to date ({result.uuid}): nothing to do")
        return
    rate = result.bytes_sent / result.copy_seconds if result.copy_seconds else 0.0
    synced = any(disk.method != "whole" for disk in result.disks)
    done = "brought up to date on" if synced else "cloned to"
    print(f"{result.vm} on {result.source} is {done} {result.destination} as {result.name} ({result.uuid})")
    for disk in result.disks:
        sent = f", {format_bytes(disk.sent)} sent, found by {disk.method}" if disk.method != "whole" else ""
        print(f"  {disk.target}: {disk.destination} ({disk.format}, {format_bytes(disk.virtual_size)}{sent})")
    if result.consistency != "offline":
        frozen = f", its filesystems frozen for {result.frozen_seconds:.2f} s" if result.frozen_seconds else ""
        scratch = format_bytes(result.scratch_bytes)
        print(f"  copied while it ran: {result.consistency}-consistent{frozen}; {scratch} of scratch used")
    if result.hint and not result.hint.startswith("the source is") and synced:
        print(f"  no dirty bitmap was used: {result.hint}")
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
    elif result.proof == Verify.SENT:
        print(f"  what was sent is proven equal in {format_duration(result.prove_seconds)}")
    elif result.verified:
        print(f"  every byte proven equal in {format_duration(result.prove_seconds)}")
    else:
        print("  not verified, as asked with --no-verify")
