"""The settings: flag over environment over file over default, and the file that keeps them.

`load_settings` puts the four layers together and remembers for every key which one it came from.
`set_value`, `unset_value` and `init_file` change the file. They edit its text in place, so that comments,
order and layout of everything else stay as the user wrote them, and replace the file atomically and durably.

The one list of keys is `Settings`: its field descriptions are also the template's and the help's.
"""

from __future__ import annotations

import difflib
import fcntl
import io
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, SequenceNode

from kvm_clone.errors import UsageError
from kvm_clone.units import DURATION_ACCEPTS, RATE_ACCEPTS, parse_duration, parse_rate

ENV_PREFIX = "KVM_CLONE_"
CONFIG_VARIABLE = "KVM_CLONE_CONFIG"


class Route(StrEnum):
    """How the disk data travels."""

    AUTO = "auto"
    DIRECT = "direct"
    RELAY = "relay"


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


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _text_of_number(value: object) -> object:
    """Let YAML's `timeout: 90` through, which arrives as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _line(value: str) -> str:
    """Refuse what could not be shown or written on one line, and the empty text, which is no value."""
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
        return json.loads(value)  # JSONDecodeError is a ValueError
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
Rate = Annotated[str, BeforeValidator(_text_of_number), AfterValidator(_line), AfterValidator(_rate)]
Duration = Annotated[str, BeforeValidator(_text_of_number), AfterValidator(_line), AfterValidator(_timeout)]
# NoDecode: the environment's text goes to _split_options instead of pydantic-settings' JSON decoder.
Options = Annotated[
    tuple[Annotated[str, AfterValidator(_option)], ...], NoDecode, BeforeValidator(_split_options)
]


def _field(default: object, accepts: str, description: str) -> Any:
    return Field(default, description=description, json_schema_extra={"accepts": accepts})


def _integer(default: int, low: int, high: int, description: str) -> Any:
    accepts = f"a whole number from {low} to {high}"
    return Field(default, ge=low, le=high, description=description, json_schema_extra={"accepts": accepts})


def _choice(default: StrEnum, description: str) -> Any:
    *most, last = type(default)
    return _field(default, f"{', '.join(most)} or {last}", description)


class Settings(BaseSettings):
    """Every setting with its type, default and description.

    It reads neither the environment nor a file by itself: load_settings does, so that it knows what came
    from where.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    ssh_config_path: PathValue | None = _field(
        None, "the path of a file", "The ssh_config file to use instead of ssh's own."
    )
    ssh_key_path: PathValue | None = _field(
        None, "the path of a file", "The private key to offer to the hosts, besides those ssh finds itself."
    )
    ssh_options: Options = _field(
        (),
        "Key=Value pairs, separated by commas or as a list, such as Compression=yes,Ciphers=aes128-ctr "
        'or, with commas inside a value, ["Ciphers=aes128-ctr,aes256-ctr"]',
        "Options handed to ssh with -o.",
    )
    connect_timeout: Integer = _integer(10, 1, 600, "Seconds to wait for a host to answer.")
    connect_retries: Integer = _integer(3, 0, 20, "How often to try again when a host does not answer.")
    route: Annotated[Route, BeforeValidator(_lowered)] = _choice(
        Route.AUTO,
        "How data travels: from host to host (direct), through this machine (relay), or what fits (auto).",
    )
    parallel: Integer = _integer(2, 1, 64, "How many disks to work on at the same time.")
    bandwidth_limit: Rate | None = _field(
        None, RATE_ACCEPTS, "The most that a copy may send. Without it there is no limit."
    )
    timeout: Duration | None = _field(
        None,
        f"{DURATION_ACCEPTS}; not zero",
        "When to give up on a whole command. Without it there is no limit.",
    )
    pool: Line | None = _field(
        None,
        "the name of a storage pool",
        "The destination's storage pool for new disks, unless a flag names another.",
    )
    verify: bool = _field(True, "true or false", "Whether to prove after a copy that the disks are equal.")
    log_level: Annotated[LogLevel, BeforeValidator(_lowered)] = _choice(
        LogLevel.WARNING, "The least severe message to show on stderr."
    )
    output: Annotated[Output, BeforeValidator(_lowered)] = _choice(
        Output.TEXT, "The form of what commands print on stdout."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 (the signature is pydantic-settings')
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what the constructor is given and nothing else."""
        return (init_settings,)

    @property
    def bandwidth_bytes_per_second(self) -> int | None:
        """The bandwidth limit in bytes per second, or None for no limit."""
        return None if self.bandwidth_limit is None else parse_rate(self.bandwidth_limit)

    @property
    def timeout_seconds(self) -> float | None:
        """The time limit in seconds, or None for no limit."""
        return None if self.timeout is None else parse_duration(self.timeout)


KEYS: tuple[str, ...] = tuple(Settings.model_fields)


class Layer(Enum):
    """Where a value can come from; each beats the ones above it."""

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
class Change:
    """What set_value, unset_value or init_file did to the file at `path`."""

    path: Path
    changed: bool


def config_file(path: Path | None) -> Path:
    """Return the configuration file: `path`, else $KVM_CLONE_CONFIG, else config.yaml in the XDG directory.

    It need not exist. Raises UsageError when `~` in it cannot be expanded.
    """
    named = path or _variable_path()
    try:
        return (named or _default_path()).expanduser()
    except RuntimeError as error:
        raise UsageError(f"cannot expand ~ in {named}: {error}", subject=str(named)) from error


def _variable_path() -> Path | None:
    value = os.environ.get(CONFIG_VARIABLE)
    return Path(value) if value else None


def _default_path() -> Path:
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    # The XDG specification wants relative values ignored.
    directory = base if base.is_absolute() else Path("~/.config")
    return directory / "kvm-clone" / "config.yaml"


def load_settings(path: Path | None, overrides: Mapping[str, object]) -> Loaded:
    """Return the settings in force.

    `path` is the file that the user named, or None for the usual one. `overrides` are the flags by setting
    name; None stands for a flag that was not given.

    Raises UsageError when the file cannot be used, and for unknown names and bad values in any layer: a bad
    value is refused even where a higher layer hides it.
    """
    file = config_file(path)
    named = path is not None or _variable_path() is not None
    document = _read(file, must_exist=named)
    flags = {key: value for key, value in overrides.items() if value is not None}
    layers: list[tuple[Layer, Mapping[str, Any], Callable[[str], str]]] = [
        (Layer.FILE, document.given(), lambda _: str(file)),
        (Layer.ENVIRONMENT, EnvSettingsSource(Settings)(), lambda key: ENV_PREFIX + key.upper()),
        (Layer.FLAG, flags, lambda _: ""),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(KEYS, Origin(Layer.DEFAULT))
    for layer, given, detail in layers:
        _validate(given, document.place if layer is Layer.FILE else detail)
        values.update(given)
        origins.update({key: Origin(layer, detail(key)) for key in given})
    return Loaded(Settings(**values), origins, file)


def get_value(loaded: Loaded, key: str) -> object:
    """Return the value in force for `key`, None when unset. Raises UsageError for an unknown key."""
    check_key(key)
    value: object = getattr(loaded.settings, key)
    return value


def set_value(path: Path | None, key: str, text: str) -> Change:
    """Set `key` in the file to what `text` means, creating the file when there is none.

    Nothing is written when the file holds that very value already. Raises UsageError for an unknown key, for
    a value or a resulting file that is not valid, and when the file cannot be read or written.
    """
    check_key(key)
    stored = _stored(key, text)
    with _editing(config_file(path), create=True) as target:
        document = _read(target)
        current = document.values.get(key)
        if type(current) is type(stored) and current == stored:
            _validate(document.given(), document.place)
            return Change(target, changed=False)
        values = {**document.values, key: stored}
        _validate(_given(values), document.place)
        _write(target, _edit(document, key, values))
    return Change(target, changed=True)


def unset_value(path: Path | None, key: str, *, ignore_missing: bool = False) -> Change:
    """Remove `key` from the file.

    Any name that is in the file can be removed, also one that is no setting, and whatever else is wrong in
    the file. Raises UsageError when the key is not there, unless `ignore_missing`; and when it is no setting
    either, or the file cannot be read or written.
    """
    with _editing(config_file(path), create=False) as target:
        document = _read(target)
        if key not in document.values:
            check_key(key)
            if ignore_missing:
                return Change(target, changed=False)
            raise UsageError(
                f"{key} is not set in {target}",
                subject=key,
                remedy="use --ignore-missing if that is fine",
            )
        values = {name: value for name, value in document.values.items() if name != key}
        _write(target, _edit(document, key, values))
    return Change(target, changed=True)


def init_file(path: Path | None) -> Change:
    """Write a file with every setting commented out at its default; leave a file that exists alone.

    Raises UsageError when the file cannot be written, or something that is no file has its name.
    """
    with _editing(config_file(path), create=True) as target:
        if target.exists():
            return Change(target, changed=False)
        _write(target, template())
    return Change(target, changed=True)


def template() -> str:
    """Return the text of a fresh configuration file."""
    parts = [
        "# Settings of kvm-clone. Flags and KVM_CLONE_* environment variables go before what is set here.\n"
    ]
    for key, field in Settings.model_fields.items():
        entry = f"{key}: {_render(_plain(field.default))}" if field.default is not None else f"{key}:"
        parts.append(f"# {field.description}\n# Accepted: {accepts(key)}\n# {entry}\n")
    return "\n".join(parts)


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


def format_value(value: object) -> str:
    """Return a setting's value as text that set_value takes back; an unset one is the empty text."""
    plain = _plain(value)
    if plain is None:
        return ""
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, list):
        return json.dumps(plain) if any("," in item for item in plain) else ",".join(plain)
    return str(plain)


def _plain(value: object) -> object:
    """Return a setting's value in the types that YAML and JSON have."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | StrEnum) else value


def _stored(key: str, text: str) -> object:
    """Return what the file is to hold for `text`. Raises UsageError when `key` does not accept it."""
    value = getattr(_validate({key: text}, lambda _: ""), key)
    # A path is kept as given: ~ is to mean the home of whoever reads the file.
    return text.strip() if isinstance(value, Path) else _plain(value)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the keys without a value: `pool:` means the same as no such line."""
    return {key: value for key, value in values.items() if value is not None}


def _validate(values: Mapping[str, Any], place: Callable[[str], str]) -> Settings:
    """Return the settings that `values` alone make.

    Raises UsageError, which names each bad key and its place.
    """
    for key in values:
        check_key(key, place(key))
    try:
        return Settings(**values)
    except ValidationError as error:
        keys = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        raise UsageError(
            "; ".join(_refusal(key, values[key], place(key)) for key in keys), subject=", ".join(keys)
        ) from error


def _refusal(key: str, value: object, place: str) -> str:
    where = f"{place}: " if place else ""
    return f"{where}{key} cannot be {value!r}; accepted is {accepts(key)}"


@dataclass(frozen=True)
class _Document:
    """A configuration file: its text, what it says, and the key and value node of each entry."""

    path: Path
    text: str
    values: dict[str, Any]
    entries: dict[str, tuple[Node, Node]]

    def given(self) -> dict[str, Any]:
        return _given(self.values)

    def place(self, key: str) -> str:
        entry = self.entries.get(key)
        return f"{self.path}, line {entry[0].start_mark.line + 1}" if entry else str(self.path)

    def span(self, key: str) -> tuple[int, int]:
        """Return the offsets of the value's first character and behind its last."""
        key_node, value_node = self.entries[key]
        start, end = value_node.start_mark.index, _end(value_node)
        if start == end:  # no value, and the mark is at the next entry
            start = end = self.text.find(":", key_node.end_mark.index) + 1
        # A block scalar ends behind its line.
        return start, len(self.text[:end].rstrip())


def _read(path: Path, *, must_exist: bool = False) -> _Document:
    """Read the file; one that is not there is empty. Raises UsageError naming the file."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        if must_exist:
            raise UsageError(
                f"{path}: no such configuration file",
                subject=str(path),
                remedy="`kvm-clone config init` with the same --config creates it",
            ) from error
        text = ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", subject=str(path)) from error
    return _parse(path, text)


def _parse(path: Path, text: str) -> _Document:
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        values = YAML(typ="safe", pure=True).load(text)
    # ValueError: ruamel's own for scalars such as the date 2024-13-99.
    except (YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {_yaml_problem(error)}", subject=str(path)) from error
    if values is None:
        return _Document(path, text, {}, {})
    if not isinstance(values, dict) or not isinstance(root, MappingNode):
        raise UsageError(
            f"{path} does not hold settings, one `key: value` a line",
            subject=str(path),
        )
    entries = {str(key.value): (key, value) for key, value in root.value}
    return _Document(path, text, {str(key): value for key, value in values.items()}, entries)


def _yaml_problem(error: Exception) -> str:
    """Return what is wrong on one line; ruamel's own text spans several and quotes the source."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


def _edit(document: _Document, key: str, values: dict[str, Any]) -> str:
    """Return the document's text, changed only where `key` has to be changed so that it says `values`.

    The text is edited rather than dumped anew because a comment that stands above an entry belongs, for
    ruamel, to the entry before, and would go with that. Layouts too unusual for it (a flow mapping, aliases)
    show in the check and are dumped. Raises UsageError when the dump does not say it either.
    """
    if key not in values:
        text = _without(document, key)
    elif key in document.entries:
        text = _replaced(document, key, values[key])
    else:
        text = _inserted(document, key, values[key])
    if _says(text, values):
        return text
    dumped = _dumped(document, key, values)
    if not _says(dumped, values):
        raise UsageError(
            f"{document.path} is laid out in a way that this program cannot edit",
            subject=str(document.path),
            remedy="edit it by hand, or put one `key: value` on each line",
        )
    return dumped


def _says(text: str, values: dict[str, Any]) -> bool:
    try:
        return _parse(Path(), text).values == values
    except UsageError:
        return False


def _without(document: _Document, key: str) -> str:
    if key not in document.entries:  # it comes in through a merge key
        return document.text
    key_node, _ = document.entries[key]
    _, end = document.span(key)
    start = document.text.rfind("\n", 0, key_node.start_mark.index) + 1
    newline = document.text.find("\n", end)
    return document.text[:start] + (document.text[newline + 1 :] if newline >= 0 else "")


def _replaced(document: _Document, key: str, value: object) -> str:
    key_node, value_node = document.entries[key]
    start, end = document.span(key)
    head, tail = document.text[:start], document.text[end:]
    if isinstance(value, list) and value and _is_block_list(value_node):
        separator = "\n" + " " * int(value_node.start_mark.column)
        return head + separator.join(f"- {_render(item)}" for item in value) + tail
    if start < end and "\n" not in document.text[key_node.end_mark.index : start]:
        return head + _render(value) + tail
    return f"{document.text[: key_node.end_mark.index]}: {_render(value)}{tail}"


def _inserted(document: _Document, key: str, value: object) -> str:
    """Put a new entry below the template's commented one, or at the end."""
    text = document.text
    newline = "\r\n" if "\r\n" in text else "\n"
    column = next((node.start_mark.column for node, _ in document.entries.values()), 0)
    entry = f"{' ' * column}{key}: {_render(value)}"
    commented = re.search(rf"^[ \t]*#[ \t]*{key}:[^\r\n]*", text, re.MULTILINE)
    if commented:
        return text[: commented.end()] + newline + entry + text[commented.end() :]
    separator = newline if text and not text.endswith("\n") else ""
    return text + separator + entry + newline


def _dumped(document: _Document, key: str, values: dict[str, Any]) -> str:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = sys.maxsize
    data = yaml.load(document.text)
    if key in values:
        data[key] = values[key]
    else:
        del data[key]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _is_block_list(node: Node) -> bool:
    return isinstance(node, SequenceNode) and not node.flow_style


def _end(node: Node) -> int:
    """Return the offset behind the node's last character.

    A block collection's own mark is no use: it lies behind the comments that follow.
    """
    if not isinstance(node, CollectionNode) or node.flow_style:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, MappingNode) else last)


def _render(value: object) -> str:
    """Return `value` as YAML on one line, quoted only where that is necessary."""
    yaml = YAML()
    yaml.default_flow_style = True
    yaml.width = sys.maxsize
    stream = io.StringIO()
    # In a list, so that no document end marker follows and commas are quoted.
    yaml.dump([value], stream)
    return stream.getvalue().strip()[1:-1]


@contextmanager
def _editing(path: Path, *, create: bool) -> Iterator[Path]:
    """Give the file behind `path`'s symlinks, and keep other processes that edit it out meanwhile.

    Raises UsageError for whatever the system refuses, and for a device or a directory, which a rename must
    not replace.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise UsageError(f"{path} is not a file", subject=str(path))
        if create:
            target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.exists():
            yield target
            return
        with _directory(target.parent) as descriptor:
            # Where the file system has no locks, an edit is still atomic; the later of two wins.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield target
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", subject=str(path)) from error
    except RuntimeError as error:  # Python 3.11 and 3.12 on a symlink loop
        raise UsageError(f"cannot write {path}: {error}", subject=str(path)) from error


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(target: Path, text: str) -> None:
    """Replace `target` in one step that survives a power cut; it keeps its mode and, where allowed, owner."""
    temporary = target.with_name(f".kvm-clone-{secrets.token_hex(8)}.tmp")
    # 0o666 leaves a new file's mode to the user's umask.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            _copy_mode(target, descriptor)
            stream.write(text.encode())
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with _directory(target.parent) as directory:
        os.fsync(directory)


def _copy_mode(source: Path, descriptor: int) -> None:
    try:
        status = source.stat()
    except FileNotFoundError:
        return
    with suppress(PermissionError):
        os.fchown(descriptor, status.st_uid, status.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
