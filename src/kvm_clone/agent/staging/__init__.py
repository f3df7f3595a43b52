"""What an operation does to the destination's filesystem: journal, locks, staged files, merge, and their end."""
