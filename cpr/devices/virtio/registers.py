"""The common configuration of a virtio device over PCI (virtio 1.2, 4.1.4.3), and its state."""

from __future__ import annotations

from cpr.devices.virtio.native import MOST_DESCRIPTORS, Position
from cpr.state.vmstate import VMStateDescription, u8, u16, u32, u64, varray
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_32 = 0xFFFFFFFF
TRANSPORT_FEATURES = virtio.F_VERSION_1 | virtio.F_INDIRECT_DESC | virtio.F_EVENT_IDX

VMSTATE_QUEUE = VMStateDescription(
    "virtio-queue",
    1,
    1,
    (
        u16("size"),
        u8("enabled"),
        u16("vector"),
        u64("descriptors"),
        u64("available"),
        u64("used_ring"),
        u16("next"),
        u16("used"),
    ),
)
VMSTATE_COMMON = VMStateDescription(
    "virtio",
    1,
    1,
    (
        u64("guest_features"),
        u32("host_features_sel"),
        u32("guest_features_sel"),
        u16("config_vector"),
        u8("status"),
        u8("config_generation"),
        u16("queue_sel"),
        u16("queue_count"),
        varray("queues", VMSTATE_QUEUE, "queue_count"),
    ),
)


class QueueRegisters:
    """What the guest sets of one queue, of at most `most` descriptors."""

    __slots__ = ("enabled", "most", "position", "vector")

    def __init__(self, most: int) -> None:
        self.most = most
        self.reset()

    def reset(self) -> None:
        self.position = Position(self.most)
        self.vector = virtio.NO_VECTOR
        self.enabled = False

    def save(self) -> dict:
        place = self.position
        names = ("size", "descriptors", "available", "used_ring", "next", "used")
        state: dict = {name: getattr(place, name) for name in names}
        return state | {"enabled": int(self.enabled), "vector": self.vector}

    def restore(self, state: dict) -> None:
        self.position = place = Position(state["size"])
        place.descriptors, place.available = state["descriptors"], state["available"]
        place.used_ring, place.next, place.used = state["used_ring"], state["next"], state["used"]
        self.enabled, self.vector = bool(state["enabled"]), state["vector"]


class CommonConfig:
    """The registers.  `vectors` is how many MSI-X vectors there are.

    `on_reset()`, `on_driver_ok()` and `on_features()` are called when the guest asks for these;
    `on_vectors()` when a vector has become another.
    """

    def __init__(self, features: int, queue_sizes: Sequence[int], vectors: int) -> None:
        self.features = features | TRANSPORT_FEATURES
        self.queues = [QueueRegisters(size) for size in queue_sizes]
        self._vectors = vectors
        self.on_reset: Callable[[], None] = _nothing
        self.on_driver_ok: Callable[[], None] = _nothing
        self.on_features: Callable[[], None] = _nothing
        self.on_vectors: Callable[[], None] = _nothing
        self.reset()

    def reset(self) -> None:
        self.guest_features = 0
        self._host_select = self._guest_select = 0
        self.config_vector = virtio.NO_VECTOR
        self.status = 0
        self.generation = 0
        self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    @property
    def event_idx(self) -> bool:
        return bool(self.guest_features & virtio.F_EVENT_IDX)

    @property
    def indirect(self) -> bool:
        return bool(self.guest_features & virtio.F_INDIRECT_DESC)

    @property
    def _queue(self) -> QueueRegisters | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def read(self, offset: int, size: int) -> int:
        return self._get(offset) & (1 << 8 * size) - 1

    def _get(self, offset: int) -> int:
        simple = {
            virtio.COMMON_DFSELECT: self._host_select,
            virtio.COMMON_DF: _half(self.features, self._host_select),
            virtio.COMMON_GFSELECT: self._guest_select,
            virtio.COMMON_GF: _half(self.guest_features, self._guest_select),
            virtio.COMMON_MSIX: self.config_vector,
            virtio.COMMON_NUMQ: len(self.queues),
            virtio.COMMON_STATUS: self.status,
            virtio.COMMON_CFGGENERATION: self.generation,
            virtio.COMMON_Q_SELECT: self._queue_select,
        }
        if offset in simple:
            return simple[offset]
        queue = self._queue
        if queue is None:
            return 0
        place = queue.position
        of_queue = {
            virtio.COMMON_Q_SIZE: place.size,
            virtio.COMMON_Q_MSIX: queue.vector,
            virtio.COMMON_Q_ENABLE: int(queue.enabled),
            virtio.COMMON_Q_NOFF: self._queue_select,
            virtio.COMMON_Q_DESC: place.descriptors,
            virtio.COMMON_Q_DESC + 4: place.descriptors >> 32,
            virtio.COMMON_Q_AVAIL: place.available,
            virtio.COMMON_Q_AVAIL + 4: place.available >> 32,
            virtio.COMMON_Q_USED: place.used_ring,
            virtio.COMMON_Q_USED + 4: place.used_ring >> 32,
        }
        return of_queue.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == virtio.COMMON_DFSELECT:
            self._host_select = value
        elif offset == virtio.COMMON_GFSELECT:
            self._guest_select = value
        elif offset == virtio.COMMON_GF:
            if not self.status & virtio.FEATURES_OK and self._guest_select < 2:
                shift = 32 * self._guest_select
                self.guest_features &= ~(_32 << shift)
                self.guest_features |= value << shift
        elif offset == virtio.COMMON_MSIX:
            self.config_vector = self._vector(value)
            self.on_vectors()
        elif offset == virtio.COMMON_STATUS:
            self._set_status(value & 0xFF)
        elif offset == virtio.COMMON_Q_SELECT:
            self._queue_select = value & 0xFFFF
        elif self._queue is not None:
            self._write_queue(self._queue, offset, size, value)

    def _write_queue(self, queue: QueueRegisters, offset: int, size: int, value: int) -> None:
        place = queue.position
        if offset == virtio.COMMON_Q_MSIX:
            queue.vector = self._vector(value)
            self.on_vectors()
        elif queue.enabled:
            return
        elif offset == virtio.COMMON_Q_ENABLE:
            queue.enabled = value == 1
        elif offset == virtio.COMMON_Q_SIZE:
            if 0 < value <= queue.most and not value & (value - 1):
                place.size = value
        elif virtio.COMMON_Q_DESC <= offset < virtio.COMMON_Q_AVAIL:
            place.descriptors = _put(place.descriptors, offset % 8, size, value)
        elif virtio.COMMON_Q_AVAIL <= offset < virtio.COMMON_Q_USED:
            place.available = _put(place.available, offset % 8, size, value)
        elif virtio.COMMON_Q_USED <= offset < virtio.COMMON_Q_USED + 8:
            place.used_ring = _put(place.used_ring, offset % 8, size, value)

    def _vector(self, value: int) -> int:
        """A vector that there is not is none, by which the guest sees that."""
        return value & 0xFFFF if value & 0xFFFF < self._vectors else virtio.NO_VECTOR

    def _set_status(self, value: int) -> None:
        old = self.status
        if not value:
            self.on_reset()
            return
        if value & virtio.FEATURES_OK and not old & virtio.FEATURES_OK:
            chosen = self.guest_features
            if chosen & ~self.features or not chosen & virtio.F_VERSION_1:
                value &= ~virtio.FEATURES_OK
        if not value & virtio.FEATURES_OK:
            value &= ~virtio.DRIVER_OK
        self.status = value | old & virtio.NEEDS_RESET
        if value & ~old & virtio.FEATURES_OK:
            self.on_features()
        if value & ~old & virtio.DRIVER_OK:
            self.on_driver_ok()

    def save(self) -> dict:
        return {
            "guest_features": self.guest_features,
            "host_features_sel": self._host_select,
            "guest_features_sel": self._guest_select,
            "config_vector": self.config_vector,
            "status": self.status,
            "config_generation": self.generation,
            "queue_sel": self._queue_select,
            "queue_count": len(self.queues),
            "queues": [queue.save() for queue in self.queues],
        }

    def check(self, state: dict) -> None:
        """Raises ValueError for a state of another device, or one that no guest can reach."""
        if state["queue_count"] != len(self.queues):
            raise ValueError(
                f"there are {state['queue_count']} queues, and this device has {len(self.queues)}: "
                "give it as many"
            )
        missing = state["guest_features"] & ~self.features
        if state["status"] & virtio.FEATURES_OK and missing:
            raise ValueError(f"the guest uses features {missing:#x}, which this device has not")
        for number, queue in enumerate(state["queues"]):
            size = queue["size"]
            if not 0 < size <= MOST_DESCRIPTORS or size & (size - 1):
                raise ValueError(f"queue {number} has {size} descriptors")

    def restore(self, state: dict) -> None:
        self.guest_features = state["guest_features"]
        self._host_select = state["host_features_sel"]
        self._guest_select = state["guest_features_sel"]
        self.config_vector = state["config_vector"]
        self.status, self.generation = state["status"], state["config_generation"]
        self._queue_select = state["queue_sel"]
        for queue, values in zip(self.queues, state["queues"], strict=True):
            queue.restore(values)


def _nothing() -> None:
    pass


def _half(features: int, select: int) -> int:
    return features >> 32 * select & _32 if select < 2 else 0


def _put(old: int, place: int, size: int, value: int) -> int:
    """A 64-bit register of which `size` bytes from `place` on are written."""
    size = min(size, 8 - place)
    mask = (1 << 8 * size) - 1 << 8 * place
    return old & ~mask | value << 8 * place & mask
