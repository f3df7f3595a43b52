"""What libvirt's exceptions say, also those that libvirt itself has set no error for."""

from __future__ import annotations

import libvirt
import pytest

from kvm_clone.errors import TransferError
from kvm_clone.hosts.libvirt_errors import failing_as, message_of


def test_an_error_of_the_binding_has_its_own_words() -> None:
    libvirt.virResetLastError()  # an earlier one of this thread would be taken for its own
    error = libvirt.libvirtError("virDomainGetXMLDesc() failed")
    assert error.get_error_message() is None
    assert message_of(error) == "virDomainGetXMLDesc() failed"
    words = r"^asking a: virDomainGetXMLDesc\(\) failed$"
    with pytest.raises(TransferError, match=words), failing_as("asking a", "a"):
        raise error
