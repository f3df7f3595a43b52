"""One host: its connection, its agent, its libvirt, and what they say of it."""
