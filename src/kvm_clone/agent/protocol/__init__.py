"""What crosses the wire: frames, records, errors, and bytes moved by the kernel."""
