"""Edit XML without reserialising it: a tree that knows where in the bytes each element lies.

What is not edited stays byte for byte as it was: quotes, space, comments, CDATA, other tools' namespaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from xml.parsers import expat

from kvm_clone.errors import RefusedError

_QUOTED = rb"\"[^\"]*\"|'[^']*'"
_START_TAG = re.compile(rb"<(?:[^>\"']|" + _QUOTED + rb")*>")
_ATTRIBUTE = re.compile(rb"\s+([^\s=]+)\s*=\s*(" + _QUOTED + rb")")
_MARGIN = re.compile(r"\r?\n[ \t]*\Z")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"},
)


@dataclass
class Node:
    """One element. `tag` is the bare name when it is in no namespace, otherwise "URI name"."""

    tag: str
    attributes: dict[str, str]
    start: int
    tag_end: int
    content_end: int = 0
    end: int = 0
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def find_all(self, *path: str) -> Iterator[Node]:
        """Yield, in document order, the elements that `path` leads to, one child's tag a step."""
        for child in self.children:
            if child.tag == path[0]:
                if len(path) == 1:
                    yield child
                else:
                    yield from child.find_all(*path[1:])

    def find(self, *path: str) -> Node | None:
        """Return the first element that `path` leads to."""
        return next(self.find_all(*path), None)

    def find_text(self, *path: str) -> str | None:
        """Return the trimmed text of the first element that `path` leads to; None when there is none."""
        found = self.find(*path)
        return found.text.strip() or None if found else None

    def find_attributes(self, *path: str) -> dict[str, str]:
        """Return the attributes of the first element that `path` leads to; none when it leads nowhere."""
        found = self.find(*path)
        return found.attributes if found else {}

    def walk(self) -> Iterator[Node]:
        """Yield every element below this one, in document order."""
        pending = self.children[::-1]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children[::-1]


class Document:
    """A parsed document and edits of it; `result` applies them."""

    def __init__(self, xml: str) -> None:
        """Parse `xml`.

        Raises RefusedError when it is malformed, or has a DOCTYPE: its entities could hold markup that has no
        place in the bytes, and libvirt never prints one.
        """
        try:
            self._raw = xml.encode()
            self.root = _Builder(self._raw).build()
        except (UnicodeEncodeError, expat.ExpatError) as error:
            raise RefusedError(f"The domain XML is malformed: {error}.") from error
        self._edits: list[tuple[int, int, str]] = []

    def result(self) -> str:
        """Return the document with every edit applied."""
        parts: list[bytes] = []
        position = 0
        # The sort is stable: insertions at one place stay in the order they were asked for.
        for start, end, replacement in sorted(self._edits, key=lambda edit: edit[0]):
            parts += self._raw[position:start], replacement.encode()
            position = max(position, end)  # an insertion may follow a replacement at the same place
        return b"".join([*parts, self._raw[position:]]).decode()

    def replace(self, node: Node, markup: str) -> None:
        """Replace the whole element by `markup`."""
        self._edits.append((node.start, node.end, markup))

    def insert_after(self, node: Node, markup: str) -> None:
        """Insert `markup` right after the element."""
        self._edits.append((node.end, node.end, markup))

    def append(self, node: Node, markup: str, closing: str = "") -> None:
        """Insert `markup` after the last of the element's content, and `closing` if it had none at all."""
        if node.content_end == node.end:
            slash = self._raw.rindex(b"/", node.start, node.tag_end)
            self._edits.append((slash, node.end, f">{markup}{closing}</{node.tag}>"))
            return
        content = self._raw[node.tag_end : node.content_end]
        position = node.tag_end + len(content.rstrip(b" \t\r\n"))
        self._edits.append((position, position, markup if content else markup + closing))

    def set_text(self, node: Node, text: str) -> None:
        """Make `text` the element's content. Raises RefusedError as `escape` does."""
        if node.text == text:
            return
        if node.content_end == node.end:
            self.append(node, escape(text))
        else:
            self._edits.append((node.tag_end, node.content_end, escape(text)))

    def set_attribute(self, node: Node, name: str, value: str) -> None:
        """Give the element's attribute another value, within the quotes it has.

        Raises RefusedError when it has no such attribute, and as `escape` does.
        """
        if node.attributes.get(name) == value:
            return
        for match in _ATTRIBUTE.finditer(self._raw, node.start, node.tag_end):
            if match[1] == name.encode():
                start, end = match.span(2)
                self._edits.append((start + 1, end - 1, escape(value, quote=match[2][:1].decode())))
                return
        raise RefusedError(f"The domain XML has a <{node.tag}> without {name}.")

    def set_attributes(self, node: Node, attributes: Mapping[str, str]) -> None:
        """Give the element these attributes in place of those that it has. Raises RefusedError as `escape` does."""
        written = "".join(f' {name}="{escape(value, quote=chr(34))}"' for name, value in attributes.items())
        empty = node.content_end == node.tag_end == node.end
        self._edits.append((node.start, node.tag_end, f"<{node.tag}{written}{'/' if empty else ''}>"))

    def markup(self, node: Node) -> str:
        """Return the element as it is written, edits left out."""
        return self._raw[node.start : node.end].decode()

    def margin(self, node: Node) -> str:
        """Return the line break and indentation before the element; empty when it shares its line."""
        match = _MARGIN.search(self._raw[: node.start].decode())
        return match[0] if match else ""


def is_xml(text: str) -> bool:
    """Whether every character of `text` can stand in XML."""
    return _NOT_XML.search(text) is None


def escape(text: str, quote: str = "") -> str:
    """Return `text` as it may stand in an element, or in an attribute within `quote`.

    Raises RefusedError when it holds a character that XML cannot.
    """
    if not is_xml(text):
        raise RefusedError(f"{text!r} holds a character that a domain's XML cannot.")
    escaped = text.translate(_ESCAPES)
    return escaped.replace(quote, "&quot;" if quote == '"' else "&apos;") if quote else escaped


class _Builder:
    """Expat's handlers, which make the tree of nodes."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._top = Node("", {}, 0, 0)
        self._open = [self._top]
        # The encoding given here wins over the one in an XML declaration: the bytes were encoded by us.
        self._parser = expat.ParserCreate("utf-8", namespace_separator=" ")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._doctype

    def build(self) -> Node:
        self._parser.Parse(self._raw, True)
        return self._top.children[0]

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        start = self._parser.CurrentByteIndex
        match = _START_TAG.match(self._raw, start)
        if match is None:
            raise RefusedError(f"The domain XML has an unreadable <{tag}>.")
        node = Node(tag, attributes, start, match.end())
        self._open[-1].children.append(node)
        self._open.append(node)

    def _end(self, _tag: str) -> None:
        node = self._open.pop()
        if self._raw.endswith(b"/>", node.start, node.tag_end):
            node.content_end = node.end = node.tag_end
        else:
            node.content_end = self._parser.CurrentByteIndex
            node.end = self._raw.index(b">", node.content_end) + 1

    def _text(self, text: str) -> None:
        self._open[-1].text += text

    def _doctype(self, *_declaration: object) -> None:
        raise RefusedError("The domain XML has a DOCTYPE, which is not supported.")
