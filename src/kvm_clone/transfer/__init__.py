"""Content between two hosts: streams, digests, and the copy of each asset."""
