"""The VMMs under test, as a command line names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .target import Target

OPTIONS = {
    "--vmm": "command of the VMM of this project: 'python -m cpr.vmm run'",
    "--qemu": "command of a real QEMU with cpr-exec: 'qemu-system-x86_64', 'chroot DIR qemu-…'",
    "--root": "folder that the --qemu command is chrooted to (default: the DIR of chroot DIR)",
}


@contextmanager
def targets(vmm: str | None, qemu: str | None, root: str | None) -> Iterator[list[Target]]:
    """The targets, QEMU first; what they have made is removed afterwards."""
    with ExitStack() as stack:
        found = []
        if qemu:
            found.append(Target("qemu", qemu, root or ""))
            stack.callback(found[-1].close)
        if vmm:
            found.append(Target("cpr", vmm))
            stack.callback(found[-1].close)
        yield found
