/*
 * virtio-blk: batches of writes, and of reads of what they wrote, for ever.
 *
 * All requests of a batch are under way at once.  The device is told to interrupt when it gives the
 * last one back: an interrupt that is lost, or comes twice, and a request that is lost, or given back
 * twice, leave the guest standing, or fail a check.  Block n of the disk holds, in each dword, the
 * round in which it was written last, times BLOCKS, plus n.
 */
#include "machine.h"

#define BLK_ID 0x10421af4u

enum {
    CAP_VENDOR = 0x09,
    COMMON_CFG = 1, NOTIFY_CFG = 2,
    DRIVER_FEATURE_SELECT = 8, DRIVER_FEATURE = 12, STATUS = 20, QUEUE_SELECT = 22,
    QUEUE_SIZE = 24, QUEUE_VECTOR = 26, QUEUE_ENABLE = 28, QUEUE_DESC = 32, QUEUE_DRIVER = 40,
    QUEUE_DEVICE = 48,
    ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8,
    EVENT_IDX = 1 << 29, VERSION_1 = 1, /* the latter in the second word */
    NEXT = 1, WRITE = 2,
    IN = 0, OUT = 1,
    SLOTS = 64,                 /* of the queue: three for each request, and not a multiple */
    BATCH = 16,
    BLOCKS = 256,
    BLOCK_SIZE = 4096,
    DESCRIPTORS = 0x300000,
    AVAILABLE = 0x301000,
    USED = 0x302000,
    HEADERS = 0x303000,
    STATUSES = 0x304000,
    DATA = 0x400000,
};

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct available { u16 flags, index, ring[SLOTS], event; };
struct used { u16 flags, index; struct { u32 id, length; } ring[SLOTS]; };
struct header { u32 type, reserved; u64 sector; };

MAILBOX rounds = 0;             /* of writes and reads that were right */

static volatile struct descriptor *descriptors = (void *)DESCRIPTORS;
static volatile struct available *available = (void *)AVAILABLE;
static volatile struct used *used = (void *)USED;
static volatile struct header *headers = (void *)HEADERS;
static volatile u8 *statuses = (void *)STATUSES;
static u64 notify;
static u16 seen;                /* chains that were taken back */
static u32 came;                /* interrupts before this batch */

__attribute__((interrupt)) static void on_used(struct interrupt_frame *frame)
{
    (void)frame;
    interrupts = interrupts + 1;
    end_of_interrupt();
}

static inline void write16(u64 address, u16 value)
{
    *(volatile u16 *)address = value;
}

static inline void write8(u64 address, u8 value)
{
    *(volatile u8 *)address = value;
}

/* Where one of the device's structures is. */
static u64 find(u32 kind)
{
    for (u32 offset = pci_read(PCI_CAPABILITIES) & 0xfc; offset;) {
        u32 value = pci_read(offset);
        if ((value & 0xff) == CAP_VENDOR && value >> 24 == kind)
            return pci_bar(pci_read(offset + 4) & 0xff) + pci_read(offset + 8);
        offset = value >> 8 & 0xfc;
    }
    fail(__LINE__);
    return 0;
}

static void start(void)
{
    for (u64 address = AVAILABLE; address < HEADERS; address += 4)
        write32(address, 0);    /* there may be a guest's from before a reset */
    pci_find(BLK_ID);
    u64 common = find(COMMON_CFG);
    notify = find(NOTIFY_CFG);
    pci_enable();
    msix_start(VECTOR, 2);
    write8(common + STATUS, 0);
    write8(common + STATUS, ACKNOWLEDGE | DRIVER);
    write32(common + DRIVER_FEATURE_SELECT, 0);
    write32(common + DRIVER_FEATURE, EVENT_IDX);
    write32(common + DRIVER_FEATURE_SELECT, 1);
    write32(common + DRIVER_FEATURE, VERSION_1);
    write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    CHECK(*(volatile u8 *)(common + STATUS) & FEATURES_OK);
    write16(common + QUEUE_SELECT, 0);
    write16(common + QUEUE_SIZE, SLOTS);
    write16(common + QUEUE_VECTOR, 0);
    write32(common + QUEUE_DESC, DESCRIPTORS);
    write32(common + QUEUE_DRIVER, AVAILABLE);
    write32(common + QUEUE_DEVICE, USED);
    write16(common + QUEUE_ENABLE, 1);
    write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

static void offer(u32 tag, u32 type, u32 block)
{
    volatile struct descriptor *chain = descriptors + 3 * tag;
    u16 first = (u16)(3 * tag);

    headers[tag] = (struct header){type, 0, (u64)block * (BLOCK_SIZE / 512)};
    statuses[tag] = 0xff;
    chain[0] = (struct descriptor){(u64)(headers + tag), sizeof(struct header), NEXT, first + 1};
    chain[1] = (struct descriptor){DATA + (u64)tag * BLOCK_SIZE, BLOCK_SIZE,
                                   NEXT | (type == IN ? WRITE : 0), first + 2};
    chain[2] = (struct descriptor){(u64)(statuses + tag), 1, WRITE, 0};
    available->ring[available->index % SLOTS] = first;
    barrier();
    available->index = available->index + 1;
}

/* The device may begin before it is notified. */
static void begin(void)
{
    came = interrupts;
    available->event = (u16)(seen + BATCH - 1);
    barrier();
}

/* Has the requests that were offered done, all of them once. */
static void finish(void)
{
    u32 open = (1u << BATCH) - 1;

    write16(notify, 0);
    wait_for(&interrupts, came + 1);
    CHECK((u16)(used->index - seen) == BATCH);
    for (u32 i = 0; i < BATCH; i++, seen++) {
        u32 tag = used->ring[seen % SLOTS].id / 3;
        CHECK(tag < BATCH && used->ring[seen % SLOTS].id % 3 == 0);
        CHECK(open & 1u << tag);
        CHECK(statuses[tag] == 0);
        open &= ~(1u << tag);
    }
    CHECK(!open);
}

void main(void)
{
    interrupts_start();
    set_gate(VECTOR, on_used);
    stage = STARTED;
    start();
    stage = READY;
    for (u32 round = 1;; round++) {
        u32 first = round * BATCH % BLOCKS;
        begin();
        for (u32 tag = 0; tag < BATCH; tag++) {
            volatile u32 *data = (volatile u32 *)(u64)(DATA + tag * BLOCK_SIZE);
            for (u32 i = 0; i < BLOCK_SIZE / 4; i++)
                data[i] = round * BLOCKS + first + tag;
            offer(tag, OUT, first + tag);
        }
        finish();
        begin();
        for (u32 tag = 0; tag < BATCH; tag++) {
            volatile u32 *data = (volatile u32 *)(u64)(DATA + tag * BLOCK_SIZE);
            for (u32 i = 0; i < BLOCK_SIZE / 4; i++)
                data[i] = 0;
            offer(tag, IN, first + tag);
        }
        finish();
        for (u32 tag = 0; tag < BATCH; tag++) {
            volatile u32 *data = (volatile u32 *)(u64)(DATA + tag * BLOCK_SIZE);
            for (u32 i = 0; i < BLOCK_SIZE / 4; i++)
                CHECK(data[i] == round * BLOCKS + first + tag);
        }
        rounds = round;
        hold_if_asked();
    }
}
