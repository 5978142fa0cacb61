"""The VMMs under test, as a command line names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .target import Target

OWN_VMM = f"{sys.executable} -m cpr.vmm run"

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
HUGE_PAGES = 32

OPTIONS = {
    "--vmm": "command of the VMM of this project: 'python -m cpr.vmm run'",
    "--qemu": "command of a real QEMU with cpr-exec: 'qemu-system-x86_64', 'chroot DIR qemu-…'",
    "--root": "folder that the --qemu command is chrooted to (default: the DIR of chroot DIR)",
}


@contextmanager
def huge_pages() -> Iterator[None]:
    """Huge pages for the row that needs some, where this user may have them; given back."""
    try:
        before = POOL.read_text()
        POOL.write_text(str(HUGE_PAGES + int(before)))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        POOL.write_text(before)


@contextmanager
def targets(vmm: str | None, qemu: str | None, root: str | None) -> Iterator[list[Target]]:
    """The targets, QEMU first; what they have made is removed afterwards."""
    with ExitStack() as stack:
        stack.enter_context(huge_pages())
        found = []
        if qemu:
            found.append(Target("qemu", qemu, root or ""))
            stack.callback(found[-1].close)
        if vmm:
            found.append(Target("cpr", vmm))
            stack.callback(found[-1].close)
        yield found
