"""Everything in a domain definition that refers to the host it was written on. Pure: text in, references out.

`rules.py` is the table of what libvirt documents, `walk.py` goes over a definition by it, `command_line.py` reads what
is passed to QEMU behind libvirt's back. An absolute path that no rule names is a reference of role UNKNOWN.
"""

from kvm_clone.definition.references.model import Reference, Role
from kvm_clone.definition.references.walk import references

__all__ = ["Reference", "Role", "references"]
