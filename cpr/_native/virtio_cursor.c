/* Bytes into and out of pieces of guest RAM. */
#include <string.h>

#include "virtio_chain.h"

/* How much of the first piece is wanted. */
static uint64_t part_of(const struct cpr_cursor *cursor, uint64_t wanted)
{
    return cursor->pieces->iov_len < wanted ? cursor->pieces->iov_len : wanted;
}

static void advance(struct cpr_cursor *cursor, uint64_t part)
{
    struct iovec *piece = cursor->pieces;

    piece->iov_base = (uint8_t *)piece->iov_base + part;
    piece->iov_len -= part;
    if (!piece->iov_len) {
        cursor->pieces++;
        cursor->count--;
    }
}

uint64_t cpr_cursor_read(struct cpr_cursor *cursor, void *target, uint64_t size)
{
    uint64_t done = 0;

    while (done < size && cursor->count) {
        uint64_t part = part_of(cursor, size - done);

        memcpy((uint8_t *)target + done, cursor->pieces->iov_base, part);
        advance(cursor, part);
        done += part;
    }
    return done;
}

uint64_t cpr_cursor_write(struct cpr_cursor *cursor, const struct cpr_virtio_memory *memory,
                          const void *source, uint64_t size)
{
    uint64_t done = 0;

    while (done < size && cursor->count) {
        void *target = cursor->pieces->iov_base;
        uint64_t part = part_of(cursor, size - done);

        memcpy(target, (const uint8_t *)source + done, part);
        cpr_virtio_written(memory, target, part);
        advance(cursor, part);
        done += part;
    }
    return done;
}
