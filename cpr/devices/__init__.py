"""Emulated devices; each is one file and one line in the machine's table."""
