"""`kvm-clone config`: read and change the configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvm_clone.cli.output import print_json
from kvm_clone.errors import UsageError
from kvm_clone.settings.config import KEYS, Loaded, Output, config_file, format_value, get_value, load_settings
from kvm_clone.settings.config_file import Change, init_file, set_value, unset_value

config_app = typer.Typer(
    name="config",
    help="Read and change the configuration file. A flag overrides the environment (KVM_CLONE_<KEY>), which "
    "overrides the file, which overrides the default.",
    no_args_is_help=True,
)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A setting's name; `list` shows them all.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The configuration file, instead of the usual one."),
]
OutputOption = Annotated[
    Output | None,
    typer.Option("--output", help="Print text, or one JSON document. The default is a setting."),
]


def config_path(ctx: typer.Context) -> Path | None:
    """Return the file that the root command's `--config` names, or None when it was not given."""
    path = getattr(ctx.find_root().obj, "config_path", None)
    return path if isinstance(path, Path) else None


@config_app.command(
    "get",
    epilog="Examples:\n\nkvm-clone config get parallel\n\nkvm-clone config get ssh_options --output json",
)
def get_command(ctx: typer.Context, key: KeyArgument, config: ConfigOption = None, output: OutputOption = None) -> None:
    """Print the value in force, alone. A setting without a value prints nothing, and the exit code is 0."""
    loaded = load_settings(config or config_path(ctx), {})
    value = get_value(loaded, key)
    if (output or loaded.settings.output) is Output.JSON:
        print_json({"key": key, **_described(loaded, key)})
    elif value is not None:
        print(format_value(value))


@config_app.command(
    "set",
    epilog="Examples:\n\nkvm-clone config set bandwidth_limit 100M\n\n"
    "kvm-clone config set ssh_options Compression=yes,ServerAliveInterval=15",
)
def set_command(
    ctx: typer.Context,
    key: KeyArgument,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="The value; lists are separated by commas.")],
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Set a value in the file. The file is created when there is none, and its comments are kept."""
    path = config or config_path(ctx)
    change = set_value(path, key, value)
    _report(change, f"set {key}", _format(path, output))


@config_app.command(
    "unset",
    epilog="Examples:\n\nkvm-clone config unset pool\n\nkvm-clone config unset pool --ignore-missing",
)
def unset_command(
    ctx: typer.Context,
    key: KeyArgument,
    ignore_missing: Annotated[
        bool, typer.Option("--ignore-missing", help="Succeed when the file does not set it.")
    ] = False,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Remove a value from the file. It is an error when the file does not set it."""
    path = config or config_path(ctx)
    change = unset_value(path, key, ignore_missing=ignore_missing)
    _report(change, f"unset {key}", _format(path, output))


@config_app.command("list", epilog="Examples:\n\nkvm-clone config list\n\nkvm-clone config list --output json")
def list_command(ctx: typer.Context, config: ConfigOption = None, output: OutputOption = None) -> None:
    """Print every setting, its value, and where that came from. `-` stands for no value."""
    loaded = load_settings(config or config_path(ctx), {})
    if (output or loaded.settings.output) is Output.JSON:
        settings = {key: _described(loaded, key) for key in KEYS}
        print_json({"path": str(loaded.path), "settings": settings})
        return
    rows = [(key, format_value(getattr(loaded.settings, key)) or "-", str(loaded.origins[key])) for key in KEYS]
    if sys.stdout.isatty():
        _print_table(rows)
    else:
        _print_aligned(rows)


@config_app.command("path", epilog='Examples:\n\nkvm-clone config path\n\n"$EDITOR" "$(kvm-clone config path)"')
def path_command(ctx: typer.Context, config: ConfigOption = None, output: OutputOption = None) -> None:
    """Print the path of the configuration file, whether it exists or not."""
    path = config or config_path(ctx)
    file = config_file(path)
    if _format(path, output) is Output.JSON:
        exists = os.path.exists(file)  # noqa: PTH110 - Path's raises for a name that is too long
        print_json({"path": str(file), "exists": exists})
    else:
        print(file)


@config_app.command("init", epilog="Examples:\n\nkvm-clone config init\n\nkvm-clone config init --config ./ci.yaml")
def init_command(ctx: typer.Context, config: ConfigOption = None, output: OutputOption = None) -> None:
    """Write a file that explains every setting. A file that exists is left as it is, which is no error."""
    path = config or config_path(ctx)
    change = init_file(path)
    _report(change, "init", _format(path, output))


def _format(path: Path | None, flag: Output | None) -> Output:
    """Return the format of the output. It is text if the file is broken: a command that mends it must not fail."""
    if flag is not None:
        return flag
    try:
        return load_settings(path, {}).settings.output
    except UsageError:
        return Output.TEXT


def _report(change: Change, action: str, output: Output) -> None:
    if output is Output.JSON:
        print_json({"action": action, "path": str(change.path), "changed": change.changed})
    else:
        print(f"{action}: {change.path} {'changed' if change.changed else 'unchanged'}")


def _described(loaded: Loaded, key: str) -> dict[str, object]:
    origin = loaded.origins[key]
    value: object = getattr(loaded.settings, key)
    return {"value": value, "origin": origin.layer.value, "detail": origin.detail}


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    table = Table("Key", "Value", "From")
    for row in rows:
        # Text, because a string would be searched for markup and lists have brackets.
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def _print_aligned(rows: list[tuple[str, str, str]]) -> None:
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for key, value, origin in rows:
        print(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")
