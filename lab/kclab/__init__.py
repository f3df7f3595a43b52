"""A lab of libvirt hosts in namespaces of one Linux machine (Python 3.9, standard library only)."""
