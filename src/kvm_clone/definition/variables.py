"""A VM's UEFI variables: the file that its definition names, or that libvirt names for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvm_clone.definition.spans import Document, Node, escape

KEY = "nvram"
"""What identifies the file among a VM's assets, as a target identifies a disk."""

DIRECTORY = "/var/lib/libvirt/qemu/nvram"
"""Where libvirt keeps the files that it names itself: NAME_VARS and an extension (qemuDomainNVRAMPathFormat)."""

_EXTENSIONS = {"raw": ".fd", "qcow2": ".qcow2"}
"""By the file's format, which the firmware decides that libvirt chooses."""


@dataclass(frozen=True)
class Variables:
    """The file of a VM's UEFI variables.

    `path` is empty where libvirt chooses it: see `paths`. `chosen`: libvirt chooses the loader at each start.
    """

    path: str = ""
    format: str = "raw"
    chosen: bool = False

    def paths(self, name: str) -> tuple[str, ...]:
        """Return where the file of the VM of that name can be: one path, or each that libvirt may have chosen."""
        return (self.path,) if self.path else tuple(f"{DIRECTORY}/{name}_VARS{end}" for end in _EXTENSIONS.values())

    def format_of(self, path: str) -> str:
        """Return the format of the file at one of `paths`."""
        if self.path:
            return self.format
        return next(kind for kind, end in _EXTENSIONS.items() if path.endswith(end))


def read(domain: Node) -> Variables | None:
    """Return where the variables of a domain are; None for one that keeps none, or whose are refused."""
    if not _boots_by_uefi(domain) or any(refused(domain)):
        return None
    if domain.find_attributes("os", "loader").get("stateless") == "yes":
        return None
    node = domain.find("os", "nvram")
    if node is None:
        return Variables(chosen=_is_chosen(domain))
    return Variables(_path_of(node), node.attributes.get("format", "raw"), _is_chosen(domain))


def refused(domain: Node) -> Iterator[str]:
    """Yield what is known of variables that cannot be copied."""
    for node in domain.find_all("os", "varstore"):
        yield f"varstore {node.attributes.get('path', '')}".strip()
    loader = domain.find("os", "loader")
    is_named = loader is not None and loader.attributes.get("type") == "pflash" and not _is_chosen(domain)
    if loader is not None and is_named and loader.attributes.get("readonly") != "yes":
        yield f"kept in the loader itself, {loader.text.strip()}"
    for node in domain.find_all("os", "nvram"):
        kind, format_ = node.attributes.get("type", "file"), node.attributes.get("format", "raw")
        if kind != "file" or format_ not in _EXTENSIONS:
            yield f"nvram of type {kind} and format {format_}"
        elif not _boots_by_uefi(domain):
            yield f"nvram {_path_of(node)}, and no loader that has a use for it"


def set_path(document: Document, domain: Node, path: str, format_: str) -> None:
    """Make the definition name the file at `path`."""
    node = domain.find("os", "nvram")
    if node is not None:
        source = node.find("source")
        if source is not None:
            document.set_attribute(source, "file", path)
        else:
            document.set_text(node, path)
        return
    anchor = domain.find("os", "loader") or domain.find("os", "firmware") or domain.find("os", "type")
    assert anchor is not None
    opening = "<nvram>" if format_ == "raw" else f'<nvram format="{escape(format_)}">'
    document.insert_after(anchor, f"{document.margin(anchor)}{opening}{escape(path)}</nvram>")


def _path_of(nvram: Node) -> str:
    """Return the file's path as the element has it: its text, or that of a source; empty where it has none."""
    return nvram.text.strip() or nvram.find_attributes("source").get("file", "")


def _is_chosen(domain: Node) -> bool:
    """Whether libvirt chooses the loader."""
    return domain.find_attributes("os").get("firmware") == "efi"


def _boots_by_uefi(domain: Node) -> bool:
    return _is_chosen(domain) or domain.find_attributes("os", "loader").get("type") == "pflash"
