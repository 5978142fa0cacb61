"""The first step of an update: a guest that can run does so before the VMM is imported."""

from __future__ import annotations

import posix

from cpr.fd_list import ENVIRONMENT_NAME
from cpr.phases import mark

mark("imports")
resumed = False


def resume() -> None:
    """Resumes what the CPR state of this process has; the second call does nothing.

    What goes wrong is found again when the VMM is built, where it can be told.
    """
    global resumed
    if not resumed and ENVIRONMENT_NAME.encode() in posix.environ:
        resumed = True
        from cpr.accel import kvm_resume

        kvm_resume.resume()
