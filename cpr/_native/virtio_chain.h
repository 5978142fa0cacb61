/* What devices in C use of a virtqueue; for C only. */
#ifndef CPR_VIRTIO_CHAIN_H
#define CPR_VIRTIO_CHAIN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "virtio_ring.h"

/* The RAM at guest-physical `address`, and in *size how much of the *size bytes is there in one
   piece; NULL for none. */
void *cpr_virtio_at(const struct cpr_virtio_memory *memory, uint64_t address, uint64_t *size);

/* To be called after a write to RAM that cpr_virtio_at has found. */
void cpr_virtio_written(const struct cpr_virtio_memory *memory, const void *place, uint64_t size);

/* One request: `out_count` pieces that the device reads, and then `in_count` that it writes, all of
   them in RAM. A descriptor that spans two ranges of RAM is two pieces. */
struct cpr_chain {
    uint16_t head;
    uint32_t out_count, in_count;
    uint64_t out_bytes, in_bytes;
    struct iovec pieces[CPR_VIRTQUEUE_MOST];
};

/* All of these are called with the queue's lock held. */
void cpr_virtqueue_lock(struct cpr_virtqueue *queue);
void cpr_virtqueue_unlock(struct cpr_virtqueue *queue);

/* Takes the next chain: 1, or 0 where there is none or the queue is off or broken. */
int cpr_virtqueue_pop(struct cpr_virtqueue *queue, struct cpr_chain *chain);

/* Reads the chain at `head` again, one that was taken before and not given back: 1, or 0 where it
   is no chain any more, which makes the queue broken. */
int cpr_virtqueue_again(struct cpr_virtqueue *queue, uint16_t head, struct cpr_chain *chain);

/* Undoes the latest pop. */
void cpr_virtqueue_unpop(struct cpr_virtqueue *queue);

/* Whether there is a chain to take. */
bool cpr_virtqueue_waits(struct cpr_virtqueue *queue);

/* Enters a chain, into which `written` bytes were written, as the one that is given back after
   `later` others; the guest sees it with the flush. */
void cpr_virtqueue_fill(struct cpr_virtqueue *queue, uint32_t later, uint16_t head,
                        uint32_t written);

/* Gives back the `count` chains that were entered. */
void cpr_virtqueue_flush(struct cpr_virtqueue *queue, uint16_t count);

/* Both of these for one chain. */
void cpr_virtqueue_push(struct cpr_virtqueue *queue, uint16_t head, uint32_t written);

/* Interrupts the guest if it wants that for what was pushed since the last time. */
void cpr_virtqueue_interrupt(struct cpr_virtqueue *queue);

/* Asks the guest for notifications, or tells it that none is needed. After asking, one has to look
   once more whether there is a chain. */
void cpr_virtqueue_ask(struct cpr_virtqueue *queue, bool wanted);

/* Makes the queue broken; `problem` is a constant text. */
void cpr_virtqueue_break(struct cpr_virtqueue *queue, const char *problem);

bool cpr_virtqueue_is_broken(const struct cpr_virtqueue *queue);

/* A chain for whoever holds the lock. */
struct cpr_chain *cpr_virtqueue_scratch(struct cpr_virtqueue *queue);

const struct cpr_virtio_memory *cpr_virtqueue_memory(const struct cpr_virtqueue *queue);

/* A place in pieces of memory. */
struct cpr_cursor {
    struct iovec *pieces;
    uint32_t count;
};

/* What the device reads of a chain, and what it writes. */
static inline struct cpr_cursor cpr_chain_out(struct cpr_chain *chain)
{
    return (struct cpr_cursor){chain->pieces, chain->out_count};
}

static inline struct cpr_cursor cpr_chain_in(struct cpr_chain *chain)
{
    return (struct cpr_cursor){chain->pieces + chain->out_count, chain->in_count};
}

/* Copies up to `size` bytes from the cursor to `target`, and moves it on; returns how many. */
uint64_t cpr_cursor_read(struct cpr_cursor *cursor, void *target, uint64_t size);

/* The other way, and notes the writing. */
uint64_t cpr_cursor_write(struct cpr_cursor *cursor, const struct cpr_virtio_memory *memory,
                          const void *source, uint64_t size);

#endif
