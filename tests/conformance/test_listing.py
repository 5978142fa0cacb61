"""docs/conformance.md is what `python -m tests.conformance --list` prints."""

from __future__ import annotations

import subprocess
import sys

from harness.vm import ROOT


def test_the_listing_in_the_documentation_is_this_one() -> None:
    command = [sys.executable, "-m", "tests.conformance", "--list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "conformance.md").read_text() == listed.stdout
