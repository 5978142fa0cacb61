"""The fields of the interrupt chips' states, in the order of QEMU's vmstate.

An in-kernel chip and an emulated one have the same.
"""

PIC_FIELDS = (
    "last_irr",
    "irr",
    "imr",
    "isr",
    "priority_add",
    "irq_base",
    "read_reg_select",
    "poll",
    "special_mask",
    "init_state",
    "auto_eoi",
    "rotate_on_auto_eoi",
    "special_fully_nested_mode",
    "init4",
    "single_mode",
    "elcr",
)
PIC_ELCR_MASKS = (0xF8, 0xDE)
"""Which inputs of master and slave can be level-triggered: not the timer's, keyboard's, clock's."""
