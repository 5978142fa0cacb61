#ifndef CPR_VIRTIO_MEMORY_H
#define CPR_VIRTIO_MEMORY_H

#include <stdint.h>

/* Where guest-physical addresses are in this process: the RAM that devices may read and write.
   Threads may look things up at the same time; ranges are added before the first of them does. */
struct cpr_virtio_memory;

/* Makes an empty map; the caller owns it. NULL where there is no memory. */
struct cpr_virtio_memory *cpr_virtio_memory_new(void);

void cpr_virtio_memory_free(struct cpr_virtio_memory *memory);

/* Adds [start, start+size) of guest-physical space, which is at `host`. `*written` is NULL, or the
   bitmap that has to know of writes, in which the range begins with page `first_page`; it stays the
   caller's, as long as the map. Returns 0, -EINVAL for a range that is empty or wraps, -ENOMEM. */
int cpr_virtio_memory_add(struct cpr_virtio_memory *memory, uint64_t start, uint64_t size,
                          uint64_t host, uint64_t **written, uint64_t first_page);

/* Has `written` called, with `of`, after each write to RAM and before the guest can know of that:
   from any thread. */
void cpr_virtio_memory_tell(struct cpr_virtio_memory *memory,
                            void (*written)(void *of, const void *place, uint64_t size),
                            void *of);

#endif
