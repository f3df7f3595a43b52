"""Walk over a domain definition and find everything in it that refers to the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvm_clone.definition.domain_xml import parse
from kvm_clone.definition.references import command_line
from kvm_clone.definition.references.compose import Trail
from kvm_clone.definition.references.model import Reference, Role
from kvm_clone.definition.references.rules import Rule, rules_at
from kvm_clone.definition.spans import Node

_CHAIN = {"backingStore": "backing image", "mirror": "mirror", "dataStore": "data file"}
"""Elements that hold a further storage source, and what that is called."""


@dataclass(frozen=True)
class Place:
    """A reference and where in the document it stands: an attribute's name, None for text or the whole element."""

    reference: Reference
    node: Node
    attribute: str | None = None


def references(xml: str) -> tuple[Reference, ...]:
    """Return every reference to the host, in document order; <metadata>, which is other tools' own, left out.

    Raises RefusedError when `xml` is no domain's.
    """
    _, domain, _ = parse(xml)
    return tuple(place.reference for place in places(domain))


def places(domain: Node) -> Iterator[Place]:
    """Yield every reference with its place."""
    yield from _unnamed(domain, "domain", set())
    for where, node in _numbered(domain):
        if node.tag != "metadata":
            yield from _visit((domain, node), where)


def _visit(trail: Trail, where: str) -> Iterator[Place]:
    node = trail[-1]
    if " " in node.tag:
        yield from _foreign(node, where)
        return
    place = _place(trail)
    yield from _of_element(trail, place, where)
    for name, value in node.attributes.items():
        yield from _of_value(trail, place, f"@{name}", where, value)
    if text := node.text.strip():
        yield from _of_value(trail, place, "", where, text)
    for step, child in _numbered(node):
        yield from _visit((*trail, child), f"{where}/{step}")


def _of_element(trail: Trail, place: str, where: str) -> Iterator[Place]:
    for rule in rules_at(place):
        if rule.of is not None and rule.applies(trail) and (value := rule.of(trail)):
            yield from _found(rule, trail, "", where, value)


def _of_value(trail: Trail, place: str, suffix: str, where: str, value: str) -> Iterator[Place]:
    """Yield what an attribute or the text refers to. An absolute path that no rule names is UNKNOWN."""
    rules = (rule for rule in rules_at(place + suffix) if rule.of is None and rule.applies(trail))
    rule = next(rules, None)
    if rule is not None and value:
        yield from _found(rule, trail, suffix, where, value)
    elif value.startswith("/"):
        unknown = Reference(_kind(trail), where + suffix, value, Role.UNKNOWN)
        yield Place(unknown, trail[-1], suffix[1:] or None)


def _found(rule: Rule, trail: Trail, suffix: str, where: str, value: str) -> Iterator[Place]:
    if rule.role is Role.INERT and not value.startswith("/"):
        return
    if rule.role is Role.EXCLUSIVE and value in ("-1", "0"):  # libvirt chooses one
        return
    reference = Reference(rule.kind or _kind(trail), where + suffix, value, rule.role, rule.made)
    yield Place(reference, trail[-1], suffix[1:] or None)


def _place(trail: Trail) -> str:
    """Return the path of tags, in which the sources of a chain of images are the disk's own."""
    tags: list[str] = []
    for node in trail[1:]:
        if tags and tags[-1] in _CHAIN:
            tags.pop()
            if tags[-1:] == ["source"]:  # a <dataStore> lies in the source that it belongs to
                tags.pop()
        tags.append(node.tag)
    return "/".join(tags)


def _kind(trail: Trail) -> str:
    chain = [_CHAIN[node.tag] for node in trail if node.tag in _CHAIN]
    if chain:
        return chain[-1]
    return trail[2].tag if len(trail) > 2 and trail[1].tag in ("devices", "os") else trail[1].tag


def _numbered(parent: Node) -> Iterator[tuple[str, Node]]:
    """Yield each child with its step: its name, and a number where several have that name and for every device."""
    counts: dict[str, int] = {}
    for child in parent.children:
        counts[child.tag] = counts.get(child.tag, 0) + 1
    seen: dict[str, int] = {}
    for child in parent.children:
        number = seen.get(child.tag, 0)
        seen[child.tag] = number + 1
        name = command_line.printed(child.tag)
        yield (f"{name}[{number}]" if counts[child.tag] > 1 or parent.tag == "devices" else name), child


def _foreign(node: Node, where: str) -> Iterator[Place]:
    """Yield what an element of another namespace refers to: QEMU's are known, everything of others is UNKNOWN."""
    uri, _, name = node.tag.rpartition(" ")
    unknown = Reference(name, where, uri, Role.UNKNOWN)
    known = list(command_line.references(node, where)) if command_line.is_known(node.tag) else [unknown]
    yield from (Place(reference, node) for reference in known)
    named = {reference.value for reference in known if reference.role is not Role.COMMAND_LINE}
    for path, below in _below(node, where):
        yield from _unnamed(below, path, named)


def _below(node: Node, where: str) -> Iterator[tuple[str, Node]]:
    yield where, node
    for step, child in _numbered(node):
        yield from _below(child, f"{where}/{step}")


def _unnamed(node: Node, where: str, named: set[str]) -> Iterator[Place]:
    said = {f"@{name}": value for name, value in node.attributes.items()} | {"": node.text.strip()}
    for suffix, value in said.items():
        if value.startswith("/") and value not in named and value.split(",")[0] not in named:
            kind = command_line.printed(node.tag)
            yield Place(Reference(kind, where + suffix, value, Role.UNKNOWN), node, suffix[1:] or None)
