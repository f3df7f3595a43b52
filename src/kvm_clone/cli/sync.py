"""`kvm-clone sync`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvm_clone.cli import context, options, output
from kvm_clone.cli.clone import carry_out
from kvm_clone.cli.groups import grouped
from kvm_clone.cli.words import name_argument, name_option
from kvm_clone.client import Client, Request
from kvm_clone.errors import UsageError
from kvm_clone.options import Retry, SyncOptions, Verify
from kvm_clone.settings.config import Output, Settings


@grouped
def sync_command(
    ctx: typer.Context,
    source: options.Source,
    destination: Annotated[str, name_argument("DST", "The host that has the replica, in the same form.")],
    vm: options.Vm,
    target_name: Annotated[
        str | None, name_option("--target-name", "The replica's name; by default the VM's own.")
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Clone the VM if there is no replica yet.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Compare digests of what was sent (the default); --verify full: of everything."
        ),
    ] = None,
    verify_full: Annotated[bool, typer.Option("--verify-full", hidden=True)] = False,
    untrack: Annotated[
        bool, typer.Option("--untrack", help="Only remove kvm-clone's checkpoints for this replica from the source.")
    ] = False,
    idempotent: Annotated[
        bool, typer.Option("--idempotent", help="Resume an interrupted sync if there is one.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Discard an interrupted sync; overwrite a replica that was used; stop one that runs."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and how much would be sent; change nothing anywhere.")
    ] = False,
    *,
    copying: options.Copying,
    connecting: context.Connecting,
) -> None:
    """Update a replica that clone made to its source's state, and send only what has changed.

    The replica does not change until all changes have arrived and are proven; one step then commits them. A replica
    that was started or changed since the last sync is refused without --force.
    """
    settings = connecting.load(ctx, copying.flags(True if verify_full else verify))
    if verify is False and verify_full:
        raise UsageError("--verify full and --no-verify contradict each other", remedy="give one of them")
    proof = Verify.FULL if verify_full else Verify.SENT if settings.verify else Verify.OFF
    given = {Retry.IDEMPOTENT: idempotent, Retry.FORCE: force}
    asked = copying.asked(SyncOptions, settings, given, target_name=target_name, create=create, verify=proof)
    request = Request(source, destination, vm, asked)
    if not untrack:
        carry_out(settings, request, copying, dry_run=dry_run)
        return
    for other, wanted in {"--track": copying.track, "--dry-run": dry_run, "--plan-out": copying.plan_out}.items():
        if wanted:
            raise UsageError(f"{other} and --untrack contradict each other", remedy="give one of them")
    _untrack(settings, request)


def split_verify(argv: list[str]) -> list[str]:
    """The command line with `--verify full` as one word: Typer has no option whose value may be left out."""
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
