/* Bytes into and out of pieces of guest RAM. */
#include <string.h>

#include "virtio_chain.h"

uint64_t cpr_cursor_read(struct cpr_cursor *cursor, void *target, uint64_t size)
{
    uint64_t done = 0;

    while (done < size && cursor->count) {
        struct iovec *piece = cursor->pieces;
        uint64_t part = piece->iov_len < size - done ? piece->iov_len : size - done;

        memcpy((uint8_t *)target + done, piece->iov_base, part);
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        done += part;
        if (!piece->iov_len) {
            cursor->pieces++;
            cursor->count--;
        }
    }
    return done;
}

uint64_t cpr_cursor_write(struct cpr_cursor *cursor, const struct cpr_virtio_memory *memory,
                          const void *source, uint64_t size)
{
    uint64_t done = 0;

    while (done < size && cursor->count) {
        struct iovec *piece = cursor->pieces;
        uint64_t part = piece->iov_len < size - done ? piece->iov_len : size - done;

        memcpy(piece->iov_base, (const uint8_t *)source + done, part);
        cpr_virtio_written(memory, piece->iov_base, part);
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        done += part;
        if (!piece->iov_len) {
            cursor->pieces++;
            cursor->count--;
        }
    }
    return done;
}
