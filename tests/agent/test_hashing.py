"""The functions that blocks are digested by: what they compute, and what happens where libcrypto lacks one."""

from __future__ import annotations

import _hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_clone.agent.digests import hashing
from kvm_clone.agent.digests.hashing import How
from kvm_clone.agent.protocol import errors
from kvm_clone.agent.protocol.errors import AgentError

from .naive_hash import BY_POLY1305, BY_SHA256, KEY, naive_hash
from .tools import noise

BOTH = (BY_POLY1305, BY_SHA256)

needs_poly1305 = pytest.mark.skipif(
    hashing.POLY1305 not in hashing.supported() and os.environ.get("CI") != "true",
    reason="this Python's OpenSSL has no Poly1305",
)


def of(how: How, content: bytes) -> bytes:
    with hashing.opened(how) as digest:
        return digest(memoryview(bytearray(content)))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is known of libcrypto is found out anew."""
    for cached in (hashing._has_poly1305, hashing._libcrypto):
        cached.cache_clear()
    yield
    for cached in (hashing._has_poly1305, hashing._libcrypto):
        cached.cache_clear()


@needs_poly1305
def test_the_fastest_comes_first() -> None:
    assert hashing.supported() == [hashing.POLY1305, hashing.SHA256]


@needs_poly1305
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BOTH), st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=200))
def test_against_the_definition(how: How, key: bytes, content: bytes) -> None:
    keyed = how._replace(key=key)
    assert of(keyed, content) == naive_hash(keyed, content)
    assert len(of(keyed, content)) == hashing.SIZE


@needs_poly1305
@pytest.mark.parametrize("how", BOTH, ids=lambda how: how.method)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 4095, 4096, 65535, 65536])
def test_lengths_around_the_units(how: How, length: int) -> None:
    assert of(how, noise(length)) == naive_hash(how, noise(length))
    assert of(how, bytes(length)) == naive_hash(how, bytes(length))


@needs_poly1305
@pytest.mark.parametrize("how", BOTH, ids=lambda how: how.method)
def test_every_byte_the_length_and_the_key_count(how: How) -> None:
    content = noise(500)
    seen = {of(how, content), of(how, content + b"\0"), of(how._replace(key=KEY[::-1]), content)}
    for at in range(len(content)):
        seen.add(of(how, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]))
    assert len(seen) == len(content) + 3


@needs_poly1305
@pytest.mark.parametrize("how", BOTH, ids=lambda how: how.method)
def test_one_after_the_other_and_in_threads(how: How) -> None:
    blocks = [noise(3000, seed) for seed in range(20)]
    expected = [naive_hash(how, block) for block in blocks]
    with hashing.opened(how) as digest:
        assert [digest(memoryview(bytearray(block))) for block in blocks] == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda block: of(how, block), blocks)) == expected


@needs_poly1305
def test_a_view_within_a_buffer_is_left_as_it_is() -> None:
    buffer = bytearray(noise(1000))
    with hashing.opened(BY_POLY1305) as digest:
        assert digest(memoryview(buffer)[100:333]) == naive_hash(BY_POLY1305, bytes(buffer[100:333]))
    assert buffer == noise(1000)


def test_a_function_that_nobody_knows() -> None:
    with pytest.raises(AgentError, match="cannot digest by md4") as caught, hashing.opened(How("md4", KEY)):
        pass
    assert caught.value.kind == errors.UNSUPPORTED


class Lacking:
    """libcrypto whose function of one name answers otherwise."""

    def __init__(self, real: Any, name: str, answer: Any) -> None:
        self._real, self._name, self._answer = real, name, answer

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: self._answer) if name == self._name else getattr(self._real, name)


@needs_poly1305
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    "name", ["EVP_MAC_fetch", "EVP_MAC_CTX_new", "EVP_MAC_init", "EVP_MAC_update", "EVP_MAC_final"]
)
def test_a_libcrypto_that_refuses(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As in FIPS mode, which has no Poly1305."""
    lacking = Lacking(hashing._libcrypto(), name, None if name in ("EVP_MAC_fetch", "EVP_MAC_CTX_new") else 0)
    monkeypatch.setattr(hashing, "_libcrypto", lambda: lacking)
    assert hashing.supported() == [hashing.SHA256]
    with pytest.raises(AgentError, match="cannot digest by poly1305"), hashing.opened(BY_POLY1305):
        pass
    assert of(BY_SHA256, b"x") == naive_hash(BY_SHA256, b"x")


@needs_poly1305
@pytest.mark.usefixtures("forgotten")
def test_a_libcrypto_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = hashing._libcrypto()

    def init(context: Any, key: bytes, length: int, parameters: Any) -> int:
        return int(real.EVP_MAC_init(context, key[::-1], length, parameters))

    wrong = SimpleNamespace(**{name: getattr(real, name) for name, _, _ in hashing._FUNCTIONS})
    wrong.EVP_MAC_init = init
    monkeypatch.setattr(hashing, "_libcrypto", lambda: wrong)
    assert hashing.supported() == [hashing.SHA256]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("library", ["/nowhere/_hashlib.so", __file__])
def test_no_libcrypto(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(_hashlib, "__file__", library)
    assert hashing.supported() == [hashing.SHA256]


@pytest.mark.usefixtures("forgotten")
def test_a_libcrypto_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL 1.1.1 has no EVP_MAC: a library without its names is loaded instead."""
    monkeypatch.setattr(hashing, "_FUNCTIONS", (("EVP_MAC_of_no_release", None, []),))
    assert hashing.supported() == [hashing.SHA256]


@pytest.mark.usefixtures("forgotten")
def test_a_python_that_has_no_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "_hashlib", None)
    assert hashing.supported() == [hashing.SHA256]


@pytest.mark.usefixtures("forgotten")
def test_a_python_with_openssl_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_hashlib, "__file__")
    assert hashing.supported() == [hashing.SHA256]
