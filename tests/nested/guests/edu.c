/*
 * edu: QEMU's teaching device, driven round after round.
 *
 * A round computes a factorial in the device, sends a pattern that no other round uses out of RAM
 * into the device's buffer, fetches it into another page, compares, and raises one interrupt by
 * hand.  Each DMA ends in an interrupt (the device takes 100 ms for one), so a round has three.
 */
#include "machine.h"

#define EDU_ID 0x11e81234u

enum {
    FACTORIAL = 0x08,
    STATUS = 0x20,
    IRQ_STATUS = 0x24,
    IRQ_RAISE = 0x60,
    IRQ_ACKNOWLEDGE = 0x64,
    DMA_SOURCE = 0x80,
    DMA_DESTINATION = 0x88,
    DMA_COUNT = 0x90,
    DMA_COMMAND = 0x98,
    STATUS_COMPUTING = 0x01,
    DMA_RUN = 0x1,
    DMA_FROM_DEVICE = 0x2,
    DMA_INTERRUPT = 0x4,
    DEVICE_BUFFER = 0x40000,
    BYTES = 2048,               /* with 4096 the device of QEMU 7.2 ends the whole process */
    SOURCE = 0x300000,
    DESTINATION = 0x302000,
    OWN_INTERRUPT = 0x10,
};

MAILBOX rounds = 0;
MAILBOX mismatches = 0;         /* dwords of the pattern that came back wrong */
MAILBOX wrong_factorials = 0;
MAILBOX dma_busy = 0;           /* a DMA's interrupt is awaited: 1 out of RAM, 2 into RAM */
MAILBOX dma_source = SOURCE;    /* page that is sent; a test may move it */
MAILBOX dma_destination = DESTINATION;
MAILBOX causes = 0;             /* all bits that were seen in the interrupt status */

static u64 edu;

__attribute__((interrupt)) static void on_interrupt(struct interrupt_frame *frame)
{
    (void)frame;
    u32 status = read32(edu + IRQ_STATUS);
    write32(edu + IRQ_ACKNOWLEDGE, status);
    causes |= status;
    interrupts++;
    end_of_interrupt();
}

static void dma(u32 source, u32 destination, u32 direction)
{
    write32(edu + DMA_SOURCE, source);
    write32(edu + DMA_DESTINATION, destination);
    write32(edu + DMA_COUNT, BYTES);
    barrier();
    triggered++;
    dma_busy = direction ? 2 : 1;
    write32(edu + DMA_COMMAND, DMA_RUN | DMA_INTERRUPT | direction);
    wait_for(&interrupts, triggered);
    dma_busy = 0;
    CHECK(!(read32(edu + DMA_COMMAND) & DMA_RUN));
    barrier();
}

static u32 pattern(u32 round, u32 index)
{
    return (round * 0x9e3779b1u) ^ (index * 0x85ebca6bu);
}

static void check_dma(u32 round)
{
    volatile u32 *sent = (volatile u32 *)(u64)dma_source;
    volatile u32 *received = (volatile u32 *)(u64)dma_destination;
    for (u32 i = 0; i < BYTES / 4; i++) {
        sent[i] = pattern(round, i);
        received[i] = ~pattern(round, i);
    }
    dma((u32)(u64)sent, DEVICE_BUFFER, 0);
    dma(DEVICE_BUFFER, (u32)(u64)received, DMA_FROM_DEVICE);
    for (u32 i = 0; i < BYTES / 4; i++)
        if (received[i] != pattern(round, i))
            mismatches++;
}

static void check_factorial(u32 number)
{
    u32 expected = 1;
    for (u32 i = 2; i <= number; i++)
        expected *= i;
    write32(edu + FACTORIAL, number);
    while (read32(edu + STATUS) & STATUS_COMPUTING)
        ;
    if (read32(edu + FACTORIAL) != expected)
        wrong_factorials++;
}

void main(void)
{
    stage = STARTED;
    pci_find(EDU_ID);
    edu = pci_bar(0);
    pci_enable();
    CHECK((read32(edu) & 0xff) == 0xed);
    set_gate(VECTOR, on_interrupt);
    interrupts_start();
    msi_start(VECTOR);
    stage = READY;
    for (;;) {
        u32 round = rounds + 1;
        check_factorial(round % 12 + 1);
        check_dma(round);
        triggered++;
        write32(edu + IRQ_RAISE, OWN_INTERRUPT);
        wait_for(&interrupts, triggered);
        report_command();
        rounds = round;
        hold_if_asked();
    }
}
