"""`kvm-clone clone`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from kvm_clone.cli import context, options, output, plans, progress
from kvm_clone.cli.groups import grouped
from kvm_clone.cli.words import name_argument, name_option
from kvm_clone.client import Client, Request
from kvm_clone.errors import DomainExistsError
from kvm_clone.options import CloneOptions, Retry, Verify
from kvm_clone.progress import OnEvent
from kvm_clone.results import Result
from kvm_clone.settings.config import Output, Settings
from kvm_clone.units import format_bytes, format_duration, format_rate


@grouped
def clone_command(
    ctx: typer.Context,
    source: options.Source,
    destination: Annotated[str, name_argument("DST", "The host that receives the clone, in the same form.")],
    vm: options.Vm,
    new_name: Annotated[str | None, name_option("--new-name", "The clone's name; by default the VM's own.")] = None,
    preserve_uuid: Annotated[bool, typer.Option("--preserve-uuid", help="Keep the VM's UUID.")] = False,
    preserve_mac: Annotated[bool, typer.Option("--preserve-mac", help="Keep the MAC addresses.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Compare digests of both ends before the commit (the default)."),
    ] = None,
    idempotent: Annotated[
        bool,
        typer.Option("--idempotent", help="Do what is left to do: nothing, resume, or replace a VM that is shut off."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Discard an interrupted attempt; stop and replace a VM.")
    ] = False,
    cleanup_existing: Annotated[
        bool,
        typer.Option("--cleanup-existing", help="Like --force, but remove the existing VM before copying."),
    ] = False,
    verify_existing: Annotated[
        bool,
        typer.Option("--verify-existing", help="With --idempotent: compare digests of a clone that seems up to date."),
    ] = False,
    dry_run: options.DryRun = False,
    *,
    copying: options.Copying,
    connecting: context.Connecting,
) -> None:
    """Clone a VM with all its own disks to another host. A running VM is copied at one point in time.

    The destination does not change until every disk is proven equal to the source's. After an interruption, --resume
    or --idempotent continues with what was copied. A failure that a retry cannot mend is rolled back.
    """
    settings = connecting.load(ctx, copying.flags(verify))
    given = {Retry.IDEMPOTENT: idempotent, Retry.FORCE: force, Retry.CLEANUP_EXISTING: cleanup_existing}
    asked = copying.asked(
        CloneOptions,
        settings,
        given,
        new_name=new_name,
        preserve_uuid=preserve_uuid,
        preserve_mac=preserve_mac,
        verify_existing=verify_existing,
    )
    carry_out(settings, Request(source, destination, vm, asked), copying, dry_run=dry_run)


def carry_out(settings: Settings, request: Request, copying: options.Copying, *, dry_run: bool) -> None:
    """Clone or sync; or print or save the plan if a flag asks for that. Raises typer.Exit with a dry run's code."""
    if dry_run or copying.plan_out is not None:
        raise typer.Exit(plans.show(settings, request, copying.plan_out, dry_run=dry_run))
    run_request(settings, request, quiet=copying.quiet)


def run_request(settings: Settings, request: Request, *, quiet: bool, expected: str | None = None) -> None:
    """Clone or sync, and print the result. At a terminal, ask what to do with a VM that exists already.

    `expected`: the digest of the facts that a saved plan was made from.
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
        output.print_json(output.result_document(result))
    else:
        _print(result)


def _ask(error: DomainExistsError) -> Retry | None:
    """The user's answer; None to abort, and where stdin or stderr is no terminal."""
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
    transfer, point = result.transfer, result.point_in_time
    rate = transfer.bytes_sent / transfer.copy_seconds if transfer.copy_seconds else 0.0
    synced = any(disk.method != "whole" for disk in result.disks)
    done = "brought up to date on" if synced else "cloned to"
    print(f"{result.vm} on {result.source} is {done} {result.destination} as {result.name} ({result.uuid})")
    for disk in result.disks:
        sent = f", {format_bytes(disk.sent)} sent, found by {disk.method}" if disk.method != "whole" else ""
        print(f"  {disk.target}: {disk.destination} ({disk.format}, {format_bytes(disk.virtual_size)}{sent})")
    if point.consistency != "offline":
        frozen = f", its filesystems frozen for {point.frozen_seconds:.2f} s" if point.frozen_seconds else ""
        scratch = f"; {format_bytes(point.scratch_bytes)} of scratch used" if point.scratch_bytes else ""
        print(f"  the copy is {point.consistency}-consistent{frozen}{scratch}")
    if point.no_bitmap_reason and not point.no_bitmap_reason.startswith("the source is") and synced:
        print(f"  no dirty bitmap was used: {point.no_bitmap_reason}")
    if transfer.bytes_reused:
        there, again = format_bytes(transfer.bytes_reused), format_bytes(transfer.bytes_resent)
        print(f"  {there} were there already, {again} sent again")
    for thing in result.removed:
        print(f"  removed: {thing}")
    sent, took = format_bytes(transfer.bytes_sent), format_duration(transfer.copy_seconds)
    print(f"  {sent} sent in {took} ({format_rate(rate)}), {transfer.route} route: {transfer.route_reason}")
    if not result.disks:
        print("  the VM has no disks of its own")
    elif result.proof == Verify.SENT:
        print(f"  what was sent is proven equal in {format_duration(transfer.prove_seconds)}")
    elif result.verified:
        print(f"  every byte proven equal in {format_duration(transfer.prove_seconds)}")
    else:
        print("  not verified, as asked with --no-verify")
