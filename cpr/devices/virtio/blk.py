"""virtio-blk-pci: a disk in a raw file, or a block device (virtio 1.2, 5.2)."""

from __future__ import annotations

import errno
import os

from cpr import report, runstate
from cpr.devices.base import DESCRIPTORS_KEPT
from cpr.devices.virtio.device import VirtioDevice
from cpr.devices.virtio.disk import MOST_QUEUES, WCE_OFFSET, Disk, configuration
from cpr.devices.virtio.image import Image
from cpr.devices.virtio.native import MOST_DESCRIPTORS
from cpr.devices.virtio.pci import add_function
from cpr.errors import ConfigError
from cpr.state.vmstate import VMStateDescription, u8, u16, varray
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DeviceConfig, DriveConfig
    from cpr.devices.board import Board
    from cpr.devices.virtio.device import Transport
    from cpr.state.fds import PreservedFds

DEFAULT_QUEUE_SIZE = 256
WORKERS = 4  # threads of one disk; those that find nothing to do sleep
MOST_SECTORS = 0x3FFFFF  # of one discard or write zeroes: what fits into 31 bits of bytes
BLOCK_SIZE = 512
READ_DEFAULT, WRITE_DEFAULT = "report", "enospc"
AUTO = "auto"
MASS_STORAGE = 0x010000

VMSTATE_REQUEST = VMStateDescription("virtio-blk-request", 1, 1, (u16("queue"), u16("head")))
VMSTATE_SYNC_ERROR = VMStateDescription("virtio-blk-device/sync_error", 1, 1, (u16("errno"),))
VMSTATE_DISK = VMStateDescription(
    "virtio-blk-device",
    1,
    1,
    (u8("write_cache"), u16("kept_count"), varray("kept", VMSTATE_REQUEST, "kept_count")),
    subsections=(VMSTATE_SYNC_ERROR,),
)


class VirtioBlk(VirtioDevice):
    """The disk of `drive`.  Owns its Image and Disk.

    `comes_later`: a guest comes that another VMM may yet have.  `policies` are what becomes of a
    read and of a write that fails.  `write_cache` is whether there is one at power-on; by default
    as the drive says.
    """

    name = "virtio-blk"
    device_id = virtio.ID_BLOCK
    pci_class = MASS_STORAGE
    kicks = True
    vmstate = VMSTATE_DISK

    def __init__(
        self,
        drive: DriveConfig,
        fds: PreservedFds,
        comes_later: bool,
        queues: int = 1,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        serial: str = "",
        policies: tuple[str, str] = (READ_DEFAULT, WRITE_DEFAULT),
        write_cache: bool | None = None,
    ) -> None:
        """Raises ConfigError for what is not possible."""
        if drive.file is None:
            raise ConfigError("Device needs media, but drive is empty")
        if not 0 < queues <= MOST_QUEUES:
            raise ConfigError(f"num-queues property must be in the range 1 to {MOST_QUEUES}")
        if queue_size & (queue_size - 1) or not 2 < queue_size <= MOST_DESCRIPTORS:
            raise ConfigError(
                f"invalid queue-size property ({queue_size}), must be a power of 2 (max "
                f"{MOST_DESCRIPTORS})"
            )
        self._drive = drive
        self._fds = fds
        self._comes_later = comes_later
        self._serial = serial
        self._policies = policies
        if write_cache is None:
            write_cache = drive.cache not in ("writethrough", "directsync")
        self._has_write_cache = write_cache
        self.queue_sizes = (queue_size,) * queues
        self.features = virtio.BLK_F_SEG_MAX | virtio.BLK_F_BLK_SIZE | virtio.BLK_F_FLUSH
        if queues > 1:
            self.features |= virtio.BLK_F_MQ
        if drive.readonly:
            self.features |= virtio.BLK_F_RO
        else:
            self.features |= virtio.BLK_F_CONFIG_WCE
            self.features |= virtio.BLK_F_DISCARD | virtio.BLK_F_WRITE_ZEROES

    def realize(self, transport: Transport) -> None:
        self.transport = transport
        drive = self._drive
        self._image = Image(drive, self._fds, self._comes_later)
        try:
            self._disk = Disk(
                self._image.fd,
                self._image.sectors,
                transport.queues,
                drive.readonly,
                drive.discards,
                drive.cache != "unsafe",
                *self._policies,
                self._serial.encode(),
            )
        except BaseException:
            self._image.close()
            raise
        self._config = configuration(
            self._image.sectors,
            self.queue_sizes[0] - 2,
            BLOCK_SIZE,
            len(self.queue_sizes),
            MOST_SECTORS,
        )
        transport.platform.loop.watch(self._disk.halted, 1, lambda events: self._on_halted())
        self.reset()

    def unrealize(self) -> None:
        self.transport.platform.loop.unwatch(self._disk.halted)
        self._disk.free()
        self._image.close()

    def reset(self) -> None:
        self._disk.kept = []
        self._set_write_cache(self._has_write_cache)

    def _set_write_cache(self, on: bool) -> None:
        self._config[WCE_OFFSET] = on
        self._disk.set_write_through(not on)

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Only the write cache can be set."""
        if offset == WCE_OFFSET and size == 1 and self.features & virtio.BLK_F_CONFIG_WCE:
            self._set_write_cache(bool(value & 1))

    def set_features(self, features: int) -> None:
        """A driver that cannot flush gets what it writes written at once."""
        if features and not features & (virtio.BLK_F_FLUSH | virtio.BLK_F_CONFIG_WCE):
            self._set_write_cache(False)

    def start(self) -> None:
        self._disk.start(WORKERS)

    def stop(self) -> None:
        self._disk.stop()

    def _on_halted(self) -> None:
        """A request has failed, and is kept: the VM stops, and does it again when it goes on."""
        try:
            os.eventfd_read(self._disk.halted)
        except BlockingIOError:
            return
        error, is_write = self._disk.error()
        if not error:
            return
        platform = self.transport.platform
        reason = os.strerror(error)
        data = {
            "device": self._drive.id,
            "operation": "write" if is_write else "read",
            "action": "stop",
            "nospace": error == errno.ENOSPC,
            "reason": reason,
        }
        platform.events.emit("BLOCK_IO_ERROR", data)
        report.error_report(f"{self._drive.id}: {reason}; the guest is stopped, and `cont` goes on")
        platform.request_stop(runstate.IO_ERROR)

    # Updates.

    def save(self) -> dict:
        kept = [{"queue": queue, "head": head} for queue, head in self._disk.kept]
        state = {"write_cache": self._config[WCE_OFFSET], "kept_count": len(kept), "kept": kept}
        if error := self._disk.sync_error:
            state[VMSTATE_SYNC_ERROR.name] = {"errno": error}
        return state

    def check(self, state: dict) -> None:
        for request in state["kept"]:
            if request["queue"] >= len(self.queue_sizes):
                raise ValueError(f"a request is in queue {request['queue']}, which there is not")
        if len(state["kept"]) > MOST_DESCRIPTORS:
            raise ValueError(f"{len(state['kept'])} requests are kept")

    def restore(self, state: dict) -> None:
        self._set_write_cache(bool(state["write_cache"]))
        self._disk.kept = [(request["queue"], request["head"]) for request in state["kept"]]
        self._disk.sync_error = state.get(VMSTATE_SYNC_ERROR.name, {"errno": 0})["errno"]

    def cpr_prepare(self, mode: str) -> None:
        if mode not in DESCRIPTORS_KEPT:  # the other VMM opens the file itself
            self._image.unlock()

    def cpr_rollback(self) -> None:
        self._image.lock()

    def files(self) -> list[tuple[str, int]]:
        return [(f"drive '{self._drive.id}'", self._image.fd)]

    def take_locks(self) -> None:
        self._image.lock()

    def give_locks(self) -> None:
        self._image.undo_lock()

    def take_over(self) -> None:
        self._image.lock(keeps=True)


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the disk of -device virtio-blk-pci.  Raises CprError or ValueError."""
    properties = config.properties
    name = properties.get("drive")
    if name is None:
        raise ConfigError("drive property not set")
    drive = board.take_drive(name, "virtio-blk-device")
    policies = [
        drive_policy if properties.get(key, AUTO) == AUTO else properties[key]
        for key, drive_policy in (("rerror", drive.rerror), ("werror", drive.werror))
    ]
    write_cache = properties.get("write-cache", AUTO)
    device = VirtioBlk(
        drive,
        board.fds,
        board.is_incoming,
        properties.get("num-queues", min(len(board.machine.vcpus), MOST_QUEUES)),
        properties.get("queue-size", DEFAULT_QUEUE_SIZE),
        properties.get("serial", ""),
        (policies[0], policies[1]),
        None if write_cache == AUTO else write_cache == "on",
    )
    add_function(board, device, properties)
