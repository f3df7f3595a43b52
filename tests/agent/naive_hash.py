"""The keyed functions of blocks by their definitions, slow and plain."""

from __future__ import annotations

import hashlib

from kvm_clone.agent.digests.hashing import POLY1305, SHA256, How

KEY = bytes(range(100, 132))

BY_SHA256, BY_POLY1305 = How(SHA256, KEY), How(POLY1305, KEY)


def naive_hash(how: How, content: bytes) -> bytes:
    """The digest of one block."""
    if how.method == SHA256:
        return hashlib.sha256(how.key + content).digest()[:16]
    return poly1305(how.key, content)


def poly1305(key: bytes, message: bytes) -> bytes:
    """RFC 8439, section 2.5.1."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for at in range(0, len(message), 16):
        total = (total + int.from_bytes(message[at : at + 16] + b"\x01", "little")) * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(key[16:], "little")) % (1 << 128)).to_bytes(16, "little")
