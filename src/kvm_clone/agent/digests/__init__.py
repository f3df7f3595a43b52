"""Digests of a disk's content, and finding what differs by them."""
