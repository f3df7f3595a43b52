"""Options that clone and sync share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvm_clone.cli.words import naming
from kvm_clone.errors import UsageError
from kvm_clone.options import Quiesce, Retry, Route
from kvm_clone.settings.config import Output

HOST_HELP = "An alias from ssh_config, user@host, ssh://user@host:port, or localhost."

Source = Annotated[
    str, typer.Argument(metavar="SRC", help=f"The host that has the VM. {HOST_HELP}", callback=naming("SRC"))
]
Vm = Annotated[
    str,
    typer.Argument(
        metavar="VM", help="The VM's name. Put -- before one that starts with a dash.", callback=naming("VM")
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        "--pool", metavar="NAME", help="The destination's storage pool for new disks.", callback=naming("--pool")
    ),
]
RouteOption = Annotated[
    Route | None,
    typer.Option("--route", help="direct: the source host connects to the destination; relay: through here."),
]
Parallel = Annotated[int | None, typer.Option("--parallel", metavar="N", help="Disks at once.")]
BandwidthLimit = Annotated[
    str | None,
    typer.Option("--bandwidth-limit", metavar="RATE", help="For all disks together: 100M or 1G (MiB/s, GiB/s)."),
]
Timeout = Annotated[str | None, typer.Option("--timeout", metavar="TIME", help="For the whole operation: 90, 30m, 2h.")]
QuiesceOption = Annotated[
    Quiesce,
    typer.Option("--quiesce", help="Freeze a running guest's filesystems for the instant that is copied."),
]
Track = Annotated[
    bool,
    typer.Option("--track", help="Leave a checkpoint on a running source: the next sync sends what changed since."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted attempt.")]
KeepPartial = Annotated[
    bool, typer.Option("--keep-partial/--no-keep-partial", help="Keep what was copied after an interruption.")
]
Retries = Annotated[
    int, typer.Option("--retries", metavar="N", min=0, help="How often a dropped connection is taken up again.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another operation on the same VM.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing anywhere.")]
PlanOut = Annotated[
    Path | None, typer.Option("--plan-out", metavar="FILE", help="Save the plan for `kvm-clone apply`.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
OutputFormat = Annotated[
    Output | None, typer.Option("--output", help="json: one result document on stdout, and nothing else there.")
]


def retry_of(given: dict[Retry, bool]) -> Retry:
    """The one retry flag that was given. Raises UsageError for two that contradict each other."""
    chosen = [retry for retry, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} contradict each other", remedy="give one of them")
    return chosen[0] if chosen else Retry.NONE
