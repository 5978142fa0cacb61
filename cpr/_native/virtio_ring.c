/* Split virtqueues: chains of descriptors out of guest RAM, and used ones back into it. */
#include "virtio_ring.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "virtio_chain.h"

struct cpr_virtqueue {
    pthread_mutex_t lock; /* of all that follows */
    const struct cpr_virtio_memory *memory;
    struct vring_desc *descriptors;
    struct vring_avail *available;
    struct vring_used *used_ring;
    uint16_t size;
    uint16_t next, used;
    uint16_t signalled; /* what `used` was when the guest was last asked about */
    bool enabled, event_idx, indirect;
    bool suppressed; /* whether the guest was told that no notification is needed */
    const char *problem;
    int call, error;
    struct cpr_chain scratch;
};

struct cpr_virtqueue *cpr_virtqueue_new(const struct cpr_virtio_memory *memory)
{
    struct cpr_virtqueue *queue = calloc(1, sizeof(*queue));

    if (queue) {
        pthread_mutex_init(&queue->lock, NULL);
        queue->memory = memory;
        queue->call = queue->error = -1;
    }
    return queue;
}

void cpr_virtqueue_free(struct cpr_virtqueue *queue)
{
    if (queue) {
        pthread_mutex_destroy(&queue->lock);
        free(queue);
    }
}

void cpr_virtqueue_lock(struct cpr_virtqueue *queue)
{
    pthread_mutex_lock(&queue->lock);
}

void cpr_virtqueue_unlock(struct cpr_virtqueue *queue)
{
    pthread_mutex_unlock(&queue->lock);
}

struct cpr_chain *cpr_virtqueue_scratch(struct cpr_virtqueue *queue)
{
    return &queue->scratch;
}

const struct cpr_virtio_memory *cpr_virtqueue_memory(const struct cpr_virtqueue *queue)
{
    return queue->memory;
}

/* The whole of [address, address+size) in one piece of RAM, aligned; NULL where it is not. */
static void *find(struct cpr_virtqueue *queue, uint64_t address, uint64_t size, uint64_t alignment)
{
    uint64_t there = size;
    void *place = cpr_virtio_at(queue->memory, address, &there);

    return place && there == size && !((uintptr_t)place % alignment) ? place : NULL;
}

int cpr_virtqueue_enable(struct cpr_virtqueue *queue, const struct cpr_virtqueue_state *state)
{
    uint64_t size = state->size;
    int result = -EINVAL;

    cpr_virtqueue_disable(queue);
    if (!size || size > CPR_VIRTQUEUE_MOST || (size & (size - 1))) {
        return result;
    }
    pthread_mutex_lock(&queue->lock);
    /* Each ring ends with the index of an event. */
    queue->descriptors = find(queue, state->descriptors, size * sizeof(struct vring_desc),
                              VRING_DESC_ALIGN_SIZE);
    queue->available = find(queue, state->available, sizeof(struct vring_avail) + 2 * size + 2,
                            VRING_AVAIL_ALIGN_SIZE);
    queue->used_ring =
        find(queue, state->used_ring,
             sizeof(struct vring_used) + size * sizeof(struct vring_used_elem) + 2,
             VRING_USED_ALIGN_SIZE);
    if (queue->descriptors && queue->available && queue->used_ring) {
        queue->size = state->size;
        queue->next = state->next;
        queue->used = queue->signalled = state->used;
        queue->event_idx = state->event_idx;
        queue->indirect = state->indirect;
        queue->enabled = true;
        queue->suppressed = true;
        cpr_virtqueue_ask(queue, true);
        result = 0;
    }
    pthread_mutex_unlock(&queue->lock);
    return result;
}

void cpr_virtqueue_disable(struct cpr_virtqueue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->enabled = false;
    queue->problem = NULL;
    pthread_mutex_unlock(&queue->lock);
}

void cpr_virtqueue_position(struct cpr_virtqueue *queue, struct cpr_virtqueue_state *state)
{
    pthread_mutex_lock(&queue->lock);
    state->next = queue->next;
    state->used = queue->used;
    pthread_mutex_unlock(&queue->lock);
}

bool cpr_virtqueue_places(struct cpr_virtqueue *queue, uint64_t places[3])
{
    bool enabled;

    pthread_mutex_lock(&queue->lock);
    enabled = queue->enabled;
    places[0] = (uintptr_t)queue->descriptors;
    places[1] = (uintptr_t)queue->available;
    places[2] = (uintptr_t)queue->used_ring;
    pthread_mutex_unlock(&queue->lock);
    return enabled;
}

void cpr_virtqueue_moved(struct cpr_virtqueue *queue, uint16_t next)
{
    pthread_mutex_lock(&queue->lock);
    if (queue->enabled) {
        queue->next = next;
        queue->used = queue->signalled =
            __atomic_load_n(&queue->used_ring->idx, __ATOMIC_ACQUIRE);
    }
    pthread_mutex_unlock(&queue->lock);
}

void cpr_virtqueue_notifiers(struct cpr_virtqueue *queue, int call, int error)
{
    pthread_mutex_lock(&queue->lock);
    queue->call = call;
    queue->error = error;
    pthread_mutex_unlock(&queue->lock);
}

bool cpr_virtqueue_is_broken(const struct cpr_virtqueue *queue)
{
    return queue->problem;
}

const char *cpr_virtqueue_problem(struct cpr_virtqueue *queue)
{
    const char *problem;

    pthread_mutex_lock(&queue->lock);
    problem = queue->problem;
    pthread_mutex_unlock(&queue->lock);
    return problem;
}

static void signal_eventfd(int fd)
{
    uint64_t one = 1;

    /* A counter that is full is a signal too. */
    if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
        return;
    }
}

void cpr_virtqueue_break(struct cpr_virtqueue *queue, const char *problem)
{
    if (!queue->problem) {
        queue->problem = problem;
        signal_eventfd(queue->error);
    }
}

static bool works(const struct cpr_virtqueue *queue)
{
    return queue->enabled && !queue->problem;
}

bool cpr_virtqueue_waits(struct cpr_virtqueue *queue)
{
    return works(queue) &&
           __atomic_load_n(&queue->available->idx, __ATOMIC_ACQUIRE) != queue->next;
}

/* Adds a descriptor's pieces to the chain. */
static bool add(struct cpr_virtqueue *queue, struct cpr_chain *chain,
                const struct vring_desc *descriptor)
{
    bool is_in = descriptor->flags & VRING_DESC_F_WRITE;
    uint64_t address = descriptor->addr, left = descriptor->len;

    if (!is_in && chain->in_count) {
        cpr_virtqueue_break(queue, "a buffer to read comes after one to write");
        return false;
    }
    if (!left) {
        cpr_virtqueue_break(queue, "a buffer has no bytes");
        return false;
    }
    while (left) {
        uint32_t count = chain->out_count + chain->in_count;
        uint64_t there = left;
        void *place = cpr_virtio_at(queue->memory, address, &there);

        if (!place) {
            cpr_virtqueue_break(queue, "a buffer is not in RAM");
            return false;
        }
        if (count == CPR_VIRTQUEUE_MOST) {
            cpr_virtqueue_break(queue, "a chain has too many buffers");
            return false;
        }
        chain->pieces[count] = (struct iovec){.iov_base = place, .iov_len = there};
        if (is_in) {
            chain->in_count++;
            chain->in_bytes += there;
        } else {
            chain->out_count++;
            chain->out_bytes += there;
        }
        address += there;
        left -= there;
    }
    return true;
}

/* Follows the chain from descriptor `index` of a table of `count`. */
static bool follow(struct cpr_virtqueue *queue, struct cpr_chain *chain,
                   const struct vring_desc *table, uint32_t count, uint32_t index)
{
    for (uint32_t seen = 0; seen < count; seen++) {
        struct vring_desc descriptor;

        if (index >= count) {
            cpr_virtqueue_break(queue, "a descriptor is not in the table");
            return false;
        }
        /* The guest may change it while it is looked at. */
        memcpy(&descriptor, (const void *)&table[index], sizeof(descriptor));
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        if (descriptor.flags & VRING_DESC_F_INDIRECT) {
            cpr_virtqueue_break(queue, "an indirect table is where none may be");
            return false;
        }
        if (!add(queue, chain, &descriptor)) {
            return false;
        }
        if (!(descriptor.flags & VRING_DESC_F_NEXT)) {
            return true;
        }
        index = descriptor.next;
    }
    cpr_virtqueue_break(queue, "a chain of descriptors has a loop");
    return false;
}

int cpr_virtqueue_again(struct cpr_virtqueue *queue, uint16_t head, struct cpr_chain *chain)
{
    struct vring_desc first;
    const struct vring_desc *table;

    chain->head = head;
    chain->out_count = chain->in_count = 0;
    chain->out_bytes = chain->in_bytes = 0;
    if (!works(queue)) {
        return 0;
    }
    if (head >= queue->size) {
        cpr_virtqueue_break(queue, "an available descriptor is not in the table");
        return 0;
    }
    memcpy(&first, (const void *)&queue->descriptors[head], sizeof(first));
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (!(first.flags & VRING_DESC_F_INDIRECT)) {
        return follow(queue, chain, queue->descriptors, queue->size, head);
    }
    if (!queue->indirect || first.flags & VRING_DESC_F_NEXT || !first.len ||
        first.len % sizeof(first)) {
        cpr_virtqueue_break(queue, "an indirect table is where none may be");
        return 0;
    }
    table = find(queue, first.addr, first.len, 1);
    if (!table) {
        cpr_virtqueue_break(queue, "an indirect table is not in RAM");
        return 0;
    }
    return follow(queue, chain, table, first.len / sizeof(first), 0);
}

int cpr_virtqueue_pop(struct cpr_virtqueue *queue, struct cpr_chain *chain)
{
    uint16_t head, waiting;

    if (!works(queue)) {
        return 0;
    }
    waiting = __atomic_load_n(&queue->available->idx, __ATOMIC_ACQUIRE) - queue->next;
    if (!waiting) {
        return 0;
    }
    if (waiting > queue->size) {
        cpr_virtqueue_break(queue, "the available index has jumped");
        return 0;
    }
    head = __atomic_load_n(&queue->available->ring[queue->next % queue->size], __ATOMIC_RELAXED);
    queue->next++;
    return cpr_virtqueue_again(queue, head, chain);
}

void cpr_virtqueue_unpop(struct cpr_virtqueue *queue)
{
    queue->next--;
}

void cpr_virtqueue_fill(struct cpr_virtqueue *queue, uint32_t later, uint16_t head,
                        uint32_t written)
{
    struct vring_used_elem *element;

    if (works(queue)) {
        element = &queue->used_ring->ring[(uint16_t)(queue->used + later) % queue->size];
        *element = (struct vring_used_elem){.id = head, .len = written};
        cpr_virtio_written(queue->memory, element, sizeof(*element));
    }
}

void cpr_virtqueue_flush(struct cpr_virtqueue *queue, uint16_t count)
{
    if (works(queue)) {
        queue->used += count;
        __atomic_store_n(&queue->used_ring->idx, queue->used, __ATOMIC_RELEASE);
        cpr_virtio_written(queue->memory, queue->used_ring, sizeof(*queue->used_ring));
    }
}

void cpr_virtqueue_push(struct cpr_virtqueue *queue, uint16_t head, uint32_t written)
{
    cpr_virtqueue_fill(queue, 0, head, written);
    cpr_virtqueue_flush(queue, 1);
}

void cpr_virtqueue_interrupt(struct cpr_virtqueue *queue)
{
    uint16_t old = queue->signalled;
    bool wanted;

    if (!works(queue) || queue->used == old) {
        return;
    }
    queue->signalled = queue->used;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the used index, before it is looked who waits */
    if (queue->event_idx) {
        uint16_t event = __atomic_load_n(&queue->available->ring[queue->size], __ATOMIC_RELAXED);

        wanted = vring_need_event(event, queue->used, old);
    } else {
        uint16_t flags = __atomic_load_n(&queue->available->flags, __ATOMIC_RELAXED);

        wanted = !(flags & VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (wanted) {
        signal_eventfd(queue->call);
    }
}

void cpr_virtqueue_ask(struct cpr_virtqueue *queue, bool wanted)
{
    if (!works(queue)) {
        return;
    }
    if (queue->event_idx) {
        /* The guest notifies when it passes this index; an old one is a wish for nothing.  Where
           there are chains, but too few, it is of those to come. */
        if (wanted) {
            uint16_t *event = (uint16_t *)&queue->used_ring->ring[queue->size];
            uint16_t index = __atomic_load_n(&queue->available->idx, __ATOMIC_RELAXED);

            __atomic_store_n(event, index, __ATOMIC_RELAXED);
            cpr_virtio_written(queue->memory, event, sizeof(*event));
        }
    } else if (queue->suppressed == wanted) {
        __atomic_store_n(&queue->used_ring->flags, wanted ? 0 : VRING_USED_F_NO_NOTIFY,
                         __ATOMIC_RELAXED);
        cpr_virtio_written(queue->memory, queue->used_ring, sizeof(*queue->used_ring));
    }
    queue->suppressed = !wanted;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
