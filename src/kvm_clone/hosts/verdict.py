"""What libvirt says of a definition, asked without defining anything. The calls block.

libvirt has no call for that. domainXMLToNative builds QEMU's whole command line: it refuses what a define accepts (a
missing volume, secret or NUMA node, huge pages, host devices), and the daemon of libvirt 9.0 dies of an interface of
type hostdev. So libvirt is asked to define the VM under a name that ends with a line break. Every driver refuses such a
name since libvirt 2.5, right after it has read and validated everything else and before it looks at what it has: that
very error says that the definition passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import libvirt

from kvm_clone.hosts.libvirt_errors import daemon_is_gone, message_of

IMPOSSIBLE = "\n"
"""What ends the name of a definition that is only to be judged."""

_NO_ANSWER = frozenset(
    {
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_ERR_OPERATION_DENIED,
        libvirt.VIR_ERR_ACCESS_DENIED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)
"""Errors that say nothing of the definition."""


@dataclass(frozen=True)
class Verdict:
    """Why libvirt refuses a definition, or why it cannot be asked; nothing of both where it accepts it."""

    refusal: str = ""
    unknown: str = ""


def judge(connection: libvirt.virConnect, xml: str) -> Verdict:
    """Return what libvirt says of a definition whose name is impossible. It blocks.

    Raises libvirt.libvirtError when the daemon is gone.
    """
    try:
        connection.defineXML(xml).undefine()  # no libvirt is known to get as far as undefine
    except libvirt.libvirtError as error:
        if daemon_is_gone(error):
            raise
        if _is_only_the_name(error):
            return Verdict()
        said = message_of(error)
        return Verdict(unknown=said) if error.get_error_code() in _NO_ANSWER else Verdict(said)
    return Verdict()


def _is_only_the_name(error: libvirt.libvirtError) -> bool:
    """Whether the name was the only thing that was wrong. Malformed XML has the same code, and says where it is."""
    return error.get_error_code() == libvirt.VIR_ERR_XML_DETAIL and "(domain_definition)" not in message_of(error)
