"""Conformance: one table of rows, held by this VMM and by a real QEMU alike.

A row starts VMMs, drives them and says what must be seen: on the QMP socket, on HMP, on stderr, in
the exit status and in /proc.  Nothing here imports the VMM under test.

    python -m tests.conformance --vmm 'python -m cpr.vmm run' --qemu qemu-system-x86_64
    python -m pytest tests/conformance --vmm 'python -m cpr.vmm run'

The row's `source` names the part and line of the record of how QEMU 11.1.3 behaves that
the row was made from.  Where QEMU crashes, aborts, leaks or loses the guest, the row carries two
expectations: what QEMU does, and the clear error that this VMM gives instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The harness is beside this folder, wherever Python was started.
sys.path.append(str(Path(__file__).resolve().parent.parent))
