"""What libvirt's exceptions say."""

from __future__ import annotations

import libvirt


def message_of(error: libvirt.libvirtError) -> str:
    """Libvirt's message; that of its Python binding when the binding failed and libvirt itself has set no error."""
    return error.get_error_message() or str(error)
