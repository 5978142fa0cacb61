"""The command line: `python -m cpr.vmm run`."""
