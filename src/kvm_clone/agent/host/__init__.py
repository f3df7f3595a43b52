"""What the host is and has: facts, what its definitions refer to, who uses its files, and how it reaches another."""
