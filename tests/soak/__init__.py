"""Runs that take long, and are started by hand."""
