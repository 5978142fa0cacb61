"""The data path in C, as objects: the RAM that it may touch, and virtqueues."""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Accelerator
    from cpr.memory import GuestMemory

MOST_DESCRIPTORS = lib.CPR_VIRTQUEUE_MOST


class DeviceMemory:
    """All RAM of `memory` that is not read-only; to be freed after the queues that use it."""

    def __init__(self, memory: GuestMemory, accel: Accelerator) -> None:
        """Tells `accel` what is written, if it wants to know.  Raises KernelError."""
        self.pointer = _made(lib.cpr_virtio_memory_new())
        listener = accel.write_listener()
        if listener is not None:
            function, of = (ffi.cast("void *", value) for value in listener)
            function = ffi.cast("void (*)(void *, const void *, uint64_t)", function)
            lib.cpr_virtio_memory_tell(self.pointer, function, of)
        self._blocks = list(memory.blocks)  # whose bitmap cells it points to
        for section in memory.sections:
            if section.readonly:
                continue
            block = section.block
            error = lib.cpr_virtio_memory_add(
                self.pointer,
                section.start,
                section.size,
                block.host + section.offset,
                block.written_cell,
                section.offset // PAGE_SIZE,
            )
            if error:
                self.free()
                raise KernelError(f"the RAM at {section.start:#x} for devices", -error)

    def free(self) -> None:
        lib.cpr_virtio_memory_free(self.pointer)
        self.pointer = ffi.NULL


class Position:
    """Where a queue is in guest-physical space, and how far: indices of the next chain to take and
    of the next one to give back.
    """

    __slots__ = ("available", "descriptors", "next", "size", "used", "used_ring")

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptors = self.available = self.used_ring = 0
        self.next = self.used = 0


class Queue:
    """One virtqueue, off at first.  Methods for chains raise nothing: see each.

    `kick` is an eventfd by which the guest's notifications come to a thread in C, or -1; it is the
    queue's own.  `call` and `error` are those of `set_notifiers`; `size` is what it was enabled
    with.
    """

    def __init__(self, memory: DeviceMemory, kicks: bool) -> None:
        """Raises KernelError."""
        self.pointer = _made(lib.cpr_virtqueue_new(memory.pointer))
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if kicks else -1
        self.call = self.error = -1
        self.size = 0

    def enable(self, position: Position, event_idx: bool, indirect: bool) -> bool:
        """Lets it work from `position` on; false where the guest has put it at no good place."""
        self.size = position.size
        state = ffi.new("struct cpr_virtqueue_state *")
        state.size = position.size
        state.descriptors, state.available = position.descriptors, position.available
        state.used_ring = position.used_ring
        state.next, state.used = position.next, position.used
        state.event_idx, state.indirect = event_idx, indirect
        return bool(lib.cpr_virtqueue_enable(self.pointer, state) == 0)

    def disable(self) -> None:
        """The inverse of `enable`; when it returns, nobody uses the queue."""
        lib.cpr_virtqueue_disable(self.pointer)

    def update(self, position: Position) -> None:
        """Notes how far the queue is."""
        state = ffi.new("struct cpr_virtqueue_state *")
        lib.cpr_virtqueue_position(self.pointer, state)
        position.next, position.used = int(state.next), int(state.used)

    def set_notifiers(self, call: int, error: int) -> None:
        """The eventfds that it writes: for an interrupt, and when it has become broken."""
        self.call, self.error = call, error
        lib.cpr_virtqueue_notifiers(self.pointer, call, error)

    # For who works on it in the queue's place, while it is enabled.

    def places(self) -> tuple[int, int, int] | None:
        """Where descriptors, available and used ring are in this process; None if it is off."""
        places = ffi.new("uint64_t[3]")
        if not lib.cpr_virtqueue_places(self.pointer, places):
            return None
        return int(places[0]), int(places[1]), int(places[2])

    def next(self) -> int:
        """The index of the next chain to take."""
        position = Position(self.size)
        self.update(position)
        return position.next

    def moved(self, following: int) -> None:
        """The chains before index `following` are taken; the others are to be."""
        lib.cpr_virtqueue_moved(self.pointer, following)

    @property
    def problem(self) -> str:
        """Why it is broken, or ""."""
        text = lib.cpr_virtqueue_problem(self.pointer)
        return "" if text == ffi.NULL else ffi.string(text).decode()

    def receive(self, most: int) -> bytes | None:
        """What the guest gives in its next chain; None where there is none.

        A chain of more than `most` bytes makes the queue broken.
        """
        buffer = bytearray(most)
        count = lib.cpr_virtqueue_receive(self.pointer, ffi.from_buffer(buffer), most)
        return bytes(buffer[:count]) if count >= 0 else None

    def peek(self, most: int) -> bytes | None:
        """As `receive`, but the chain stays the next one."""
        buffer = bytearray(most)
        count = lib.cpr_virtqueue_peek(self.pointer, ffi.from_buffer(buffer), most)
        return bytes(buffer[:count]) if count >= 0 else None

    def send(self, data: bytes) -> int:
        """Puts as much of `data` as fits into the guest's next chain; -1 where there is none."""
        return max(-1, int(lib.cpr_virtqueue_send(self.pointer, data, len(data))))

    def send_random(self, most: int) -> int:
        """Fills the guest's next chain with up to `most` random bytes; -1 where there is none."""
        return max(-1, int(lib.cpr_virtqueue_send_random(self.pointer, most)))

    def room(self) -> int:
        """How many bytes the guest's next chain has room for; 0 where there is none."""
        return max(0, int(lib.cpr_virtqueue_room(self.pointer)))

    def free(self) -> None:
        lib.cpr_virtqueue_free(self.pointer)
        self.pointer = ffi.NULL
        if self.kick >= 0:
            os.close(self.kick)
            self.kick = -1


def _made(pointer: Any) -> Any:
    if pointer == ffi.NULL:
        raise KernelError("calloc", errno.ENOMEM)
    return pointer
