/* From guest-physical addresses to this process's, for devices that read and write RAM. */
#include "virtio_memory.h"

#include <errno.h>
#include <stdlib.h>

#include "page_bitmap.h"
#include "virtio_chain.h"

#define PAGE_SHIFT 12

struct range {
    uint64_t start, size;
    uint8_t *host;
    uint64_t **written;
    uint64_t first_page;
};

struct cpr_virtio_memory {
    uint32_t count;
    struct range *ranges;
    void (*written)(void *of, const void *place, uint64_t size); /* or NULL */
    void *of;
};

struct cpr_virtio_memory *cpr_virtio_memory_new(void)
{
    return calloc(1, sizeof(struct cpr_virtio_memory));
}

void cpr_virtio_memory_free(struct cpr_virtio_memory *memory)
{
    if (memory) {
        free(memory->ranges);
        free(memory);
    }
}

int cpr_virtio_memory_add(struct cpr_virtio_memory *memory, uint64_t start, uint64_t size,
                          uint64_t host, uint64_t **written, uint64_t first_page)
{
    struct range *ranges;

    if (!size || start + size < start || host + size < host) {
        return -EINVAL;
    }
    ranges = realloc(memory->ranges, (memory->count + 1) * sizeof(*ranges));
    if (!ranges) {
        return -ENOMEM;
    }
    ranges[memory->count] = (struct range){
        .start = start,
        .size = size,
        .host = (uint8_t *)(uintptr_t)host,
        .written = written,
        .first_page = first_page,
    };
    memory->ranges = ranges;
    memory->count++;
    return 0;
}

void cpr_virtio_memory_tell(struct cpr_virtio_memory *memory,
                            void (*written)(void *of, const void *place, uint64_t size),
                            void *of)
{
    memory->written = written;
    memory->of = of;
}

void *cpr_virtio_at(const struct cpr_virtio_memory *memory, uint64_t address, uint64_t *size)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct range *range = &memory->ranges[i];

        if (address >= range->start && address - range->start < range->size) {
            uint64_t offset = address - range->start;

            *size = *size < range->size - offset ? *size : range->size - offset;
            return range->host + offset;
        }
    }
    return NULL;
}

void cpr_virtio_written(const struct cpr_virtio_memory *memory, const void *place, uint64_t size)
{
    const uint8_t *host = place;

    if (!size) {
        return;
    }
    if (memory->written) {
        memory->written(memory->of, place, size);
    }
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct range *range = &memory->ranges[i];
        uint64_t *bitmap;

        if (host < range->host || (uint64_t)(host - range->host) >= range->size) {
            continue;
        }
        bitmap = range->written ? __atomic_load_n(range->written, __ATOMIC_ACQUIRE) : NULL;
        if (bitmap) {
            uint64_t offset = (uint64_t)(host - range->host);
            uint64_t first = offset >> PAGE_SHIFT;
            uint64_t last = (offset + size - 1) >> PAGE_SHIFT;

            cpr_bitmap_set(bitmap, range->first_page + first, last - first + 1);
        }
        return;
    }
}
