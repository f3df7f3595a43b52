"""What commands share: options that every connecting command has, the settings, and running a coroutine."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import typer

from kvm_clone.cli import streams
from kvm_clone.cli.groups import OptionGroup
from kvm_clone.errors import ExitCode, KvmCloneError, TransferError
from kvm_clone.hosts.ssh import SshOptions
from kvm_clone.settings import config

Result = TypeVar("Result")


@dataclass
class Context:
    """The root command's options, and the form of the output once it is known."""

    config_path: Path | None = None
    output: config.Output | None = None


@dataclass(frozen=True)
class Connecting(OptionGroup):
    """The options of every command that connects to hosts."""

    ssh_config: Annotated[
        Path | None,
        typer.Option("-F", "--ssh-config", metavar="FILE", help="Passed to ssh as -F.", show_default=False),
    ] = None
    ssh_key: Annotated[
        Path | None,
        typer.Option("-i", "--ssh-key", metavar="FILE", help="Passed to ssh as -i.", show_default=False),
    ] = None
    ssh_option: Annotated[
        list[str] | None,
        typer.Option(
            "--ssh-option", metavar="KEY=VALUE", help="Passed to ssh as -o. May be repeated.", show_default=False
        ),
    ] = None
    output_format: Annotated[
        config.Output | None,
        typer.Option("--output", help="json: one document on stdout, and nothing else there."),
    ] = None
    log_level: Annotated[
        config.LogLevel | None,
        typer.Option("--log-level", help="The least severe message that is shown on stderr."),
    ] = None
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The configuration file, instead of the usual one."),
    ] = None

    def load(self, ctx: typer.Context, flags: Mapping[str, object] = MappingProxyType({})) -> config.Settings:
        """The settings, overridden by these options and the command's own `flags`. Also sets up logging.

        Raises UsageError.
        """
        given = {
            **flags,
            "ssh_config_path": self.ssh_config,
            "ssh_key_path": self.ssh_key,
            "ssh_options": self.ssh_option or None,
            "output": self.output_format,
            "log_level": self.log_level,
        }
        root: Context = ctx.find_root().obj
        settings = config.load_settings(self.config_file or root.config_path, given).settings
        root.output = settings.output
        level = settings.log_level.value.upper()
        logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(message)s")
        return settings


def ssh_options(settings: config.Settings) -> SshOptions:
    """The options for ssh, from the settings."""
    return SshOptions(
        config=settings.ssh_config_path,
        key=settings.ssh_key_path,
        options=tuple(settings.ssh_options),
        connect_timeout=settings.connect_timeout,
        retries=settings.connect_retries,
    )


class InterruptedByUserError(KvmCloneError):
    """The user pressed Ctrl-C. What was copied is kept, or was rolled back."""

    exit_code = ExitCode.CANCELLED


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the coroutine. The first signal cancels it; further ones do not cut its rollback short.

    Raises InterruptedByUserError for SIGINT, TransferError for SIGTERM and SIGHUP, and whatever the coroutine raises.
    A signal that was ignored when this process started stays ignored.
    """
    with streams.hurried():
        return asyncio.run(_with_signals(work))


async def _with_signals(work: Coroutine[Any, Any, Result]) -> Result:
    received: list[signal.Signals] = []
    task = asyncio.ensure_future(work)

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
            print("\nstopping in good order; this takes a moment", file=sys.stderr)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's `&`
            loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        remedy = "run the same command again; with --resume, a clone or sync continues with what was copied"
        text = f"stopped by {received[0].name}"
        kind = InterruptedByUserError if received[0] is signal.SIGINT else TransferError
        raise kind(text, remedy=remedy) from None
