/*
 * nvme: a controller enabled once, then one Identify for each request of the test.
 *
 * A command goes into the next slot of the submission queue that the guest made at the start, and
 * its completion is expected in the next slot of that completion queue with the right phase: a
 * controller that was reset in between has lost both.
 */
#include "machine.h"

#define NVME_ID 0x00101b36u

enum {
    CAP_HIGH = 0x04,
    CC = 0x14,
    CSTS = 0x1c,
    AQA = 0x24,
    ASQ = 0x28,
    ACQ = 0x30,
    DOORBELLS = 0x1000,
    CC_ENABLE = 0x00460001,     /* entries of 64 and 16 bytes, enabled */
    CSTS_READY = 0x1,
    SLOTS = 4,                  /* few, so that the queues wrap within a test */
    SUBMISSIONS = 0x300000,
    COMPLETIONS = 0x301000,
    IDENTIFY_DATA = 0x302000,
    IDENTIFY = 0x06,
    IDENTIFY_CONTROLLER = 1,
    SERIAL = 4,                 /* offset of the serial number, 20 bytes padded with spaces */
    PATIENCE = 100000000,
};

MAILBOX request = 0;            /* the test adds one: one more Identify */
MAILBOX done = 0;               /* the requests that are answered */
MAILBOX cc = 0;
MAILBOX csts = 0;
MAILBOX status = 0;             /* status field of the latest completion, 0 is success */
MAILBOX slot = 0;               /* of the latest command */
MAILBOX serial = 0;             /* the first 4 bytes of the serial number that came */

static u64 nvme;

static void identify(u32 number)
{
    volatile u32 *command = (volatile u32 *)(u64)(SUBMISSIONS + 64 * (number % SLOTS));
    volatile u32 *completion = (volatile u32 *)(u64)(COMPLETIONS + 16 * (number % SLOTS));
    u32 phase = !(number / SLOTS % 2);

    write32(IDENTIFY_DATA + SERIAL, 0);
    for (u32 i = 0; i < 16; i++)
        command[i] = 0;
    command[0] = number << 16 | IDENTIFY;
    command[6] = IDENTIFY_DATA;
    command[10] = IDENTIFY_CONTROLLER;
    slot = number % SLOTS;
    barrier();
    write32(nvme + DOORBELLS, (number + 1) % SLOTS);
    for (u32 i = 0; (completion[3] >> 16 & 1) != phase; i++)
        CHECK(i < PATIENCE);
    CHECK((completion[3] & 0xffff) == (number & 0xffff));
    status = completion[3] >> 17;
    write32(nvme + DOORBELLS + 4, (number + 1) % SLOTS);
    barrier();
    serial = read32(IDENTIFY_DATA + SERIAL);
}

void main(void)
{
    stage = STARTED;
    pci_find(NVME_ID);
    nvme = pci_bar(0);
    pci_enable();
    CHECK(!(read32(nvme + CAP_HIGH) & 0xf));    /* doorbells are 4 bytes apart */
    write32(nvme + CC, 0);
    while (read32(nvme + CSTS) & CSTS_READY)
        ;
    for (u32 i = 0; i < 4096; i += 4)
        write32(COMPLETIONS + i, 0);
    write32(nvme + AQA, (SLOTS - 1) << 16 | (SLOTS - 1));
    write32(nvme + ASQ, SUBMISSIONS);
    write32(nvme + ASQ + 4, 0);
    write32(nvme + ACQ, COMPLETIONS);
    write32(nvme + ACQ + 4, 0);
    write32(nvme + CC, CC_ENABLE);
    while (!(read32(nvme + CSTS) & CSTS_READY))
        ;
    cc = read32(nvme + CC);
    csts = read32(nvme + CSTS);
    report_command();
    stage = READY;
    for (;;) {
        while (done == request)
            __asm__ volatile("pause");
        cc = read32(nvme + CC);
        csts = read32(nvme + CSTS);
        report_command();
        identify(done);
        done++;
    }
}
