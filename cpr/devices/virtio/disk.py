"""The disk in C, as an object: threads that do the requests of virtqueues on a file."""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.devices.virtio.native import MOST_DESCRIPTORS
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.devices.virtio.native import Queue

MOST_QUEUES = lib.CPR_BLK_QUEUES_MOST
SERIAL_SIZE = lib.CPR_BLK_SERIAL_SIZE
POLICIES = {
    "report": lib.CPR_BLK_REPORT,
    "ignore": lib.CPR_BLK_IGNORE,
    "stop": lib.CPR_BLK_STOP,
    "enospc": lib.CPR_BLK_ENOSPC,
}


class Disk:
    """Requests of `queues` on the file `fd`, which stays the caller's, as the queues do.

    `sectors` is its size in 512 bytes; `discards` whether blocks may be given back to the file
    system, `syncs` whether a flush is one; `read_error` and `write_error` are werror='s words.
    `halted` is an eventfd that is written when a request has failed and is kept until the next
    `start`; it is the disk's own.
    """

    def __init__(
        self,
        fd: int,
        sectors: int,
        queues: Sequence[Queue],
        readonly: bool,
        discards: bool,
        syncs: bool,
        read_error: str,
        write_error: str,
        serial: bytes,
    ) -> None:
        """Raises KernelError."""
        self.halted = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queues = list(queues)
        options = ffi.new("struct cpr_blk_options *")
        options.fd, options.sectors, options.queues = fd, sectors, len(queues)
        options.readonly, options.discards, options.syncs = readonly, discards, syncs
        options.read_error, options.write_error = POLICIES[read_error], POLICIES[write_error]
        options.halted = self.halted
        options.serial = serial[:SERIAL_SIZE].ljust(SERIAL_SIZE, b"\0")
        made = ffi.new("struct cpr_blk **")
        error = lib.cpr_blk_new(options, made)
        if error:
            os.close(self.halted)
            raise KernelError("a disk's epoll instance and eventfds", -error)
        self._disk = made[0]
        for index, queue in enumerate(queues):
            error = lib.cpr_blk_set_queue(self._disk, index, queue.pointer, queue.kick)
            if error:
                self.free()
                raise KernelError("epoll_ctl for a queue of a disk", -error)

    def start(self, workers: int) -> None:
        """Raises KernelError where there can be no thread."""
        error = lib.cpr_blk_start(self._disk, workers)
        if error:
            raise KernelError("a thread of a disk", -error)

    def stop(self) -> None:
        """The inverse of `start`: waits until all requests that were taken are done, or kept."""
        lib.cpr_blk_stop(self._disk)

    def set_write_through(self, on: bool) -> None:
        """Whether each write is on the disk before the guest is told that it is done."""
        lib.cpr_blk_set_write_through(self._disk, on)

    def error(self) -> tuple[int, bool]:
        """What has halted it: an errno, 0 for nothing, and whether it was a write."""
        error = ffi.new("struct cpr_blk_error *")
        lib.cpr_blk_last_error(self._disk, error)
        return int(error.error), bool(error.is_write)

    @property
    def sync_error(self) -> int:
        """The errno of the fdatasync that has failed, so that all others fail too; 0 for none."""
        return int(lib.cpr_blk_sync_error(self._disk))

    @sync_error.setter
    def sync_error(self, error: int) -> None:
        """It must not be running."""
        lib.cpr_blk_set_sync_error(self._disk, error)

    @property
    def kept(self) -> list[tuple[int, int]]:
        """The requests that are kept: their queue, and the head of their chain."""
        found = []
        heads = ffi.new("uint16_t[]", MOST_DESCRIPTORS)
        for index in range(len(self._queues)):
            count = lib.cpr_blk_kept(self._disk, index, heads)
            found += [(index, heads[i]) for i in range(count)]
        return found

    @kept.setter
    def kept(self, requests: list[tuple[int, int]]) -> None:
        for index in range(len(self._queues)):
            heads = [head for queue, head in requests if queue == index]
            lib.cpr_blk_keep(self._disk, index, heads, len(heads))

    def free(self) -> None:
        """It must not be running."""
        lib.cpr_blk_free(self._disk)
        os.close(self.halted)


def configuration(
    sectors: int, segments: int, block_size: int, queues: int, most_sectors: int
) -> bytearray:
    """struct virtio_blk_config (virtio 1.2, 5.2.4), with `most_sectors` of one discard."""
    config = ffi.new("struct virtio_blk_config *")
    config.capacity, config.seg_max, config.blk_size = sectors, segments, block_size
    config.wce, config.num_queues = 1, queues
    config.max_discard_sectors = config.max_write_zeroes_sectors = most_sectors
    config.max_discard_seg = config.max_write_zeroes_seg = 1
    config.discard_sector_alignment = 1
    config.write_zeroes_may_unmap = 1
    return bytearray(ffi.buffer(config))


WCE_OFFSET = ffi.offsetof("struct virtio_blk_config", "wce")
