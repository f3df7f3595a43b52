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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan that --plan-out of clone or sync has saved.")],
    quiet: options.Quiet = False,
    *,
    connecting: context.Connecting,
) -> None:
    """Run a saved plan; refused with exit code 3 if the facts that it rests on have changed."""
    settings = connecting.load(ctx)
    request, facts = plans.read(file)
    run_request(settings, request, quiet=quiet, expected=facts)
