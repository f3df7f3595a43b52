"""The destination is looked at again when its VM changes meanwhile, and an image that cannot be locked is known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.definition.domain_xml import DiskXml
from kvm_clone.hosts import domains, survey
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.libvirt_host import LibvirtHost
from kvm_clone.planning.domain_facts import SHUT_OFF
from kvm_clone.planning.facts import ImageFacts

A, B, C, D = (SimpleNamespace(xml=text) for text in "abcd")

LOOKS: dict[str, tuple[list[Any], list[Any], Any]] = {
    "nothing there": ([None], [None], None),
    "unchanged": ([A], [A], A),
    "sealed meanwhile": ([A, B], [B, B], B),
    "it appears": ([None, A], [A, A], A),
    "it goes": ([A, None], [None, None], None),
    "it never rests": ([A, B, C], [B, C, D], C),
}
"""What each look finds, what is there after each, and what counts in the end."""


@pytest.mark.parametrize("what", LOOKS)
def test_the_destination_is_seen_at_one_moment(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, after, expected = LOOKS[what]
    found: Iterator[Any] = iter(seen)
    there: Iterator[Any] = iter(after)

    async def look(*_: object, **how: object) -> Any:
        domain = next(found)
        return SimpleNamespace(existing=None if domain is None else SimpleNamespace(domain=domain))

    monkeypatch.setattr(survey, "_destination", look)
    monkeypatch.setattr(domains, "find", lambda connection, name: next(there))
    host: Any = SimpleNamespace(name="kc-b")
    nothing: Any = None
    facts = asyncio.run(survey._settled(host, LibvirtHost("kc-b", nothing), nothing, "web", replica=True))
    assert (facts.existing.domain if facts.existing is not None else None) is expected
    assert list(found) == []
    assert list(there) == []


class Refusing:
    """An agent that answers every call with an error of one kind."""

    name = "kc-a"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def call(self, name: str, progress: Any = None, /, **arguments: Any) -> Any:
        raise AgentCallError(self.kind, f"{name} of {arguments['path']}", self.name)


@pytest.mark.parametrize(("kind", "in_use"), [(kinds.IN_USE, True), (kinds.IO, False)])
def test_an_error_says_whether_the_image_is_in_use(kind: str, in_use: bool) -> None:
    host: Any = SimpleNamespace(name="kc-a", agent=AgentClient(Refusing(kind)))
    disk = DiskXml("vda", "virtio", "disk", "file", "raw", "/a")
    image = asyncio.run(survey._disk(host, disk, SHUT_OFF))
    assert image == ImageFacts("/a", "raw", target="vda", error="kc-a: lock_image of /a", in_use=in_use)
