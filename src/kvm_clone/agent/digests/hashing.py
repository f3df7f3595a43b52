"""The keyed functions that blocks are digested by.

Two hosts that compare their blocks need no function that nobody can find collisions of, only one that nobody could
have prepared them for: the controller draws a key for each comparison, after the content was written. Poly1305 (RFC
8439) is made for that. Two different blocks of 64 KiB have the same digest under one key in 2^90, whatever they hold,
and it takes a fifth of SHA-256's time. hashlib does not offer it, but the libcrypto that hashlib has loaded does, from
OpenSSL 3.0 on; where it does not (older, or in FIPS mode), SHA-256 over key and block stands in, cut to the same size.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError

POLY1305, SHA256 = "poly1305", "sha256"

KEY_BYTES = 32
"""Poly1305's; SHA-256 takes the same."""

SIZE = 16
"""Bytes of one block's digest."""

Digest = Callable[[memoryview], bytes]
"""The digest of a writable view's content, which is not changed. Not for two threads at once."""


class How(NamedTuple):
    """The function that both hosts use, by its name, and their key."""

    method: str
    key: bytes


def supported() -> List[str]:
    """The functions that this host has, the fastest first."""
    return [POLY1305, SHA256] if _has_poly1305() else [SHA256]


@contextlib.contextmanager
def opened(how: How) -> Iterator[Digest]:
    """The function. Raises AgentError when this host does not have it."""
    if how.method == SHA256:
        yield functools.partial(_sha256, hashlib.sha256(how.key))
    elif how.method == POLY1305 and _has_poly1305():
        with _poly1305(_libcrypto(), how.key) as digest:
            yield digest
    else:
        raise AgentError(UNSUPPORTED, f"this host cannot digest by {how.method}")


def _sha256(keyed: Any, view: memoryview) -> bytes:
    state = keyed.copy()
    state.update(view)
    return bytes(state.digest()[:SIZE])


@contextlib.contextmanager
def _poly1305(libcrypto: Any, key: bytes) -> Iterator[Digest]:
    """Poly1305 by libcrypto's EVP_MAC functions, see EVP_MAC(3). Raises OSError when it does not have it."""
    mac = libcrypto.EVP_MAC_fetch(None, b"POLY1305", None)
    context = libcrypto.EVP_MAC_CTX_new(mac) if mac else None
    out, length = ctypes.create_string_buffer(SIZE), ctypes.c_size_t()

    def digest(view: memoryview) -> bytes:
        first = ctypes.c_char.from_buffer(view)
        done = (
            libcrypto.EVP_MAC_init(context, key, len(key), None)
            and libcrypto.EVP_MAC_update(context, ctypes.addressof(first), len(view))
            and libcrypto.EVP_MAC_final(context, out, ctypes.addressof(length), SIZE)
        )
        if not done or length.value != SIZE:
            raise OSError("libcrypto cannot compute Poly1305")
        return out.raw

    try:
        if not context:
            raise OSError("libcrypto has no Poly1305")
        yield digest
    finally:
        libcrypto.EVP_MAC_CTX_free(context)
        libcrypto.EVP_MAC_free(mac)


@functools.lru_cache(maxsize=None)
def _has_poly1305() -> bool:
    """Whether libcrypto's Poly1305 can be had and computes what RFC 8439, section 2.5.2, says."""
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    message = memoryview(bytearray(b"Cryptographic Forum Research Group"))
    library = _libcrypto()
    if library is None:
        return False
    try:
        with _poly1305(library, key) as digest:
            return digest(message) == bytes.fromhex("a8061dc1305136c6c22b8baf0c0127a9")
    except OSError:
        return False


@functools.lru_cache(maxsize=None)
def _libcrypto() -> Optional[Any]:
    """The libcrypto that hashlib's module is linked with, or None: without one, or with one before OpenSSL 3.0."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        for name, answers, takes in _FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = answers, takes
    except (ImportError, OSError, AttributeError):
        return None
    return library


_POINTER = ctypes.c_void_p
_FUNCTIONS = (
    ("EVP_MAC_fetch", _POINTER, [_POINTER, ctypes.c_char_p, ctypes.c_char_p]),
    ("EVP_MAC_free", None, [_POINTER]),
    ("EVP_MAC_CTX_new", _POINTER, [_POINTER]),
    ("EVP_MAC_CTX_free", None, [_POINTER]),
    ("EVP_MAC_init", ctypes.c_int, [_POINTER, ctypes.c_char_p, ctypes.c_size_t, _POINTER]),
    ("EVP_MAC_update", ctypes.c_int, [_POINTER, _POINTER, ctypes.c_size_t]),
    ("EVP_MAC_final", ctypes.c_int, [_POINTER, _POINTER, _POINTER, ctypes.c_size_t]),
)
"""Name, result and arguments, as openssl/evp.h declares them."""
