"""The destination is looked at again when its VM changes meanwhile: facts of one moment, not a mixture."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvm_clone.hosts import domains, survey
from kvm_clone.hosts.libvirt_host import LibvirtHost

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
