"""`kvm-clone apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvm_clone.cli import context, options, plans
from kvm_clone.cli.clone import run_request
from kvm_clone.cli.groups import grouped


@grouped
def apply_command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan that clone or sync saved with --plan-out.")],
    quiet: options.Quiet = False,
    *,
    connecting: context.Connecting,
) -> None:
    """Run a saved plan. It is refused with exit code 3 if the facts that it was made from have changed."""
    settings = connecting.load(ctx)
    request, facts = plans.read(file)
    run_request(settings, request, quiet=quiet, expected=facts)
