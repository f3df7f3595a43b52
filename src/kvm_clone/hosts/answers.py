"""What agents answer: the types that nothing else has, and the readers of those that need more than their fields.

What becomes a fact of a plan has its type in `planning`. Readers raise ValueError, TypeError or KeyError for an answer
that is malformed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvm_clone.hosts.readers import Read, anything, listed, mapped, record, text, truth, whole
from kvm_clone.image import Image
from kvm_clone.planning.facts import Directory, HostFacts, ImageFacts, StagedDisk
from kvm_clone.planning.identity import HostIdentity
from kvm_clone.planning.things import HugePages, Resources, parse_set

Ranges = list[tuple[int, int]]
"""[start, end) pairs in bytes."""


@dataclass(frozen=True)
class Use:
    """Who uses a file: `state` is one of agent.host.uses; `identity` is its device and inode."""

    path: str
    state: str
    why: str
    identity: str


@dataclass(frozen=True)
class Removed:
    """What came of removing a file: `result` is removed, missing or error, and `error` says why."""

    path: str
    result: str
    error: str = ""


@dataclass(frozen=True)
class Overlay:
    """An overlay of a committed sync that is still there, and the image below it."""

    path: str
    base: str
    base_format: str


@dataclass(frozen=True)
class Probe:
    """Whether one host reaches the other: `error` is empty when it does. `rate` is in bytes a second."""

    error: str
    rate: float


@dataclass(frozen=True)
class Origin:
    """The VM that an operation copies, as its journal names it."""

    uuid: str = ""
    name: str = ""
    host: str = ""


@dataclass(frozen=True)
class Journalled:
    """An operation whose journal lies at `path` in `directory`; only these are known of one with an `error`.

    `holder`: the process that runs it, while `active`. `foreign`: the other host that it belongs to. `changed`: when
    the journal last changed, in seconds since 1970. `defining`: libvirt may have the definition; `committed`: it is
    known to have had it. `remove`, `forget`: files and snapshots of the VM that it replaces. `published`: the files
    that have their final names. `kind`: clone or sync.
    """

    directory: str
    path: str
    error: str = ""
    operation: str = ""
    name: str = ""
    kind: str = "clone"
    source: Origin = field(default_factory=Origin)
    active: bool = False
    holder: str = ""
    foreign: str = ""
    changed: float = 0.0
    defining: bool = False
    committed: bool = False
    remove: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    disks: Mapping[str, StagedDisk] = field(default_factory=dict)


def removed(answer: Any) -> Removed:
    """What came of one file; why it could not be removed is there whenever it could not."""
    return record(Removed, *(() if answer["result"] == "error" else ("error",)))(answer)


def digests(answer: Any) -> dict[int, str]:
    """Digests by the segment's first byte."""
    return {whole(at): text(digest) for at, digest in listed(listed(anything, 2))(answer)}


def host(name: str) -> Read[HostFacts]:
    """The host and its tools; the clock is compared with ours now. `name`: what we call the host."""

    def take(answer: Any) -> HostFacts:
        about = record(_Host)(answer)
        identity = record(HostIdentity, "uuid")(answer["identity"])  # the UUID is libvirt's to say
        tools = (about.hostname, about.python, about.qemu_img, about.qemu_nbd)
        return HostFacts(name, *tools, about.time - time.time(), identity, about.locks)

    return take


def resources(answer: Any) -> Resources:
    """Huge pages, NUMA nodes, CPUs, USB devices, and which addresses are the host's."""
    about = record(_Resources)(answer)
    pages = {int(size): HugePages(*counts) for size, counts in about.hugepages.items()}
    sets = (parse_set(about.nodes), parse_set(about.cpus), about.usb)
    return Resources(pages, about.default_hugepage, about.hugetlbfs, *sets, about.addresses)


def directory(answer: Any) -> Directory:
    """What a directory is; where nothing was tried, its filesystem is taken to be able to do everything."""
    given = mapped(anything)(answer)
    if given.get("abilities") == {}:
        del given["abilities"]
        return record(Directory, "abilities")(given)
    return record(Directory)(given)


def image(path: str, image_format: str) -> Read[ImageFacts]:
    """What is known of the image at `path`, or the `error` for which nothing is."""

    def take(answer: Any) -> ImageFacts:
        if "error" in answer:
            return ImageFacts(path, image_format, error=text(answer["error"]))
        about = record(_Disk, "data_file", "encrypted")(answer)
        corrupt, snapshots, options = _qcow2(answer.get("image", {}))
        return ImageFacts(
            path,
            image_format,
            below=_below(answer["layers"]),
            corrupt=corrupt,
            snapshots=snapshots,
            options=options,
            **vars(about),
        )

    return take


def journalled(answer: Any) -> Journalled:
    """One operation's journal."""
    if "error" in answer:
        return Journalled(text(answer["directory"]), text(answer["path"]), text(answer["error"]))
    return _journalled(answer)


_journalled = record(Journalled, "error", "kind", "source")


@dataclass(frozen=True)
class _Host:
    hostname: str
    python: str
    qemu_img: str | None
    qemu_nbd: str | None
    time: float
    locks: str


@dataclass(frozen=True)
class _Resources:
    hugepages: Mapping[str, tuple[int, ...]]
    default_hugepage: int
    hugetlbfs: bool
    nodes: str | None
    cpus: str | None
    usb: frozenset[str]
    addresses: Mapping[str, bool | None]


@dataclass(frozen=True)
class _Disk:
    """The fields of ImageFacts that the agent's answer has under the same names."""

    regular: bool
    device: bool
    virtual_size: int
    allocated: int
    data: int
    stored: int
    mode: int
    user: str
    group: str
    fingerprint: str
    data_file: str = ""
    encrypted: bool = False


def _below(layers: Any) -> Image | None:
    """The image that another one rests on, with all below it. `layers`: [path, format] of each, the nearest first."""
    below: Image | None = None
    for path, format_ in reversed(listed(listed(text, 2))(layers)):
        below = Image(path, format_, below=below)
    return below


_QCOW2_OPTIONS = {
    "compat": "compat",
    "compression-type": "compression_type",
    "extended-l2": "extended_l2",
    "lazy-refcounts": "lazy_refcounts",
    "refcount-bits": "refcount_bits",
}
"""The names of qcow2 features in `qemu-img info`, and in `qemu-img create -o`."""

_DEFAULTS = {"compression_type": "zlib", "extended_l2": "off", "lazy_refcounts": "off"}
"""Values that are left out of `-o`: older tools do not know these options."""


def _qcow2(info: Any) -> tuple[bool, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Whether a qcow2 image is marked corrupt, its snapshots' names, and the options that make one like it.

    `info`: what `qemu-img info` says of it, nothing for a raw image.
    """
    about = mapped(anything)(info)
    specific = mapped(anything)(mapped(anything)(about.get("format-specific", {})).get("data", {}))
    snapshots = tuple(text(one["name"]) for one in listed(mapped(anything))(about.get("snapshots", [])))
    options = _options(about, specific) if specific else {}
    return truth(specific.get("corrupt", False)), snapshots, tuple(sorted(options.items()))


def _options(about: Mapping[str, Any], specific: Mapping[str, Any]) -> dict[str, str]:
    options = {"cluster_size": str(whole(about["cluster-size"]))}
    for theirs, ours in _QCOW2_OPTIONS.items():
        if theirs in specific:
            value = specific[theirs]
            said = ("on" if value else "off") if isinstance(value, bool) else str(value)
            if said != _DEFAULTS.get(ours):
                options[ours] = said
    return options
