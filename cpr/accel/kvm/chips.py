"""The interrupt chips that KVM has for a VM, by the fields of their devices' vmstate."""

from __future__ import annotations

from cpr._native._cpr import lib
from cpr.accel.irqchip import PIC_ELCR_MASKS, PIC_FIELDS
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.uapi.fd import Fd

IOAPIC_ADDRESS = 0xFEC00000
# The kernel's PIC has no single mode.
KERNEL_PIC_FIELDS = tuple(name for name in PIC_FIELDS if name != "single_mode")
IRQCHIP = kvm.StateStruct("kvm_irqchip", "IRQCHIP")
CHIP_IDS = {
    "i8259-0": lib.KVM_IRQCHIP_PIC_MASTER,
    "i8259-1": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}


def get_chip(vm: Fd, chip: str) -> dict:
    """Reads one chip."""
    irqchip = new_chip(chip)
    IRQCHIP.read(vm, irqchip)
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
    irqchip = new_chip(chip)
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
    IRQCHIP.set(vm, irqchip)


def new_chip(chip: str) -> Any:
    """The struct of this chip, empty, as an owning cdata pointer."""
    irqchip = IRQCHIP.new()
    irqchip.chip_id = CHIP_IDS[chip]
    return irqchip
