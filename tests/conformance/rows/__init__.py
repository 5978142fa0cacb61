"""The rows, a module for each part of the behaviour."""
