"""What interrupted operations have left: on hosts, and in the log of this machine."""
