"""Options that clone and sync share, with their help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvm_clone.cli.groups import OptionGroup
from kvm_clone.cli.words import name_argument, name_option
from kvm_clone.errors import UsageError
from kvm_clone.options import Options, Quiesce, Retry, Route
from kvm_clone.settings.config import Settings

HOST_HELP = "An alias from ssh_config, user@host, ssh://user@host:port, or localhost."

Source = Annotated[str, name_argument("SRC", f"The host that has the VM. {HOST_HELP}")]
Vm = Annotated[str, name_argument("VM", "The VM's name. Put -- before one that starts with a dash.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing anywhere.")]
Asked = TypeVar("Asked", bound=Options)


@dataclass(frozen=True)
class Copying(OptionGroup):
    """The options of both clone and sync."""

    pool: Annotated[str | None, name_option("--pool", "The destination's storage pool for new disks.")] = None
    route: Annotated[
        Route | None,
        typer.Option(
            "--route",
            help="direct: the source host connects to the destination; relay: the data passes through this machine.",
        ),
    ] = None
    parallel: Annotated[int | None, typer.Option("--parallel", metavar="N", help="How many disks to copy at once.")] = (
        None
    )
    bandwidth_limit: Annotated[
        str | None,
        typer.Option(
            "--bandwidth-limit", metavar="RATE", help="Limit for all disks together, such as 100M or 1G (MiB/s, GiB/s)."
        ),
    ] = None
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="Time limit for the whole operation, such as 90, 30m or 2h."),
    ] = None
    quiesce: Annotated[
        Quiesce,
        typer.Option(
            "--quiesce", help="Whether to freeze a running guest's filesystems at the point in time that is copied."
        ),
    ] = Quiesce.AUTO
    track: Annotated[
        bool,
        typer.Option("--track", help="Leave a checkpoint on a running source: the next sync sends what changed since."),
    ] = False
    without_saved_state: Annotated[
        bool,
        typer.Option("--without-saved-state", help="Copy the disks of a VM with a managed save, but not its memory."),
    ] = False
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted attempt.")] = False
    keep_partial: Annotated[
        bool, typer.Option("--keep-partial/--no-keep-partial", help="Keep what was copied after an interruption.")
    ] = True
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, help="How often to reconnect after a dropped connection.")
    ] = 3
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another operation on the same VM instead of failing.")
    ] = False
    plan_out: Annotated[
        Path | None, typer.Option("--plan-out", metavar="FILE", help="Save the plan for `kvm-clone apply`.")
    ] = None
    quiet: Quiet = False

    def flags(self, verify: bool | None) -> dict[str, object]:
        """The flags that override settings, by the settings' names."""
        before = {name: getattr(self, name) for name in ("pool", "route", "parallel", "bandwidth_limit", "timeout")}
        return {**before, "verify": verify}

    def asked(self, kind: type[Asked], settings: Settings, given: dict[Retry, bool], **own: Any) -> Asked:
        """The options of the operation. `given`: the retry flags; `own`: the options that only this kind has.

        Raises UsageError.
        """
        return kind(
            pool=settings.pool,
            timeout=settings.timeout_seconds,
            quiesce=self.quiesce,
            track=self.track,
            without_saved_state=self.without_saved_state,
            retry=retry_of({**given, Retry.RESUME: self.resume}),
            retries=self.retries,
            keep_partial=self.keep_partial,
            wait=self.wait,
            **{**asdict(settings.transfer), **own},
        )


def retry_of(given: dict[Retry, bool]) -> Retry:
    """The retry flag that was given, Retry.NONE without one. Raises UsageError for two, which contradict each other."""
    chosen = [retry for retry, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} contradict each other", remedy="give one of them")
    return chosen[0] if chosen else Retry.NONE
