"""Changing the configuration file: set, unset and init, with every comment kept.

ruamel.yaml edits the file and keeps everything else, apart from spacing. It attaches a comment to the end of the entry
above, and loses comments outside the document and inside brackets. This module carries those over, or refuses the edit.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.scalarstring import FoldedScalarString, LiteralScalarString
from ruamel.yaml.tokens import CommentToken

from kvm_clone.errors import UsageError
from kvm_clone.settings import config

# The text up to the document's start mark, the document, and the text from its end mark on.
_PARTS = re.compile(r"((?:.*^)?---[ \t]*(?:#[^\n]*)?\n)?(.*?)(^\.\.\.\s.*)?\Z", re.DOTALL | re.MULTILINE)

_BLOCKS = (LiteralScalarString, FoldedScalarString)


@dataclass(frozen=True)
class Change:
    """What set_value, unset_value or init_file did to the file at `path`."""

    path: Path
    changed: bool


def set_value(path: Path | None, key: str, text: str) -> Change:
    """Set `key` in the file to what `text` means, creating the file when there is none.

    Nothing is written when the file holds that very value already. Raises UsageError for an unknown key, for
    a value or a resulting file that is not valid, and when the file cannot be read, edited or written.
    """
    config.check_key(key)
    value = _stored(key, text)
    with _target(path) as target:
        document = config.read_document(target)
        current = document.values.get(key)
        config.validate({**document.values, key: value}, document.place)
        # True equals 1 in Python, but not in the file.
        if current == value and isinstance(current, bool) is isinstance(value, bool):
            return Change(target, changed=False)
        _write(target, _edited(document, key, value))
    return Change(target, changed=True)


def unset_value(path: Path | None, key: str, *, ignore_missing: bool = False) -> Change:
    """Remove `key` from the file, with the comment on its line; those on lines of their own stay.

    Any key of the file can be removed, also one that is no setting, and also from a file with other errors.
    Raises UsageError when a setting is not in the file, unless `ignore_missing`; when a key is neither in the file nor
    a setting; and when the file cannot be read, edited or written.
    """
    with _target(path) as target:
        document = config.read_document(target)
        if key in document.values:
            _write(target, _edited(document, key, None))
            return Change(target, changed=True)
        config.check_key(key)
        if not ignore_missing:
            remedy = "use --ignore-missing if that is fine"
            raise UsageError(f"{key} is not set in {target}", subject=key, remedy=remedy)
    return Change(target, changed=False)


def init_file(path: Path | None) -> Change:
    """Write a file with every setting commented out at its default; leave a file that exists alone.

    Raises UsageError when the file cannot be written, or something that is no file has its name.
    """
    with _target(path) as target:
        if target.exists():
            return Change(target, changed=False)
        _write(target, template())
    return Change(target, changed=True)


def template() -> str:
    """Return the text of a new configuration file: comments, and an empty line below which set_value writes."""
    parts = ["# Settings of kvm-clone. Flags and KVM_CLONE_* environment variables override this file.\n"]
    for key, field in config.Settings.model_fields.items():
        entry = f"{key}:" if field.default is None else _dumped({key: _node(config.plain_value(field.default))})
        parts.append(f"# {field.description}\n# Accepted: {config.accepts(key)}\n# {entry.rstrip()}\n")
    return "\n".join([*parts, ""])


def _stored(key: str, text: str) -> object:
    """Return what the file is to hold for `text`. Raises UsageError when `key` does not accept it."""
    value = getattr(config.validate({key: text}, lambda _: ""), key)
    # A path is stored as given: ~ stands for the home directory of the user who reads the file.
    return text.strip() if isinstance(value, Path) else config.plain_value(value)


def _node(value: object) -> object:
    """Return `value` in the form that ruamel writes: lists in brackets."""
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    return value


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 20  # never break a line
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _dumped(data: object) -> str:
    stream = io.StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()


def _edited(document: config.Document, key: str, value: object) -> str:
    """Return the document's text with `key` set to `value`, or without it when that is None.

    Raises UsageError when ruamel would get the result wrong or lose a comment.
    """
    wanted = {name: item for name, item in document.values.items() if name != key}
    if value is not None:
        wanted[key] = value
    with suppress(YAMLError, UsageError):  # UsageError: the result is no configuration file
        head, body, tail = _PARTS.findall(document.text)[0]
        data = _yaml().load(body)
        text = f"{head}{_changed(body, data, key, value)}{tail}"
        comments = (line.strip() for token in _tokens(data) for line in token.value.splitlines())
        if config.parse_document(document.path, text).values == wanted and all(line in text for line in comments):
            return text
    raise UsageError(
        f"{document.path} is laid out in a way that this program cannot edit",
        subject=str(document.path),
        remedy="edit it by hand, or put one `key: value` on each line",
    )


def _changed(body: str, data: CommentedMap | None, key: str, value: object) -> str:
    if data is None:  # only comments, and no entry to attach them to
        return re.sub(r"(?<=[^\n])\Z", "\n", body) + _dumped({key: _node(value)})
    name = next((name for name in data if str(name) == key), key)
    return _without(data, name) if value is None else _with(data, name, _node(value))


def _with(data: CommentedMap, name: object, value: object) -> str:
    """Set the entry, and let the comments inside its old value follow the new one."""
    slots = data.ca.items.setdefault(name, [None] * 4)
    tokens = _tokens([slots[2:], data.get(name)])
    if tokens:
        first, *others = tokens
        text = first.value + "".join(token.value.removeprefix("\n") for token in others)
        slots[2:] = [CommentToken(text, first.start_mark), None]
    data[name] = value
    return _dumped(data)


def _without(data: CommentedMap, name: object) -> str:
    """Remove the entry, and put the comment lines below it in front of the next entry or at the end."""
    slots = data.ca.items.pop(name, [])
    # A comment begins on the entry's own line, with a line break if there is none; after a block, below it.
    start = "\n" if isinstance(data[name], _BLOCKS) else ""
    below = ((start + token.value).partition("\n")[2] for token in _tokens([slots[2:], data[name]]))
    kept = "".join([*(token.value for token in _tokens(slots[1:2])), *below])
    names = list(data)
    following = names[names.index(name) + 1 :]
    del data[name]
    if following and kept.strip():
        slots = data.ca.items.setdefault(following[0], [None] * 4)
        slots[1] = [CommentToken(kept, CommentMark(0)), *(slots[1] or [])]
    # ruamel writes a map without entries as {}, and leaves out its comments.
    text = _dumped(data) if data else "".join(token.value for token in _tokens(data))
    return text if following else text + kept


def _tokens(node: Any) -> list[CommentToken]:
    """Return the comments in `node`, which is a comment, a value or a list of these. Each comment is returned once."""
    if isinstance(node, CommentToken):
        return [node]
    parts: list[Any] = []
    if isinstance(node, CommentedMap | CommentedSeq):
        parts = [node.ca.comment, *node.ca.items.values(), node.ca.end]
    elif isinstance(node, _BLOCKS) and (comment := getattr(node, "comment", None)):  # behind its | or >
        parts = [CommentToken(f"{comment.strip()}\n", CommentMark(0)) if isinstance(comment, str) else comment]
    if isinstance(node, list | dict):
        parts += node.values() if isinstance(node, dict) else node
    # The comment behind `key:` belongs to the entry and to the list that is its value.
    return list({id(token): token for part in parts for token in _tokens(part)}.values())


@contextmanager
def _target(path: Path | None) -> Iterator[Path]:
    """Yield the file behind the symlinks.

    Raises UsageError for a directory or a device, which a rename must not replace, and for an OSError in the block.
    """
    file = config.config_file(path)
    try:
        target = file.resolve()
        if target.exists() and not target.is_file():
            raise UsageError(f"{file} is not a file", subject=str(file))
        yield target
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.11 and 3.12 on a symlink loop
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {file}: {reason}", subject=str(file)) from error


def _write(target: Path, text: str) -> None:
    """Replace the content of `target` atomically and durably. The file keeps its mode."""
    if len(text.encode()) > config.LARGEST:
        remedy = f"a configuration file has {config.LARGEST} bytes at most"
        raise UsageError(f"{target} would become too large", subject=str(target), remedy=remedy)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".kvm-clone-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
