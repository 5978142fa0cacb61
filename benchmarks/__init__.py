"""Pause, RAM copy and brown-out of an update, measured from outside the VMM."""

import sys
from pathlib import Path

# The harness of VMM processes is the tests'.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
