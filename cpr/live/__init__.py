"""Live update of a process by exec, as a transaction; `update` tells it from top to bottom.

Nothing here knows of VMs.
"""
