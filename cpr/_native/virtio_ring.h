#ifndef CPR_VIRTIO_RING_H
#define CPR_VIRTIO_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio_memory.h"

/* A split virtqueue (virtio 1.2, 2.7) on the device's side. Everything that the guest has written
   is checked, and read once: what it gives that is no chain of RAM makes the queue broken, and a
   broken queue does nothing any more until it is reset. */
struct cpr_virtqueue;

enum { CPR_VIRTQUEUE_MOST = 1024 }; /* descriptors of a queue, and of one chain */

/* Where a queue is, and how far. Addresses are guest-physical. `event_idx` and `indirect` are what
   was negotiated. `next` is the index of the next available chain, `used` that of the next used. */
struct cpr_virtqueue_state {
    uint64_t descriptors, available, used_ring;
    uint16_t size;
    uint16_t next, used;
    bool event_idx, indirect;
};

/* Makes a queue that is off; it uses `memory` as long as it lives. NULL where there is no memory. */
struct cpr_virtqueue *cpr_virtqueue_new(const struct cpr_virtio_memory *memory);

void cpr_virtqueue_free(struct cpr_virtqueue *queue);

/* Puts the queue where `state` says and lets it work. Returns 0, or -EINVAL for a size that is no
   power of two up to CPR_VIRTQUEUE_MOST, an address that is not aligned, or rings that are not all
   in one range of RAM; then it is off. */
int cpr_virtqueue_enable(struct cpr_virtqueue *queue, const struct cpr_virtqueue_state *state);

/* The inverse; waits for whoever is using the queue. A broken queue is whole again. */
void cpr_virtqueue_disable(struct cpr_virtqueue *queue);

/* Reads how far it is; the rest of `state` is left alone. */
void cpr_virtqueue_position(struct cpr_virtqueue *queue, struct cpr_virtqueue_state *state);

/* Where its rings are in this process, in the order of descriptors, available, used: false where it
   is off.  For one that somebody else works on while it is enabled. */
bool cpr_virtqueue_places(struct cpr_virtqueue *queue, uint64_t places[3]);

/* Somebody else has worked on it, and taken the chains up to `next`; what was given back is in its
   ring. */
void cpr_virtqueue_moved(struct cpr_virtqueue *queue, uint16_t next);

/* The eventfds that the queue writes: `call` for an interrupt, `error` when it has become broken.
   -1 for none. They stay the caller's. */
void cpr_virtqueue_notifiers(struct cpr_virtqueue *queue, int call, int error);

/* Why the queue is broken, or NULL. */
const char *cpr_virtqueue_problem(struct cpr_virtqueue *queue);

/* The following are for devices in Python. They take the next chain and give it back at once; the
   interrupt, where the guest wants one, is sent too. Each returns -EAGAIN where there is no chain,
   and -EPROTO for a queue that is broken. */

/* Copies what the guest gives into `buffer`, at most `room` bytes; returns how many. A chain that
   is longer makes the queue broken. */
int64_t cpr_virtqueue_receive(struct cpr_virtqueue *queue, uint8_t *buffer, uint32_t room);

/* The same, but the chain stays where it is. */
int64_t cpr_virtqueue_peek(struct cpr_virtqueue *queue, uint8_t *buffer, uint32_t room);

/* Copies at most `size` bytes from `data` into the guest's buffer; returns how many fitted. */
int64_t cpr_virtqueue_send(struct cpr_virtqueue *queue, const uint8_t *data, uint32_t size);

/* Fills the guest's buffer with at most `most` random bytes of the host's; returns how many. */
int64_t cpr_virtqueue_send_random(struct cpr_virtqueue *queue, uint32_t most);

/* How many bytes the guest's next buffer has room for; the chain stays where it is. */
int64_t cpr_virtqueue_room(struct cpr_virtqueue *queue);

#endif
