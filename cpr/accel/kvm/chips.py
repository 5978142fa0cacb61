"""The chips that KVM has for all vCPUs of a VM, by the fields of their devices' vmstate.

KVM does not tell when channel 0 of its PIT was loaded, and begins its whole count anew when the PIT
is written: a period is longer once, and a count that ends once ends once more.  Of the other
channels it forgets the time too.
"""

from __future__ import annotations

from cpr._native._cpr import ffi, lib
from cpr.accel.irqchip import PIC_ELCR_MASKS, PIC_FIELDS
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.uapi.fd import Fd

IOAPIC_ADDRESS = 0xFEC00000
# The kernel's PIC has no single mode.
KERNEL_PIC_FIELDS = tuple(name for name in PIC_FIELDS if name != "single_mode")
PIT_FIELDS = (
    "count",
    "latched_count",
    "count_latched",
    "status_latched",
    "status",
    "read_state",
    "write_state",
    "write_latch",
    "rw_mode",
    "mode",
    "bcd",
    "gate",
    "count_load_time",
)
CHIP_IDS = {
    "i8259-0": lib.KVM_IRQCHIP_PIC_MASTER,
    "i8259-1": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}


def get_chip(vm: Fd, chip: str) -> dict:
    """Reads one chip."""
    if chip == "i8254":
        return _get_pit(vm)
    irqchip = ffi.new("struct kvm_irqchip *", {"chip_id": CHIP_IDS[chip]})
    vm.ioctl(lib.KVM_GET_IRQCHIP, "KVM_GET_IRQCHIP", irqchip)
    if chip == "ioapic":
        ioapic = irqchip.chip.ioapic
        return {
            "id": ioapic.id,
            "ioregsel": ioapic.ioregsel,
            "unused1": 0,
            "irr": ioapic.irr,
            "ioredtbl": [entry.bits for entry in ioapic.redirtbl],
        }
    pic = irqchip.chip.pic
    return {"single_mode": 0} | {name: getattr(pic, name) for name in KERNEL_PIC_FIELDS}


def set_chip(vm: Fd, chip: str, state: dict) -> None:
    """The inverse of `get_chip`."""
    if chip == "i8254":
        _set_pit(vm, state)
        return
    irqchip = ffi.new("struct kvm_irqchip *", {"chip_id": CHIP_IDS[chip]})
    if chip == "ioapic":
        ioapic = irqchip.chip.ioapic
        ioapic.base_address = IOAPIC_ADDRESS
        ioapic.id = state["id"]
        ioapic.ioregsel = state["ioregsel"]
        ioapic.irr = state["irr"]
        for i, bits in enumerate(state["ioredtbl"]):
            ioapic.redirtbl[i].bits = bits
    else:
        pic = irqchip.chip.pic
        for name in KERNEL_PIC_FIELDS:
            setattr(pic, name, state[name])
        pic.elcr_mask = PIC_ELCR_MASKS[irqchip.chip_id]
    vm.ioctl(lib.KVM_SET_IRQCHIP, "KVM_SET_IRQCHIP", irqchip)


def _get_pit(vm: Fd) -> dict:
    pit = kvm.get_struct(vm, "kvm_pit_state2", "KVM_GET_PIT2", lib.KVM_GET_PIT2)
    return {
        "channels": [
            {name: getattr(channel, name) for name in PIT_FIELDS} for channel in pit.channels
        ],
        "flags": pit.flags,
    }


def _set_pit(vm: Fd, state: dict) -> None:
    pit = ffi.new("struct kvm_pit_state2 *", {"flags": state["flags"]})
    for channel, saved in zip(pit.channels, state["channels"], strict=True):
        for name in PIT_FIELDS:
            setattr(channel, name, saved[name])
    vm.ioctl(lib.KVM_SET_PIT2, "KVM_SET_PIT2", pit)
