"""A process that hands a VFIO device over an exec of itself with the uapi layer alone.

Run as `python -m tests.nested.inside.across_exec KIND ADDRESS…`; it prints one JSON object of facts
from each image.  What the descriptors are for is in the arguments of the second image.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from pathlib import Path

from cpr.errors import KernelError
from cpr.uapi import iommufd, vfio
from cpr.uapi.fd import Fd

from . import machine
from .edu import FROM_DEVICE, IRQ_RAISE, WITH_INTERRUPT, Edu
from .nvme import Nvme

RAM = 64 << 20
MORE = 2 << 20
IN_FLIGHT = 0x10000  # offset in RAM of the page that a DMA writes during the exec
PATTERN = bytes(range(256)) * 8


def status(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    found = re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def refusal(function, *arguments) -> int:
    """The errno with which the kernel refuses a call, 0 where it does not."""
    try:
        function(*arguments)
    except KernelError as error:
        return error.errno
    return 0


def memory(fd: int, size: int) -> mmap.mmap:
    return mmap.mmap(fd, size)


def address_of(mapped: mmap.mmap) -> int:
    from cpr._native._cpr import ffi

    return int(ffi.cast("uintptr_t", ffi.from_buffer(mapped)))


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def exec_again(kind: str, address: str, fds: dict[str, int], **more: int) -> None:
    """Starts the second image with these descriptors open."""
    for fd in fds.values():
        os.set_inheritable(fd, True)
    words = ["-m", "tests.nested.inside.across_exec", kind, address, json.dumps(fds | more)]
    os.execv(sys.executable, [sys.executable, *words])


def memfd(name: str, size: int) -> int:
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd


def use_before(edu: Edu, ram: mmap.mmap, event: int) -> dict[str, object]:
    """The device set up and used, with a DMA and its interrupt under way at the end."""
    edu.enable()
    facts: dict[str, object] = {"dma": edu.copies(ram, 0, 1)}
    vfio.set_triggers(edu.device, vfio.MSI_IRQ, 0, [event])
    edu.write(IRQ_RAISE, 1)
    facts["interrupts"] = os.eventfd_read(event)
    edu.acknowledge()
    ram[: len(PATTERN)] = PATTERN
    edu.send(0)
    ram[IN_FLIGHT : IN_FLIGHT + len(PATTERN)] = bytes(len(PATTERN))
    edu.start_dma(0x40000, IN_FLIGHT, FROM_DEVICE | WITH_INTERRUPT)
    return facts


def use_after(edu: Edu, ram: mmap.mmap, event: int) -> dict[str, object]:
    """What the device did during the exec and does now."""
    edu.wait_dma()
    facts: dict[str, object] = {
        "in_flight": ram[IN_FLIGHT : IN_FLIGHT + len(PATTERN)] == PATTERN,
        "interrupts_meanwhile": os.eventfd_read(event),
        "cause": edu.acknowledge(),
        "dma": edu.copies(ram, 0, 2),
        "command": edu.command,
    }
    edu.write(IRQ_RAISE, 1)
    facts["interrupts"] = os.eventfd_read(event)
    edu.acknowledge()
    return facts


def open_type1(address: str) -> tuple[Fd, Fd, dict[str, int], mmap.mmap]:
    """The container, the device, the descriptors to hand over, and RAM mapped from address 0 on."""
    container = vfio.open_container()
    group = vfio.open_group(machine.group(address), address)
    vfio.set_container(group, container)
    vfio.set_iommu(container)
    device = vfio.get_device_fd(group, address)
    ram_fd = memfd("ram", RAM)
    ram = memory(ram_fd, RAM)
    vfio.map_dma(container, 0, RAM, address_of(ram))
    fds = {"container": container.number, "group": group.number, "device": device.number}
    return container, device, fds | {"ram": ram_fd}, ram


def type1_before(address: str) -> None:
    container, device, fds, ram = open_type1(address)
    event = os.eventfd(0)
    facts = use_before(Edu(device), ram, event)
    tell(locked=status("VmLck"), command=Edu(device).command, **facts)
    vfio.invalidate_vaddrs(container)
    exec_again("type1", address, fds | {"event": event}, old=address_of(ram))


def type1_after(address: str, given: dict[str, int]) -> None:
    taken = mmap.mmap(-1, RAM)  # so that RAM comes to another address
    ram = memory(given["ram"], RAM)
    container = vfio.adopt(given["container"], vfio.CONTAINER)
    edu = Edu(vfio.adopt(given["device"], address))
    locked = [status("VmLck")]
    wrong_size = refusal(vfio.update_vaddr, container, 0, RAM // 2, address_of(ram))
    vfio.update_vaddr(container, 0, RAM, address_of(ram))
    locked.append(status("VmLck"))
    again = refusal(vfio.update_vaddr, container, 0, RAM, address_of(ram))
    facts = use_after(edu, ram, given["event"])
    more = memory(memfd("more", MORE), MORE)
    vfio.map_dma(container, RAM, MORE, address_of(more))
    facts["new_mapping"] = edu.copies(more, RAM, 3)
    locked.append(status("VmLck"))
    vfio.unmap_dma(container, RAM, MORE)
    vfio.unmap_dma(container, 0, RAM)
    locked.append(status("VmLck"))
    moved = address_of(ram) != given["old"]
    tell(locked=locked, again=again, wrong_size=wrong_size, moved=moved, **facts)
    taken.close()


def iommufd_before(address: str) -> None:
    owner = iommufd.open_device()
    device = vfio.open_cdev(machine.cdev(address), address)
    device_id = vfio.bind_iommufd(device, owner)
    ioas = iommufd.alloc_ioas(owner)
    ram_fd = memfd("ram", RAM)
    iommufd.map_file(owner, ioas, 0, RAM, ram_fd, 0)
    vfio.attach_iommufd_pt(device, ioas)
    event = os.eventfd(0)
    facts = use_before(Edu(device), memory(ram_fd, RAM), event)
    tell(device_id=device_id, command=Edu(device).command, **facts)
    fds = {"iommufd": owner.number, "device": device.number, "ram": ram_fd, "event": event}
    exec_again("iommufd", address, fds, ioas=ioas)


def iommufd_after(address: str, given: dict[str, int]) -> None:
    ram = memory(given["ram"], RAM)
    owner = iommufd.adopt(given["iommufd"])
    ioas = given["ioas"]
    edu = Edu(vfio.adopt(given["device"], address))
    changed = refusal(iommufd.change_process, owner, RAM)
    facts = use_after(edu, ram, given["event"])
    more_fd = memfd("more", MORE)
    iommufd.map_file(owner, ioas, RAM, MORE, more_fd, 0)
    facts["new_mapping"] = edu.copies(memory(more_fd, MORE), RAM, 3)
    iommufd.unmap(owner, ioas, RAM, MORE)
    private = mmap.mmap(-1, MORE)
    iommufd.map_memory(owner, ioas, RAM, MORE, address_of(private))
    not_a_file = refusal(iommufd.change_process, owner, RAM)
    iommufd.unmap(owner, ioas, RAM, MORE)
    iommufd.unmap(owner, ioas, 0, RAM)
    tell(change_process=changed, not_a_file=not_a_file, **facts)


def nvme_before(address: str, kept: bool) -> None:
    """An enabled controller whose descriptor is kept, or opened again by the second image."""
    container, device, fds, ram = open_type1(address)
    nvme = Nvme(device, ram)
    nvme.enable()
    tell(identify=nvme.identify(0), cc=nvme.cc, csts=nvme.csts)
    if kept:
        vfio.invalidate_vaddrs(container)
    else:
        del fds["device"]
    exec_again("nvme-kept" if kept else "nvme-reopened", address, fds)


def nvme_after(address: str, given: dict[str, int]) -> None:
    container = vfio.adopt(given["container"], vfio.CONTAINER)
    ram = memory(given["ram"], RAM)
    if "device" not in given:
        group = Fd(given["group"], "group")
        nvme = Nvme(vfio.get_device_fd(group, address), ram)
        nvme.enable_memory()
        tell(cc=nvme.cc, csts=nvme.csts)
        return
    vfio.update_vaddr(container, 0, RAM, address_of(ram))
    nvme = Nvme(vfio.adopt(given["device"], address), ram)
    tell(cc=nvme.cc, csts=nvme.csts, identify=nvme.identify(1))


def main(kind: str, address: str, given: str = "") -> None:
    if kind == "type1":
        type1_after(address, json.loads(given)) if given else type1_before(address)
    elif kind == "iommufd":
        iommufd_after(address, json.loads(given)) if given else iommufd_before(address)
    elif given:
        nvme_after(address, json.loads(given))
    else:
        nvme_before(address, kind == "nvme-kept")


if __name__ == "__main__":
    main(*sys.argv[1:])
