"""The command line: argv in; text, JSON and exit codes out. The only place that prints and exits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from kvm_clone.cli import context, output, streams
from kvm_clone.cli.apply import apply_command
from kvm_clone.cli.clone import clone_command
from kvm_clone.cli.config import config_app
from kvm_clone.cli.context import Context
from kvm_clone.cli.listing import list_command
from kvm_clone.cli.status import cleanup_command, status_command
from kvm_clone.cli.sync import split_verify, sync_command
from kvm_clone.errors import ExitCode, KvmCloneError
from kvm_clone.settings.config import Output
from kvm_clone.version import __version__


class _Commands(TyperGroup):
    """The group of all commands. Exceptions that Typer would report in its own way leave it as other ones."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise context.InterruptedByUserError("stopped by Ctrl-C") from None
        except BrokenPipeError as error:  # not from stdout or stderr, whose writes never raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


app = typer.Typer(
    name="kvm-clone",
    cls=_Commands,
    help="Clone KVM/libvirt virtual machines between hosts over SSH. The source is never modified. The destination "
    "does not change until the clone is proven equal. An interrupted operation can be resumed.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 refused before starting, 4 the destination VM exists, 5 cannot "
    "connect or authenticate, 6 interrupted or transfer failed, 7 verification mismatch, 8 another operation holds "
    "the lock, 9 done, but the result could not be written, 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    "clone",
    epilog="Examples:\n\nkvm-clone clone host-a host-b web\n\n"
    "kvm-clone clone root@10.0.0.1 ssh://root@10.0.0.2:2222 web --new-name web-copy --bandwidth-limit 100M\n\n"
    "kvm-clone clone localhost host-b -- '-odd name'",
)(clone_command)
app.command(
    "sync",
    epilog="Examples:\n\nkvm-clone sync host-a host-b web\n\n"
    "kvm-clone sync host-a host-b web --create --track --quiesce require\n\n"
    "kvm-clone sync host-a host-b web --dry-run",
)(sync_command)
app.command(
    "list",
    epilog="Examples:\n\nkvm-clone list host-a host-b\n\nkvm-clone list host-a --state running --output json",
)(list_command)
app.command("apply", epilog="Examples:\n\nkvm-clone apply web.plan")(apply_command)
app.command(
    "status",
    epilog="Examples:\n\nkvm-clone status\n\nkvm-clone status 1b4222938b00 --follow\n\nkvm-clone status --host host-b",
)(status_command)
app.command(
    "cleanup",
    epilog="Examples:\n\nkvm-clone cleanup host-b --dry-run\n\nkvm-clone cleanup host-b --older-than 7d",
)(cleanup_command)
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvm-clone {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The configuration file, instead of the usual one."),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Store the options that all commands share."""
    ctx.ensure_object(Context).config_path = config


def main() -> NoReturn:
    """Run the command line and exit with a documented code."""
    streams.speak_utf8()
    streams.own()
    code = _run(Context())
    failure = streams.failure()
    if failure is not None and code == ExitCode.DONE:
        code = ExitCode.OUTPUT
        output.report(output.lost(failure), as_json=False)
    sys.exit(code)


def _run(shared: Context) -> int:
    """Run the command line, report its error if there is one, and return the exit code."""
    try:
        app(split_verify(sys.argv[1:]), prog_name="kvm-clone", obj=shared)
    except KvmCloneError as error:
        output.report(error, as_json=_json_wanted(shared))
        return error.exit_code
    except SystemExit as end:
        not_understood = end.code == ExitCode.USAGE and shared.output is None
        if not_understood and _json_wanted(shared):
            output.report_usage()
        return int(end.code or 0)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one clear error, no traceback
        output.report_bug(error, as_json=_json_wanted(shared))
        return ExitCode.BUG
    return ExitCode.DONE


def _json_wanted(shared: Context) -> bool:
    return output.json_wanted(sys.argv) if shared.output is None else shared.output is Output.JSON
