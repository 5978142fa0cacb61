"""Memory of a memfd that is written through a mapping.

A memfd takes any size, and has no memory before it is written: a store for which there is none
(vm.overcommit_memory=2, a tmpfs that is full) ends the process by SIGBUS.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14; mmap has no name for it


def populate(view: mmap.mmap, fd: int) -> None:
    """Gives all of the shared mapping `view` of `fd` its memory.  Raises OSError.

    Not by fallocate(2) where that can be: see fds.write_memfd on huge pages.
    """
    try:
        view.madvise(MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.EFAULT:  # what would be a SIGBUS
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
        if error.errno != errno.EINVAL:
            raise
        os.posix_fallocate(fd, 0, len(view))
