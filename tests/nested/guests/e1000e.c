/*
 * e1000e: a network adapter whose interrupts come by MSI-X, made by its own cause register.
 *
 * Each round raises one cause after the other, each with a vector of its own, and compares
 * registers that the guest wrote once.
 */
#include "machine.h"

#define E1000E_ID 0x10d38086u

enum {
    CTRL_EXT = 0x0018,
    ICS = 0x00c8,
    IMS = 0x00d0,
    EIAC = 0x00dc,
    IVAR = 0x00e4,
    RDLEN = 0x2808,
    TDLEN = 0x3808,
    RAL1 = 0x5408,
    CAUSE_RX0 = 0x00100000,
    CAUSE_TX0 = 0x00400000,
    CAUSE_OTHER = 0x01000000,
    IVAR_RX0_0_TX0_1_OTHER_2 = 0x000a0908, /* bit 3 of each: in use */
    CTRL_EXT_PBA = 0x80000000,
    MSIX_VECTORS = 3,
    /*
     * Time-stamp ticks between two rounds.  The adapter puts off a vector that comes again within
     * 128 us, and an emulated one that has put off one sends it twice; its timer may be late.
     */
    PAUSE_TICKS = 150000000,
};

MAILBOX rounds = 0;
MAILBOX by_vector[MSIX_VECTORS] = {0};
MAILBOX changed_registers = 0;  /* registers that no longer hold what the guest wrote */

static u64 adapter;

static const u32 causes[MSIX_VECTORS] = {CAUSE_RX0, CAUSE_TX0, CAUSE_OTHER};
static const u32 written[][2] = {
    {RDLEN, 0x1280}, {TDLEN, 0x3480}, {RAL1, 0x789abcde},
};

static inline void count(u32 vector)
{
    write32(adapter + IMS, causes[vector]);     /* EIAC has cleared cause and mask */
    by_vector[vector]++;
    interrupts++;
    end_of_interrupt();
}

__attribute__((interrupt)) static void on_receive(struct interrupt_frame *frame)
{
    (void)frame;
    count(0);
}

__attribute__((interrupt)) static void on_transmit(struct interrupt_frame *frame)
{
    (void)frame;
    count(1);
}

__attribute__((interrupt)) static void on_other(struct interrupt_frame *frame)
{
    (void)frame;
    count(2);
}

static u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

void main(void)
{
    stage = STARTED;
    pci_find(E1000E_ID);
    adapter = pci_bar(0);
    pci_enable();
    set_gate(VECTOR, on_receive);
    set_gate(VECTOR + 1, on_transmit);
    set_gate(VECTOR + 2, on_other);
    interrupts_start();
    msix_start(VECTOR, MSIX_VECTORS);
    write32(adapter + CTRL_EXT, read32(adapter + CTRL_EXT) | CTRL_EXT_PBA);
    write32(adapter + IVAR, IVAR_RX0_0_TX0_1_OTHER_2);
    write32(adapter + EIAC, CAUSE_RX0 | CAUSE_TX0 | CAUSE_OTHER);
    write32(adapter + IMS, CAUSE_RX0 | CAUSE_TX0 | CAUSE_OTHER);
    for (u32 i = 0; i < sizeof written / sizeof written[0]; i++)
        write32(adapter + written[i][0], written[i][1]);
    stage = READY;
    for (;;) {
        for (u32 vector = 0; vector < MSIX_VECTORS; vector++) {
            triggered++;
            write32(adapter + ICS, causes[vector]);
            wait_for(&interrupts, triggered);
        }
        for (u32 i = 0; i < sizeof written / sizeof written[0]; i++)
            if (read32(adapter + written[i][0]) != written[i][1])
                changed_registers++;
        report_command();
        rounds++;
        for (u64 start = ticks(); ticks() - start < PAUSE_TICKS;)
            __asm__ volatile("sti; hlt; cli" : : : "memory");
        hold_if_asked();
    }
}
