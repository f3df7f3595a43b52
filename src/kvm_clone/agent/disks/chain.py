"""The files that an image consists of: itself, its data file, and every image that it rests on.

The headers are read by us (header.py), with the formats that the definition or the image above gives: a guest can
write any header into a raw disk, and what that names is nobody's base. Names are understood as QEMU understands them
(block.c): a path, `file:`, a remote protocol, or `json:` with a tree of nodes.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

from kvm_clone.agent.disks import device, fingerprint, header
from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError

RAW, QCOW2 = "raw", "qcow2"

_LEAVES = frozenset((RAW, "luks", "vdi", "vpc", "vhdx", "bochs", "cloop", "dmg", "parallels"))
"""Formats whose images rest on no other one and consist of one file."""

_LOCAL = frozenset(("file", "host_device", "host_cdrom"))
_REMOTE = frozenset(("nbd", "nbds", "rbd", "http", "https", "ftp", "ftps", "iscsi", "iser", "ssh", "nfs")) | frozenset(
    ("nbd+tcp", "nbd+unix", "gluster", "gluster+tcp", "gluster+unix", "gluster+rdma", "sheepdog", "vxhs")
)
"""Drivers of QEMU that open a local path, and those that open none."""

_NESTED = frozenset((*_LEAVES, QCOW2))
_DEEPEST = 256
"""Images on top of each other; libvirt refuses more than 200."""


class UnknownError(Exception):
    """What an image consists of cannot be established; the text says why."""


class Node(NamedTuple):
    """A local file that an image consists of, and the format it is opened with; empty where nobody says."""

    path: str
    format: str


def walk(path: str, format_: str) -> Iterator[Node]:
    """Every local file that opening the image opens, the image itself first.

    What is known is yielded before UnknownError says what is not.
    """
    seen: Set[Tuple[str, str]] = set()
    pending = [Node(path, format_)]
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > _DEEPEST:
            raise UnknownError(f"{path} rests on more than {_DEEPEST} images")
        yield node
        pending += _below(node)


def _below(node: Node) -> List[Node]:
    """What the image rests on directly, and its data file. Raises UnknownError."""
    try:
        format_ = node.format or header.guess(header.beginning(node.path)) or RAW
        if format_ in _LEAVES:
            return []
        if format_ != QCOW2:
            raise UnknownError(f"{node.path} has the format {format_}, whose images are not understood here")
        found = header.read(node.path)
    except OSError as error:
        raise UnknownError(f"{node.path} cannot be read: {error.strerror}") from error
    except AgentError as error:
        raise UnknownError(str(error)) from error
    beside = os.path.dirname(node.path)
    below = opened(found.base, found.base_format, beside) if found.base else []
    if found.data_file and not found.data_name:
        raise UnknownError(f"{node.path} has its content in a file that it does not name")
    if found.data_file and not found.data_name.startswith(("/", "json:", "file:")):  # QEMU starts from where it runs
        raise UnknownError(f"{node.path} names the file with its content without a directory: {found.data_name}")
    return below + (opened(found.data_name, RAW, beside) if found.data_file else [])


def linear(path: str, format_: str) -> List[Node]:
    """The image and each one that it rests on, the top first, each of one file.

    Raises AgentError (unsupported) when that cannot be established, or a layer is encrypted or keeps its content in
    another file; OSError.
    """
    found = [Node(path, format_)]
    while found[-1].format not in _LEAVES:
        if found[-1].format != QCOW2:
            raise AgentError(UNSUPPORTED, f"{found[-1].path} has the format {found[-1].format}, which is not handled")
        about = header.read(found[-1].path)
        if about.data_file or about.encrypted:
            what = "is encrypted" if about.encrypted else "keeps its content in another file"
            raise AgentError(UNSUPPORTED, f"{found[-1].path} {what}")
        if not about.base:
            break
        try:
            (below,) = opened(about.base, about.base_format, os.path.dirname(found[-1].path))
        except (UnknownError, ValueError) as error:
            raise AgentError(UNSUPPORTED, f"{found[-1].path} rests on what is no file: {about.base}") from error
        found.append(Node(below.path, below.format or header.guess(header.beginning(below.path)) or RAW))
        if len(found) > _DEEPEST:
            raise AgentError(UNSUPPORTED, f"{path} rests on more than {_DEEPEST} images")
    return found


def layers(path: str, format_: str) -> List[Node]:
    """As `linear`, for an image that others have made: what the chain holds is what libvirt gives to the guest.

    libvirt starts no VM on a base whose format nobody says, unless it looks raw; and options of a node, such as an
    offset, change what is read from a file. Raises AgentError (unsupported) for such a chain, for one with a layer
    that is missing, cannot be read or is neither a file nor a block device, and as `linear` does.
    """
    try:
        found = linear(path, format_)
        for position, below in enumerate(found[1:]):
            _check_base(found[position], below)
    except OSError as error:
        if error.filename in (None, path):
            raise
        raise AgentError(
            UNSUPPORTED, f"it rests on {error.filename}, which cannot be read: {error.strerror}"
        ) from error
    return found


def _check_base(above: Node, below: Node) -> None:
    about = header.read(above.path)
    lies = os.stat(below.path)
    if not (stat.S_ISREG(lies.st_mode) or device.is_device(lies)):
        raise AgentError(UNSUPPORTED, f"it rests on {below.path}, which is neither a regular file nor a block device")
    if below.format not in (RAW, QCOW2):
        raise AgentError(UNSUPPORTED, f"it rests on {below.path} of the format {below.format}, which is not handled")
    if about.base.startswith("json:"):
        tree = _unflattened(json.loads(about.base[len("json:") :]))
        if not _is_plain(tree):
            raise AgentError(UNSUPPORTED, f"{above.path} names its base with options that are not understood here")
        said = about.base_format or tree.get("driver") in _NESTED
    else:
        said = bool(about.base_format)
    if not said and header.guess(header.beginning(below.path)):
        raise AgentError(
            UNSUPPORTED,
            f"{above.path} does not say which format its base {below.path} has (qemu-img rebase -u -F says it)",
        )


_PLAIN_KEYS = frozenset(("driver", "file", "filename", "node-name", "read-only", "auto-read-only", "locking"))
"""Keys of a node which leave open nothing of what is read from it."""


def _is_plain(tree: Dict[str, Any]) -> bool:
    return tree.keys() <= _PLAIN_KEYS and all(_is_plain(one) for one in tree.values() if isinstance(one, dict))


def fingerprint_of(found: List[Node]) -> str:
    """The fingerprint of an image that consists of these layers: see fingerprint.py. Raises OSError."""
    top, *below = [node.path for node in found]
    return fingerprint.of_layers(top, below)


def opened(name: str, format_: str, beside: str) -> List[Node]:
    """The local files that QEMU opens for this name of an image; none where it is remote. Raises UnknownError.

    `format_`: what the image is said to be, empty where nobody says. `beside`: what a relative path starts from.
    """
    protocol, colon, rest = name.partition(":")
    if not colon or "/" in protocol:
        return [_local(os.path.join(beside, name), format_)]
    if protocol == "json":
        return _tree(rest, format_)
    if protocol in _LOCAL:
        return [_local(rest, format_)]
    if protocol in _REMOTE:
        return []
    raise UnknownError(f"the image {name!r} is opened in a way that is not understood here")


def _local(path: object, format_: str) -> Node:
    """The node of a path that QEMU opens as it is. Raises UnknownError for what is no path, or starts elsewhere."""
    try:
        if isinstance(path, str) and path.startswith("/") and b"\0" not in os.fsencode(path):
            return Node(path, format_)
    except UnicodeEncodeError:
        pass
    raise UnknownError(f"the image file {path!r} is named in a way that is not understood here")


def _tree(text: str, format_: str) -> List[Node]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnknownError(f"the image json:{text[:80]} cannot be understood") from error
    if not isinstance(tree, dict):
        raise UnknownError(f"the image json:{text[:80]} cannot be understood")
    return list(_nodes(_unflattened(tree), format_))


def _unflattened(tree: Dict[str, Any]) -> Dict[str, Any]:
    """The tree with keys such as `file.filename` as nested objects, which mean the same to QEMU."""
    found: Dict[str, Any] = {}
    for key, value in tree.items():
        *outer, last = key.split(".")
        inner = found
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UnknownError(f"an image with both {part} and {key} cannot be understood")
        inner[last] = _unflattened(value) if isinstance(value, dict) else value
    return found


def _nodes(tree: Dict[str, Any], format_: str) -> Iterator[Node]:
    """The local files in a tree of nodes; `format_`: what the node above is, or is said to be."""
    driver = tree.get("driver", "file" if "filename" in tree else "")
    if not isinstance(driver, str):
        raise UnknownError(f"the driver {driver!r} of an image is not understood here")
    if driver in _REMOTE:
        return
    if driver in _LOCAL:
        yield _local(tree.get("filename"), format_)
    elif driver in _NESTED or (not driver and "file" in tree):
        if format_ and driver and format_ not in (driver, RAW):  # QEMU takes what is said beside the tree
            raise UnknownError(f"an image is said to be {format_} and {driver}")
        for name, above in (("file", driver or format_), ("data-file", RAW), ("header", RAW), ("backing", "")):
            child = tree.get(name)
            if isinstance(child, dict):
                yield from _nodes(child, above)
            elif child is not None:
                raise UnknownError(f"the image refers to another node, {child!r}")
        if "file" not in tree:
            raise UnknownError(f"an image of the driver {driver} names no file")
    else:
        raise UnknownError(f"the driver {driver!r} of an image is not understood here")
