"""The HMP and QMP monitors and their one table of commands."""
