"""The way back from an update whose guest is still with its child: the old VMM, by exec.

The child runs the guest on all the while.  The old command takes it over as the new one would have
done, under the same PID; where this process dies instead, the child starts that command itself.
"""

from __future__ import annotations

import os
import sys
from _thread import start_new_thread

from cpr import fd_list
from cpr.accel import kvm_resume
from cpr.state.fds import write_memfd
from cpr.uapi import mm_holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.kvm_resume import ResumedVm
    from cpr.migration.migration import Migration
    from cpr.state.fds import PreservedFds

MOST_RETURNS = 3
START_NS = 500_000_000
ENDED = "the new VMM ended before it took the guest over"


def leave(status: int) -> None:
    """This VMM ends; where it has not got its guest, its load failed or it was told to quit."""
    if kvm_resume.image is None:
        return
    if status:
        go(ENDED)
    else:
        kvm_resume.end_guest()


def go(text: str) -> None:
    """Executes the old command, where a guest waits for it; `text` says why.

    Comes back only where that cannot be; the child then does it.
    """
    image = kvm_resume.image
    if image is None or image.returns >= MOST_RETURNS:
        return
    image.returns += 1
    kvm_resume.set_text(image, "refusal", text)
    words = kvm_resume.command()
    fd = os.memfd_create(fd_list.ENVIRONMENT_NAME, 0)
    write_memfd(fd, kvm_resume.state)
    os.environ[fd_list.ENVIRONMENT_NAME] = str(fd)
    for number, copy in kvm_resume.copies.items():
        os.dup2(copy, number)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(words[0], words)
    except OSError as problem:
        print(f"cpr-vmm: cannot go back: execv {words[0]}: {problem.strerror}", file=sys.stderr)


def forget(resumed: ResumedVm, fds: PreservedFds, migration: Migration) -> None:
    """The guest runs here: gives up what was kept for the way back, and says if this is it.

    This process's threads stay off the vCPUs' CPUs for as long as it still starts.
    """
    migration.loop.call_later(START_NS, kvm_resume.restore_affinity)
    if resumed.image.child:
        start_new_thread(mm_holder.reap, ([resumed.image.child],))
    text = kvm_resume.text("refusal") or ENDED if resumed.image.returns else ""
    if text:
        print(
            f"cpr-vmm: the update failed: {text}; the guest goes on in the old VMM, PID "
            f"{os.getpid()}",
            file=sys.stderr,
        )
        migration.set_incoming_status("failed", text)
        _remove_directory(kvm_resume.text("directory"))
    migration.notice = kvm_resume.text("notice")
    kvm_resume.close(fds)


def _remove_directory(directory: str) -> None:
    from cpr.migration.cpr_exec import remove_directory

    if directory:
        remove_directory(directory)
