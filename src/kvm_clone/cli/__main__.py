"""`python -m kvm_clone.cli`."""

from kvm_clone.cli import main

main()
