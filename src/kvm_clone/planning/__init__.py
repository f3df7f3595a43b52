"""From facts to findings and steps. Pure: nothing here asks a host, and libvirt need not be installed."""
