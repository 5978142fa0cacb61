"""VFIO, IOMMUFD and an accelerator without hardware, under the interfaces of the real ones.

The host is what stays over an update: its descriptors are real ones (of /dev/null and eventfds), so
that they can be copied and preserved.  `log` has the name of every call that changes something;
`fail` makes calls fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

from fake_platform import FakePlatform

from cpr.errors import KernelError
from cpr.memory import GuestMemory
from cpr.ram import RAMBlock
from cpr.state.fds import PreservedFds
from cpr.uapi import vfio
from cpr.uapi.fd import Fd, same_file
from cpr.uapi.vfio_info import DeviceInfo, IrqInfo, RegionInfo

CONFIG_OFFSET = 1 << 40
BAR_SIZE = 0x4000
MSIX_AT, MSI_AT = 0x50, 0x70
MSIX_COUNT = 3
TABLE, PBA = 0x2000, 0x3000


class FakeDevice:
    """A device with a 16 KiB BAR 0, MSI-X with three vectors, MSI, and INTA."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.config = bytearray(256)
        self.bar = bytearray(BAR_SIZE)
        self.triggers: dict[int, dict[int, int]] = {}
        self.unmask_fd = -1
        self.resizes = False
        self.tells_errors = False
        self.reset()
        for offset, size, value in (
            (0x00, 4, 0x10D38086),
            (0x04, 4, 0x00100000),
            (0x08, 4, 0x02000000),
            (0x34, 1, MSIX_AT),
            (0x3D, 1, 1),
            (MSIX_AT, 4, (MSIX_COUNT - 1) << 16 | MSI_AT << 8 | 0x11),
            (MSIX_AT + 4, 4, TABLE),
            (MSIX_AT + 8, 4, PBA),
            (MSI_AT, 4, 0x0182 << 16 | 0x05),  # two vectors, 64 bits, masks
        ):
            self.config[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        self.config[4:6] = b"\0\0"
        self.bar[:] = bytes(BAR_SIZE)

    def raise_irq(self, index: int, vector: int = 0) -> None:
        """What the hardware does: writes the eventfd that is connected, if any."""
        fd = self.triggers.get(index, {}).get(vector, -1)
        if fd >= 0:
            os.eventfd_write(fd, 1)


class FakeHost:
    """cpr.uapi.vfio, cpr.uapi.vfio_sysfs and cpr.uapi.iommufd of a host with some devices."""

    CONTAINER = vfio.CONTAINER

    def __init__(self, groups: dict[str, int]) -> None:
        self.devices = {name: FakeDevice(group) for name, group in groups.items()}
        self.log: list[str] = []
        self.fail: dict[str, Callable[..., int]] = {}
        self.mappings: dict[int, dict[int, list]] = {}  # container's or IOAS's number, iova
        self.features = {"updates_vaddr": True, "unmaps_all": True}
        self.incompatible: set[int] = set()  # groups that want a container of their own
        self.attached: dict[str, int] = {}
        self.ids = 0
        self._kept: list[tuple[int, int]] = []  # (a copy that stays open, container's number)

    def _call(self, name: str, *arguments: Any) -> None:
        self.log.append(name)
        code = self.fail[name](*arguments) if name in self.fail else 0
        if code:
            raise KernelError(f"{name} on fake", code)

    def _new(self, name: str) -> Fd:
        return Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), name)

    def _identity(self, fd: Fd) -> int:
        """The same number for all copies of a descriptor, in the kernel's way."""
        for kept, number in self._kept:
            if same_file(kept, fd.number):
                return number
        self._kept.append((os.dup(fd.number), fd.number))
        return fd.number

    def close(self) -> None:
        for kept, _ in self._kept:
            os.close(kept)

    # sysfs

    def group_of(self, sysfs: str) -> int | None:
        device = self.devices.get(os.path.basename(sysfs))
        return None if device is None else device.group

    def bind_remedy(self, name: str) -> str:
        return f"bind {name}"

    def is_mdev(self, sysfs: str) -> bool:
        return False

    def cdev_path(self, sysfs: str) -> str | None:
        return f"/dev/vfio/devices/{os.path.basename(sysfs)}"

    # containers and groups

    def open_container(self) -> Fd:
        self._call("open_container")
        fd = self._new(self.CONTAINER)
        self.mappings[self._identity(fd)] = {}
        return fd

    def adopt(self, number: int, name: str = "/dev/iommu") -> Fd:
        return Fd(number, name)

    def open_group(self, number: int, name: str) -> Fd:
        self._call("open_group", number)
        return self._new(f"/dev/vfio/{number}")

    def set_container(self, group: Fd, container: Fd) -> None:
        self._call("set_container", group, container)
        number = int(group.name.rsplit("/", 1)[1])
        taken = self.mappings[self._identity(container)]
        if number in self.incompatible and taken:
            raise KernelError("VFIO_GROUP_SET_CONTAINER", errno.EINVAL)

    def set_iommu(self, container: Fd) -> None:
        self._call("set_iommu")

    def updates_vaddr(self, container: Fd) -> bool:
        return self.features["updates_vaddr"]

    def unmaps_all(self, container: Fd) -> bool:
        return self.features["unmaps_all"]

    def get_device_fd(self, group: Fd, name: str) -> Fd:
        self._call("get_device_fd", name)
        if self.devices[name].group != int(group.name.rsplit("/", 1)[1]):
            raise KernelError(f"VFIO_GROUP_GET_DEVICE_FD of {name}", errno.ENODEV)
        return self._new(name)

    def map_dma(self, fd: Fd, iova: int, size: int, host: int, readonly: bool = False) -> None:
        self._call("map_dma", iova)
        self.mappings[self._identity(fd)][iova] = [size, host, readonly]

    def unmap_dma(self, fd: Fd, iova: int, size: int) -> None:
        self._call("unmap_dma", iova)
        del self.mappings[self._identity(fd)][iova]

    def invalidate_vaddrs(self, fd: Fd) -> None:
        self._call("invalidate_vaddrs")
        for mapping in self.mappings[self._identity(fd)].values():
            assert mapping[1] is not None, "already invalid"
            mapping[1] = None

    def update_vaddr(self, fd: Fd, iova: int, size: int, host: int) -> None:
        self._call("update_vaddr", iova)
        mapping = self.mappings[self._identity(fd)][iova]
        if mapping[0] != size or mapping[1] is not None:
            raise KernelError("VFIO_IOMMU_MAP_DMA", errno.EINVAL)
        mapping[1] = host

    # devices

    def open_cdev(self, path: str, name: str) -> Fd:
        self._call("open_cdev", path)
        return self._new(name)

    def bind_iommufd(self, device: Fd, iommufd: Fd) -> int:
        self._call("bind_iommufd")
        self.ids += 1
        return self.ids

    def attach_iommufd_pt(self, device: Fd, page_table: int) -> None:
        self._call("attach_iommufd_pt", page_table)
        self.attached[device.name] = page_table

    def device_info(self, device: Fd) -> DeviceInfo:
        return DeviceInfo(True, True, 9, 5)

    def region_info(self, device: Fd, index: int) -> RegionInfo:
        if index == vfio.CONFIG_REGION:
            return RegionInfo(CONFIG_OFFSET, 256, True, True)
        if index == 0:
            return RegionInfo(0, BAR_SIZE, True, True, [(0, BAR_SIZE)])
        return RegionInfo(0, 0, False, False)

    def irq_info(self, device: Fd, index: int) -> IrqInfo:
        counts = {vfio.INTX_IRQ: 1, vfio.MSI_IRQ: 2, vfio.MSIX_IRQ: MSIX_COUNT, vfio.REQ_IRQ: 1}
        counts[vfio.ERR_IRQ] = int(self.devices[device.name].tells_errors)
        resizes = self.devices[device.name].resizes
        return IrqInfo(counts.get(index, 0), True, resizes and index == vfio.MSIX_IRQ)

    def set_triggers(self, device: Fd, index: int, start: int, eventfds: Sequence[int]) -> None:
        self._call("set_triggers", index)
        triggers = self.devices[device.name].triggers.setdefault(index, {})
        for number, fd in enumerate(eventfds, start):
            triggers[number] = os.dup(fd) if fd >= 0 else -1

    def set_unmask(self, device: Fd, index: int, eventfd: int) -> None:
        self._call("set_unmask")
        self.devices[device.name].unmask_fd = eventfd

    def unmask(self, device: Fd, index: int) -> None:
        self._call("unmask")

    def disable_irqs(self, device: Fd, index: int) -> None:
        self._call("disable_irqs", index)
        self.devices[device.name].triggers.pop(index, None)

    def reset(self, device: Fd) -> None:
        self._call("reset")
        self.devices[device.name].reset()

    def _bytes(self, device: Fd, region: RegionInfo) -> bytearray:
        found = self.devices[device.name]
        return found.config if region.offset == CONFIG_OFFSET else found.bar

    def read_bytes(self, device: Fd, region: RegionInfo, offset: int, size: int) -> bytes:
        return bytes(self._bytes(device, region)[offset : offset + size])

    def read_region(self, device: Fd, region: RegionInfo, offset: int, size: int) -> int:
        return int.from_bytes(self.read_bytes(device, region, offset, size), "little")

    def write_region(
        self, device: Fd, region: RegionInfo, offset: int, size: int, value: int
    ) -> None:
        if region.offset == CONFIG_OFFSET and offset not in (4, 0x3C):
            return  # the kernel leaves only some to the user
        data = self._bytes(device, region)
        data[offset : offset + size] = value.to_bytes(size, "little")

    def map_region(self, device: Fd, region: RegionInfo, offset: int, size: int) -> int:
        return 0x7000_0000_0000 + offset

    def unmap_region(self, address: int, size: int) -> None:
        pass

    # iommufd

    def open_device(self) -> Fd:
        self._call("open_iommufd")
        return self._new("/dev/iommu")

    def alloc_ioas(self, iommufd: Fd) -> int:
        self._call("alloc_ioas")
        self.ids += 1
        self.mappings[-self.ids] = {}
        return self.ids

    def alloc_hwpt(self, iommufd: Fd, device_id: int, ioas_id: int) -> int:
        self._call("alloc_hwpt")
        self.ids += 1
        return self.ids

    def destroy(self, iommufd: Fd, object_id: int) -> None:
        self._call("destroy")

    def map_file(
        self,
        fd: Fd,
        ioas_id: int,
        iova: int,
        size: int,
        file: int,
        start: int,
        readonly: bool = False,
    ) -> None:
        self._call("map_file", iova)
        self.mappings[-ioas_id][iova] = [size, "file", start]

    def map_memory(
        self, fd: Fd, ioas_id: int, iova: int, size: int, host: int, readonly: bool = False
    ) -> None:
        self._call("map_memory", iova)
        self.mappings[-ioas_id][iova] = [size, host, readonly]

    def unmap(self, fd: Fd, ioas_id: int, iova: int, size: int) -> None:
        self._call("unmap", iova)
        del self.mappings[-ioas_id][iova]

    def change_process(self, fd: Fd, locked: int) -> None:
        self._call("change_process", locked)


class FakeAccel:
    """An accelerator that notes what it is told; `pump` delivers what the eventfds counted."""

    name = "fake"

    def __init__(self) -> None:
        self.irqfds: dict[tuple[int, int], int] = {}  # (gsi, eventfd): resamplefd
        self.messages: dict[int, tuple[int, int]] = {}
        self.delivered: list[tuple[int, int] | int] = []
        self.slots: dict[tuple[int, int], int] = {}
        self.vfio_files: set[int] = set()

    def when_taken_over(self, callback: Callable[[], None]) -> None:
        callback()

    def check_irqfds(self) -> None:
        pass

    def map_ram(self, address: int, size: int, host: int, readonly: bool = False) -> None:
        self.slots[address, size] = host

    def unmap_ram(self, address: int, size: int) -> None:
        del self.slots[address, size]

    def add_irqfd(self, gsi: int, eventfd: int, resamplefd: int = -1) -> None:
        assert (gsi, eventfd) not in self.irqfds
        self.irqfds[gsi, eventfd] = resamplefd
        self.pump()

    def remove_irqfd(self, gsi: int, eventfd: int) -> None:
        self.pump()
        del self.irqfds[gsi, eventfd]

    def pump(self) -> None:
        for gsi, eventfd in self.irqfds:
            try:
                os.eventfd_read(eventfd)
            except BlockingIOError:
                continue
            self.delivered.append(self.messages.get(gsi, gsi))

    def add_messages(self, messages: list[tuple[int, int]]) -> list[int]:
        gsis = []
        for message in messages:
            gsi = max(self.messages, default=23) + 1
            self.messages[gsi] = message
            gsis.append(gsi)
        return gsis

    def set_message(self, gsi: int, address: int, data: int) -> None:
        self.messages[gsi] = (address, data)

    def remove_message(self, gsi: int) -> None:
        del self.messages[gsi]

    def signal_message(self, address: int, data: int) -> None:
        self.delivered.append((address, data))

    def add_vfio_file(self, fd: int) -> None:
        self.vfio_files.add(fd)

    def remove_vfio_file(self, fd: int) -> None:
        self.vfio_files.discard(fd)


class FakeVmm:
    """The devices of one VMM on `host`, made from the CPR state in `fds`."""

    def __init__(self, host: FakeHost, fds: PreservedFds | None = None) -> None:
        self.host = host
        self.fds = fds or PreservedFds()
        self.platform = FakePlatform()
        self.accel = self.platform.accel = FakeAccel()
        self.devices: list[Any] = []
        memory: GuestMemory = self.platform.memory
        self.ram = RAMBlock("ram0", 64 << 20, "memory-backend-memfd")
        self.ram.host, self.ram.preserved = id(self) & ~4095, True
        memory.add_section(0, 0xA0000, self.ram, 0, False, "low")
        memory.add_section(0x100000, 63 << 20, self.ram, 0x100000, False, "high")
        self.machine = self

    def add_device(self, device: Any) -> None:
        device.realize(self.platform)
        self.devices.append(device)

    def blockers(self, mode: str = "cpr-exec") -> list[str]:
        return [text for device in self.devices if (text := device.cpr_blocker(mode))]

    def prepare(self, mode: str = "cpr-exec") -> None:
        for device in self.devices:
            device.cpr_prepare(mode)

    def rollback(self) -> None:
        for device in reversed(self.devices):
            device.cpr_rollback()

    def sections(self) -> list[Any]:
        saved = [device for device in self.devices if device.vmstate is not None]
        return sorted(saved, key=lambda device: device.saved_last)

    def save(self) -> dict[tuple[str, int], bytes]:
        return {
            (device.idstr, device.instance_id): device.vmstate.encode(device.save())
            for device in self.sections()
            if device.needed()
        }

    def close(self) -> None:
        for device in reversed(self.devices):
            device.unrealize()
        self.platform.loop.close()
