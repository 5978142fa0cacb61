/* Virtqueues, a disk and a network card with what a hostile guest may write, for the sanitizers:
 * `virtio SEED [ROUNDS]`. RAM ends where its memory does, so that a step beyond it is found.
 *
 * Some chains are right, of others the fields are bent here and there. On failure it says where, and
 * ends with 1.
 */
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "virtio_blk.h"
#include "virtio_memory.h"
#include "virtio_net.h"
#include "virtio_ring.h"

#include "check.h"

#define LOW_SIZE 0x8000
#define HIGH_SIZE 0x4000
#define HIGH_START LOW_SIZE /* the two ranges meet, and are not neighbours here */
#define QUEUE_SIZE 16
#define DESCRIPTORS 0x0000
#define AVAILABLE 0x1000
#define USED 0x2000
#define SECTORS 64
#define ROUNDS 3000

static uint8_t *low, *high;
static uint64_t *written;

static uint64_t below(uint64_t limit)
{
    return random_number() % limit;
}

/* An address that is mostly in RAM, and often near an end of it. */
static uint64_t some_address(void)
{
    switch (below(8)) {
    case 0:
        return random_number();
    case 1:
        return LOW_SIZE + HIGH_SIZE - below(64);
    case 2:
        return HIGH_START - below(64);
    default:
        return 0x3000 + below(LOW_SIZE + HIGH_SIZE - 0x3000);
    }
}

static void bend_descriptor(struct vring_desc *descriptor)
{
    descriptor->addr = some_address();
    descriptor->len = below(4) ? (uint32_t)below(1200) : (uint32_t)random_number();
    descriptor->flags = below(8) ? (uint16_t)below(4) : (uint16_t)random_number();
    descriptor->next = below(8) ? (uint16_t)below(QUEUE_SIZE) : (uint16_t)random_number();
}

/* A request of a disk as it should be, or nearly so. */
static void good_request(struct vring_desc *table, uint16_t head)
{
    struct virtio_blk_outhdr header = {.type = (uint32_t)below(14), .sector = below(SECTORS + 2)};
    uint64_t place = 0x3000 + below(0x100) * 16;

    memcpy(low + place, &header, sizeof(header));
    for (uint16_t i = 0; i < 3; i++) {
        uint16_t number = (uint16_t)((head + i) % QUEUE_SIZE);

        table[number] = (struct vring_desc){
            .addr = i ? 0x5000 + below(0x6000) : place,
            .len = (uint32_t[]){16, (uint32_t)(below(4) * 512), 1}[i],
            .flags = (uint16_t)((i < 2 ? VRING_DESC_F_NEXT : 0) |
                                (i == 2 || (i == 1 && header.type == VIRTIO_BLK_T_IN)
                                     ? VRING_DESC_F_WRITE
                                     : 0)),
            .next = (uint16_t)((number + 1) % QUEUE_SIZE),
        };
        if (!table[number].len) {
            table[number].len = 16;
        }
    }
}

/* What a guest does before it notifies. */
static void fill_ring(void)
{
    struct vring_desc *table = (struct vring_desc *)(low + DESCRIPTORS);
    struct vring_avail *available = (struct vring_avail *)(low + AVAILABLE);
    uint16_t count = (uint16_t)(1 + below(6));

    for (uint16_t i = 0; i < QUEUE_SIZE; i++) {
        if (below(2)) {
            bend_descriptor(&table[i]);
        }
    }
    for (uint16_t i = 0; i < count; i++) {
        uint16_t head = below(32) ? (uint16_t)below(QUEUE_SIZE) : (uint16_t)random_number();

        if (below(2)) {
            good_request(table, head % QUEUE_SIZE);
        }
        available->ring[(uint16_t)(available->idx + i) % QUEUE_SIZE] = head;
    }
    if (!below(4)) { /* an indirect table */
        uint16_t head = available->ring[available->idx % QUEUE_SIZE] % QUEUE_SIZE;
        struct vring_desc *indirect = (struct vring_desc *)(low + 0x4000);

        for (int i = 0; i < 8; i++) {
            bend_descriptor(&indirect[i]);
        }
        good_request(indirect, 0);
        table[head] = (struct vring_desc){
            .addr = below(4) ? 0x4000 : some_address(),
            .len = (uint32_t)(below(4) ? 16 * (1 + below(16)) : random_number()),
            .flags = VRING_DESC_F_INDIRECT,
        };
    }
    atomic_thread_fence(memory_order_seq_cst);
    available->idx = (uint16_t)(available->idx + (below(64) ? count : random_number()));
}

static struct cpr_virtqueue *new_queue(const struct cpr_virtio_memory *memory)
{
    struct cpr_virtqueue *queue = cpr_virtqueue_new(memory);

    CHECK(queue);
    return queue;
}

/* Puts the queue at its place, as of a guest that has begun anew. */
static void enable(struct cpr_virtqueue *queue)
{
    struct cpr_virtqueue_state state = {
        .descriptors = DESCRIPTORS,
        .available = AVAILABLE,
        .used_ring = USED,
        .size = QUEUE_SIZE,
        .event_idx = below(2),
        .indirect = below(2),
    };

    memset(low + AVAILABLE, 0, 0x2000);
    CHECK(!cpr_virtqueue_enable(queue, &state));
    state.used_ring = LOW_SIZE + HIGH_SIZE - 16;
    if (!below(16)) {
        CHECK(cpr_virtqueue_enable(queue, &state));
        state.used_ring = USED;
        CHECK(!cpr_virtqueue_enable(queue, &state));
    }
}

static void drive_python_calls(struct cpr_virtqueue *queue, uint64_t rounds)
{
    uint8_t buffer[2048];

    for (uint64_t i = 0; i < rounds; i++) {
        if (!(i % 4)) {
            enable(queue);
        }
        fill_ring();
        for (int chain = 0; chain < 8; chain++) {
            cpr_virtqueue_room(queue);
            switch (below(3)) {
            case 0:
                cpr_virtqueue_receive(queue, buffer, sizeof(buffer));
                break;
            case 1:
                cpr_virtqueue_send(queue, buffer, sizeof(buffer));
                break;
            default:
                cpr_virtqueue_send_random(queue, 300);
            }
        }
    }
    cpr_virtqueue_disable(queue);
}

static void drive_disk(struct cpr_virtqueue *queue, uint64_t rounds)
{
    int fd = memfd_create("disk", MFD_CLOEXEC), kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int halted = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct cpr_blk_options options = {
        .fd = fd, .sectors = SECTORS, .queues = 1, .discards = true, .syncs = true,
        .read_error = CPR_BLK_STOP, .write_error = CPR_BLK_ENOSPC, .halted = halted,
    };
    struct cpr_blk *disk;
    uint64_t one = 1;

    CHECK(fd >= 0 && kick >= 0 && halted >= 0);
    CHECK(!ftruncate(fd, SECTORS * 512));
    CHECK(!cpr_blk_new(&options, &disk));
    CHECK(!cpr_blk_set_queue(disk, 0, queue, kick));
    for (uint64_t i = 0; i < rounds; i++) {
        if (!(i % 4)) {
            enable(queue);
        }
        fill_ring();
        if (!below(4)) {
            uint16_t heads[2] = {(uint16_t)random_number(), (uint16_t)below(QUEUE_SIZE)};

            CHECK(!cpr_blk_keep(disk, 0, heads, 2));
        }
        CHECK(!cpr_blk_start(disk, 3));
        CHECK(write(kick, &one, sizeof(one)) == sizeof(one));
        cpr_blk_stop(disk);
    }
    cpr_virtqueue_disable(queue);
    cpr_blk_free(disk);
    close(fd);
    close(kick);
    close(halted);
}

static void drive_card(struct cpr_virtqueue *receive, struct cpr_virtqueue *transmit,
                       uint64_t rounds)
{
    int wire[2], kicks[2];
    struct cpr_net *card;
    uint8_t frame[3000] = {0};

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire));
    for (int i = 0; i < 2; i++) {
        kicks[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        CHECK(kicks[i] >= 0);
    }
    CHECK(!cpr_net_new(wire[0], true, receive, kicks[0], transmit, kicks[1], &card));
    for (uint64_t i = 0; i < rounds; i++) {
        struct cpr_virtqueue *queue = below(2) ? receive : transmit;

        enable(queue);
        fill_ring();
        while (read(wire[1], frame, sizeof(frame)) > 0) {
        }
        for (int n = 0; n < 4; n++) {
            CHECK(write(wire[1], frame, 1 + below(sizeof(frame))) > 0);
        }
        CHECK(!cpr_net_start(card, below(2)));
        usleep((useconds_t)below(200));
        cpr_net_stop(card);
        cpr_virtqueue_disable(queue);
        while (read(wire[0], frame, sizeof(frame)) > 0) {
        }
    }
    cpr_net_free(card);
    for (int i = 0; i < 2; i++) {
        close(wire[i]);
        close(kicks[i]);
    }
}

int main(int count, char **words)
{
    struct cpr_virtio_memory *memory = cpr_virtio_memory_new();
    uint64_t rounds = count > 2 ? strtoull(words[2], NULL, 0) : ROUNDS;
    struct cpr_virtqueue *queues[2];

    random_state = count > 1 ? strtoull(words[1], NULL, 0) : 1;
    CHECK(random_state && memory);
    low = aligned_alloc(4096, LOW_SIZE);
    high = aligned_alloc(4096, HIGH_SIZE);
    written = calloc(1, 8); /* of 12 pages */
    CHECK(low && high && written);
    memset(low, 0, LOW_SIZE);
    memset(high, 0, HIGH_SIZE);
    CHECK(!cpr_virtio_memory_add(memory, 0, LOW_SIZE, (uintptr_t)low, &written, 0));
    CHECK(!cpr_virtio_memory_add(memory, HIGH_START, HIGH_SIZE, (uintptr_t)high, &written, 8));
    CHECK(cpr_virtio_memory_add(memory, UINT64_MAX, 2, 4096, NULL, 0));
    for (int i = 0; i < 2; i++) {
        queues[i] = new_queue(memory);
    }
    drive_python_calls(queues[0], rounds);
    drive_disk(queues[0], rounds);
    drive_card(queues[0], queues[1], rounds / 10);
    CHECK(written[0]); /* and no bit beyond the pages there are */
    CHECK(written[0] < 1 << 12);
    for (int i = 0; i < 2; i++) {
        cpr_virtqueue_free(queues[i]);
    }
    cpr_virtio_memory_free(memory);
    free(low);
    free(high);
    free(written);
    return 0;
}
