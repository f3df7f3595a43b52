"""The settings, and where each value came from: a flag, the environment, the file or the default, in this order.

`Settings` is the only list of keys. The template and the error messages take their descriptions from it.
config_file.py changes the file; this module only reads it.
"""

from __future__ import annotations

import difflib
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode

from kvm_clone.errors import UsageError
from kvm_clone.options import Route, TransferOptions, Verify
from kvm_clone.settings import bounded
from kvm_clone.units import DURATION_ACCEPTS, RATE_ACCEPTS, parse_duration, parse_rate

ENV_PREFIX = "KVM_CLONE_"
CONFIG_VARIABLE = "KVM_CLONE_CONFIG"

LARGEST = 64 * 1024
"""Bytes of a configuration file: its parser takes seconds for so much."""


class LogLevel(StrEnum):
    """The least severe message that is shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Output(StrEnum):
    """The form of what a command prints on stdout."""

    TEXT = "text"
    JSON = "json"


def _not_bool(value: object) -> object:
    """Refuse true and false, which pydantic would read as the integers 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")  # noqa: TRY004 (a TypeError would pass through pydantic)
    return value


def _line(value: str) -> str:
    """Refuse an empty text and one that cannot be printed on one line."""
    stripped = value.strip()
    if not stripped or not stripped.isprintable():
        raise ValueError("empty or not printable")
    return stripped


def _rate(value: str) -> str:
    parse_rate(value)
    return value


def _timeout(value: str) -> str:
    if parse_duration(value) <= 0:
        raise ValueError("not above zero")
    return value


def _path(value: object) -> object:
    """Expand `~`. A relative path stays relative to the working directory, as it does for ssh."""
    if not isinstance(value, str | Path):
        return value
    try:
        return Path(_line(str(value))).expanduser()
    except RuntimeError as error:  # ~nobody-of-this-name
        raise ValueError(str(error)) from error


def _split_options(value: object) -> object:
    """Turn "A=b,C=d" or a JSON list into the list it stands for."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)  # JSONDecodeError is a ValueError
        except RecursionError:
            raise ValueError("nested without end") from None
    return [part for part in value.split(",") if part.strip()]


def _option(value: str) -> str:
    stripped = _line(value)
    name, separator, argument = stripped.partition("=")
    if not (name.strip().isalnum() and separator and argument.strip()):
        raise ValueError("not Key=Value")
    return stripped


PathValue = Annotated[Path, BeforeValidator(_path)]
Integer = Annotated[int, BeforeValidator(_not_bool)]
Line = Annotated[str, AfterValidator(_line)]
# YAML's `timeout: 90` arrives as a number.
NumberOrLine = Annotated[str, Field(coerce_numbers_to_str=True), AfterValidator(_line)]
Rate = Annotated[NumberOrLine, AfterValidator(_rate)]
Duration = Annotated[NumberOrLine, AfterValidator(_timeout)]
Option = Annotated[str, AfterValidator(_option)]
# NoDecode: the environment's text goes to _split_options instead of pydantic-settings' JSON decoder.
Options = Annotated[tuple[Option, ...], NoDecode, BeforeValidator(_split_options)]
_LOWERED = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

_A_FILE = "the path of a file"
_PAIRS = (
    "Key=Value pairs, separated by commas or as a list, such as Compression=yes,Ciphers=aes128-ctr "
    'or, with commas inside a value, ["Ciphers=aes128-ctr,aes256-ctr"]'
)


def _field(default: object, accepts: str, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"accepts": accepts}, **limits)


def _integer(default: int, low: int, high: int, description: str) -> Any:
    return _field(default, f"a whole number from {low} to {high}", description, ge=low, le=high)


def _choice(default: StrEnum, description: str) -> Any:
    *most, last = type(default)
    return _field(default, f"{', '.join(most)} or {last}", description)


class Settings(BaseModel):
    """Every setting with its type, default and description."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    ssh_config_path: PathValue | None = _field(None, _A_FILE, "The ssh_config to use instead of ssh's own.")
    ssh_key_path: PathValue | None = _field(None, _A_FILE, "A private key to offer besides those ssh finds.")
    ssh_options: Options = _field((), _PAIRS, "Options handed to ssh with -o.")
    connect_timeout: Integer = _integer(10, 1, 600, "Seconds to wait for a host to answer.")
    connect_retries: Integer = _integer(3, 0, 20, "How often to try again when a host does not answer.")
    route: Annotated[Route, _LOWERED] = _choice(
        Route.AUTO, "How data travels: from host to host (direct), through this machine (relay), or what fits (auto)."
    )
    parallel: Integer = _integer(2, 1, 64, "How many disks to work on at the same time.")
    bandwidth_limit: Rate | None = _field(None, RATE_ACCEPTS, "The most that a copy may send. Unset: no limit.")
    timeout: Duration | None = _field(
        None, f"{DURATION_ACCEPTS}; not zero", "When to give up on a whole command. Unset: no limit."
    )
    pool: Line | None = _field(None, "the name of a storage pool", "The destination's pool for new disks.")
    verify: bool = _field(True, "true or false", "Whether to prove after a copy that the disks are equal.")
    log_level: Annotated[LogLevel, _LOWERED] = _choice(LogLevel.WARNING, "The least severe message to show.")
    output: Annotated[Output, _LOWERED] = _choice(Output.TEXT, "The form of what commands print on stdout.")

    @property
    def transfer(self) -> TransferOptions:
        """How content is moved and proven."""
        return TransferOptions(
            route=self.route,
            parallel=self.parallel,
            bandwidth_limit=None if self.bandwidth_limit is None else parse_rate(self.bandwidth_limit),
            verify=Verify.FULL if self.verify else Verify.OFF,
        )

    @property
    def timeout_seconds(self) -> float | None:
        """The time limit in seconds, or None for no limit."""
        return None if self.timeout is None else parse_duration(self.timeout)


class _Environment(Settings, BaseSettings):
    """The settings as pydantic-settings reads them from the environment."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True)


KEYS: tuple[str, ...] = tuple(Settings.model_fields)


class Layer(Enum):
    """Where a value can come from. Each layer overrides the ones above it."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True)
class Origin:
    """Where a value came from: the layer, and the file's path or the variable's name."""

    layer: Layer
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.layer.value} {self.detail}".rstrip()


@dataclass(frozen=True)
class Loaded:
    """The settings in force, where each came from, and the file that was looked for."""

    settings: Settings
    origins: dict[str, Origin]
    path: Path


@dataclass(frozen=True)
class Document:
    """A configuration file: its text, its values, and the line of each key."""

    path: Path
    text: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """Return the file, with the line if it has `key`, for an error's text."""
        return f"{self.path}, line {self.lines[key]}" if key in self.lines else str(self.path)


def config_file(path: Path | None) -> Path:
    """Return the configuration file: `path`, else $KVM_CLONE_CONFIG, else config.yaml in the XDG directory.

    It need not exist. Raises UsageError when `~` in it cannot be expanded.
    """
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    # The XDG specification wants relative values ignored.
    directory = base if base.is_absolute() else Path("~/.config")
    named = path or os.environ.get(CONFIG_VARIABLE) or directory / "kvm-clone" / "config.yaml"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise UsageError(f"cannot expand ~ in {named}: {error}", subject=str(named)) from error


def load_settings(path: Path | None, overrides: Mapping[str, object]) -> Loaded:
    """Return the settings in force.

    `path` is the file that the user named, or None for the usual one. `overrides` are the flags by setting
    name; None stands for a flag that was not given.

    Raises UsageError when the file cannot be used, and for unknown names and bad values in any layer: a bad
    value is refused even if a higher layer overrides it.
    """
    file = config_file(path)
    document = read_document(file, must_exist=bool(path or os.environ.get(CONFIG_VARIABLE)))
    environment = EnvSettingsSource(_Environment)()
    layers: list[tuple[Layer, Mapping[str, Any], Callable[[str], str]]] = [
        (Layer.FILE, document.values, document.place),
        (Layer.ENVIRONMENT, environment, lambda key: ENV_PREFIX + key.upper()),
        (Layer.FLAG, overrides, lambda _: ""),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(KEYS, Origin(Layer.DEFAULT))
    for layer, given, place in layers:
        for key in validate(given, place).model_fields_set:
            values[key] = given[key]
            origins[key] = Origin(layer, str(file) if layer is Layer.FILE else place(key))
    return Loaded(Settings(**values), origins, file)


def read_document(path: Path, *, must_exist: bool = False) -> Document:
    """Read a configuration file; one that is not there is empty. Raises UsageError naming the file."""
    try:
        text = bounded.read(path, LARGEST).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (FileNotFoundError, NotADirectoryError) as error:
        if must_exist:
            remedy = "`kvm-clone config init` with the same --config creates it"
            raise UsageError(f"{path}: no such configuration file", subject=str(path), remedy=remedy) from error
        text = ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", subject=str(path)) from error
    return parse_document(path, text)


def parse_document(path: Path, text: str) -> Document:
    """Return the settings in `text`, the content of `path`. Raises UsageError when it holds no settings."""
    yaml = YAML(typ="safe", pure=True)
    try:
        values, root = yaml.load(text), yaml.compose(text)
    # Not only YAMLError: `2024-13-99`, `!!int` without a number, a list for a key and deep nesting raise others.
    except (YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{path} is not valid YAML: {where}{problem}", subject=str(path)) from error
    if values is None:
        return Document(path, text, {}, {})
    if not isinstance(values, dict) or not isinstance(root, MappingNode):
        raise UsageError(f"{path} does not hold settings, one `key: value` a line", subject=str(path))
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
    return Document(path, text, {str(key): value for key, value in values.items()}, lines)


def get_value(loaded: Loaded, key: str) -> object:
    """Return the value in force for `key`, None when unset. Raises UsageError for an unknown key."""
    check_key(key)
    value: object = getattr(loaded.settings, key)
    return value


def accepts(key: str) -> str:
    """Return what `key` accepts, in words."""
    extra = Settings.model_fields[key].json_schema_extra
    return str(extra["accepts"]) if isinstance(extra, dict) else ""


def check_key(key: str, place: str = "") -> None:
    """Raise UsageError, with the nearest name there is, unless `key` is a setting.

    `place` is where it was found, when that is not the command line.
    """
    if key in KEYS:
        return
    near = difflib.get_close_matches(key, KEYS, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(KEYS)}"
    where = f"{place}: " if place else ""
    raise UsageError(f"{where}no setting is named {key!r}", subject=key, remedy=remedy)


def validate(values: Mapping[str, Any], place: Callable[[str], str]) -> Settings:
    """Return the settings made of `values` and the defaults. A value of None counts as not given.

    Raises UsageError, which names each bad key and its place.
    """
    for key in values:
        check_key(key, place(key))
    try:
        return Settings(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        keys = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        refusals = (
            f"{place(key)}: {key} cannot be {_shown(values[key])}; accepted is {accepts(key)}".removeprefix(": ")
            for key in keys
        )
        raise UsageError("; ".join(refusals), subject=", ".join(keys)) from error


def _shown(value: object) -> str:
    """A bad value as text, shortened: a few lines of YAML can expand to millions of values."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    try:
        return short.repr(value)
    except ValueError:  # Python does not convert an integer of thousands of digits
        return "a number of that size"


def format_value(value: object) -> str:
    """Return a setting's value as text that set_value accepts; the empty text for an unset value."""
    plain = plain_value(value)
    if plain is None:
        return ""
    if isinstance(plain, list):
        return json.dumps(plain) if any("," in item for item in plain) else ",".join(plain)
    return str(plain).lower() if isinstance(plain, bool) else str(plain)


def plain_value(value: object) -> object:
    """Return a setting's value in the types that YAML and JSON have."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | StrEnum) else value
