"""What libvirt's exceptions say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import libvirt

from kvm_clone.errors import InterruptedTransferError, TransferError


def message_of(error: libvirt.libvirtError) -> str:
    """Libvirt's message; that of its Python binding when the binding failed and libvirt itself has set no error."""
    return error.get_error_message() or str(error)


@contextlib.contextmanager
def failing_as(what: str, subject: str) -> Iterator[None]:
    """Turn libvirt's errors into TransferError that says what was being done; a lost daemon is an interruption."""
    try:
        yield
    except libvirt.libvirtError as error:
        kind = InterruptedTransferError if daemon_is_gone(error) else TransferError
        raise kind(f"{what}: {message_of(error)}", subject=subject) from error


def daemon_is_gone(error: libvirt.libvirtError) -> bool:
    """Whether the connection is lost.

    There is no code for it: libvirt's socket layer says it in words (rpc/virnetclient.c, rpc/virnetsocket.c).
    """
    texts = (
        "client socket is closed",
        "Broken pipe",
        "End of file while reading",
        "Cannot recv data",
        "Connection reset",
    )
    return any(text in message_of(error) for text in texts)
