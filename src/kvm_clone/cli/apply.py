"""`kvm-clone apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvm_clone.cli import context, plans
from kvm_clone.cli.clone import run_request
from kvm_clone.settings.config import Output


def apply_command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan that --plan-out of clone or sync has saved.")],
    ssh_config: context.SshConfigOption = None,
    ssh_key: context.SshKeyOption = None,
    ssh_option: context.SshOptionOption = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    output_format: Annotated[Output | None, typer.Option("--output", help="json: one result document.")] = None,
    log_level: context.LogLevelOption = None,
    config: context.ConfigFileOption = None,
) -> None:
    """Run a saved plan; refused with exit code 3 if the facts that it rests on have changed."""
    flags = context.connection_flags(ssh_config, ssh_key, ssh_option, output_format, log_level)
    settings = context.load(ctx, config, flags)
    request, facts = plans.read(file)
    run_request(settings, request, quiet=quiet, expected=facts)
