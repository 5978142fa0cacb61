/*
 * intx: QEMU's teaching device again, its interrupt by the level-triggered INTA and the I/O APIC.
 *
 * A round raises one interrupt by hand and waits for it; the line goes down when it is acknowledged.
 */
#include "machine.h"

#define EDU_ID 0x11e81234u

enum {
    IRQ_STATUS = 0x24,
    IRQ_RAISE = 0x60,
    IRQ_ACKNOWLEDGE = 0x64,
    OWN_INTERRUPT = 0x10,
    PCI_INTERRUPT_LINE = 0x3c,
    IOAPIC = 0xfec00000,
    IOAPIC_WINDOW = 0x10,
    IOAPIC_REDIRECTION = 0x10,
    LEVEL_TRIGGERED = 0x8000,
};

MAILBOX rounds = 0;
MAILBOX spurious = 0;           /* interrupts for which the device had no cause */

static u64 edu;

__attribute__((interrupt)) static void on_interrupt(struct interrupt_frame *frame)
{
    (void)frame;
    u32 status = read32(edu + IRQ_STATUS);
    if (status) {
        write32(edu + IRQ_ACKNOWLEDGE, status);
        read32(edu + IRQ_STATUS);   /* the line is down before the interrupt is ended */
        interrupts++;
    } else {
        spurious++;
    }
    end_of_interrupt();
}

static void ioapic_write(u32 offset, u32 value)
{
    write32(IOAPIC, offset);
    write32(IOAPIC + IOAPIC_WINDOW, value);
}

void main(void)
{
    stage = STARTED;
    pci_find(EDU_ID);
    edu = pci_bar(0);
    pci_enable();
    set_gate(VECTOR, on_interrupt);
    interrupts_start();
    u32 line = pci_read(PCI_INTERRUPT_LINE) & 0xff;
    ioapic_write(IOAPIC_REDIRECTION + 2 * line + 1, 0);
    ioapic_write(IOAPIC_REDIRECTION + 2 * line, LEVEL_TRIGGERED | VECTOR);
    stage = READY;
    for (;;) {
        triggered++;
        write32(edu + IRQ_RAISE, OWN_INTERRUPT);
        wait_for(&interrupts, triggered);
        report_command();
        rounds++;
        hold_if_asked();
    }
}
