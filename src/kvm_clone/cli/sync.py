"""`kvm-clone sync`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvm_clone.cli import context, options, output, plans
from kvm_clone.cli.clone import run_request
from kvm_clone.cli.words import naming
from kvm_clone.client import Client, Request
from kvm_clone.errors import UsageError
from kvm_clone.options import Quiesce, Retry, SyncOptions, Verify
from kvm_clone.settings.config import Output, Settings


def sync_command(
    ctx: typer.Context,
    source: options.Source,
    destination: Annotated[
        str,
        typer.Argument(metavar="DST", help="The host that has the replica, named likewise.", callback=naming("DST")),
    ],
    vm: options.Vm,
    target_name: Annotated[
        str | None,
        typer.Option(
            "--target-name",
            metavar="NAME",
            help="The replica's name; by default the VM's own.",
            callback=naming("--target-name"),
        ),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Clone the VM where there is no replica yet.")] = False,
    pool: options.Pool = None,
    route: options.RouteOption = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Digest what was sent at both ends (the default); --verify full: everything."
        ),
    ] = None,
    verify_full: Annotated[bool, typer.Option("--verify-full", hidden=True)] = False,
    parallel: options.Parallel = None,
    bandwidth_limit: options.BandwidthLimit = None,
    timeout: options.Timeout = None,
    quiesce: options.QuiesceOption = Quiesce.AUTO,
    track: options.Track = False,
    untrack: Annotated[
        bool, typer.Option("--untrack", help="Remove our checkpoints for this replica from the source; do no more.")
    ] = False,
    idempotent: Annotated[bool, typer.Option("--idempotent", help="Go on with an interrupted sync, if any.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over; overwrite a replica that was used, stop one that runs.")
    ] = False,
    resume: options.Resume = False,
    keep_partial: options.KeepPartial = True,
    retries: options.Retries = 3,
    wait: options.Wait = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and how much would be sent; change nothing anywhere.")
    ] = False,
    plan_out: options.PlanOut = None,
    ssh_config: context.SshConfigOption = None,
    ssh_key: context.SshKeyOption = None,
    ssh_option: context.SshOptionOption = None,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = None,
    log_level: context.LogLevelOption = None,
    config: context.ConfigFileOption = None,
) -> None:
    """Bring a replica, made by clone, to its source's state by sending only what has changed.

    The replica is as before until everything that changed is there and proven; then one step makes it new. Whether it
    was started or changed since the last sync is checked first.
    """
    flags: dict[str, object] = {
        "pool": pool,
        "route": route,
        "verify": True if verify_full else verify,
        "parallel": parallel,
        "bandwidth_limit": bandwidth_limit,
        "timeout": timeout,
        **context.connection_flags(ssh_config, ssh_key, ssh_option, output_format, log_level),
    }
    settings = context.load(ctx, config, flags)
    if verify is False and verify_full:
        raise UsageError("--verify full and --no-verify contradict each other", remedy="give one of them")
    proof = Verify.FULL if verify_full else Verify.SENT if settings.verify else Verify.OFF
    given = {Retry.IDEMPOTENT: idempotent, Retry.FORCE: force, Retry.RESUME: resume}
    asked = SyncOptions(
        target_name=target_name,
        create=create,
        pool=settings.pool,
        route=settings.route,
        verify=proof,
        parallel=settings.parallel,
        bandwidth_limit=settings.bandwidth_bytes_per_second,
        timeout=settings.timeout_seconds,
        quiesce=quiesce,
        track=track,
        retry=options.retry_of(given),
        retries=retries,
        keep_partial=keep_partial,
        wait=wait,
    )
    request = Request(source, destination, vm, asked)
    if untrack:
        for other, wanted in {"--track": track, "--dry-run": dry_run, "--plan-out": plan_out is not None}.items():
            if wanted:
                raise UsageError(f"{other} and --untrack contradict each other", remedy="give one of them")
        _untrack(settings, request)
    elif dry_run or plan_out is not None:
        raise typer.Exit(plans.show(settings, request, plan_out, dry_run=dry_run))
    else:
        run_request(settings, request, quiet=quiet)


def split_verify(argv: list[str]) -> list[str]:
    """The command line with `--verify full` as one word: an option whose value may be left out is none of Typer's."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            return [*words, word, *rest]
        is_sync = "sync" in words
        if word == "full" and is_sync and words[-1] == "--verify":
            words[-1] = "--verify-full"
        else:
            words.append("--verify-full" if word == "--verify=full" and is_sync else word)
    return words


def _untrack(settings: Settings, request: Request) -> None:
    async def work() -> list[str]:
        async with Client(context.ssh_options(settings), interactive=sys.stdin.isatty()) as client:
            return await client.untrack(request)

    removed = context.run(work())
    if settings.output is Output.JSON:
        output.print_json({"vm": request.vm, "removed": removed})
    elif removed:
        print(f"removed from {request.vm} on {request.source}: {', '.join(removed)}")
    else:
        print(f"{request.vm} on {request.source} has no checkpoint for this replica")
