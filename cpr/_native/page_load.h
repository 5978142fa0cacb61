#ifndef CPR_PAGE_LOAD_H
#define CPR_PAGE_LOAD_H

#include "page_work.h"

/* A block that records may be of. */
struct cpr_load_block {
    const char *idstr; /* of idstr_length bytes, without a NUL */
    uint64_t idstr_length;
    struct cpr_page_memory memory;
};

/* Takes the records of pages (page_records.h) of a stream. It stops before any record that is not a
   page of one of the blocks and within it, and sets `stopped`: the caller knows the others, and
   what is wrong with a bad one. */
struct cpr_load {
    const struct cpr_load_block *blocks;
    uint32_t count;
    int32_t current; /* the block of the last record, or -1 */
    bool stopped;
    int32_t cancelled; /* as in struct cpr_page_walk */
    struct cpr_page_counts counts;
};

/* Puts the pages of the whole records in `size` bytes at `data` into memory; a zero page is written
   only where the page is not zero already, so that holes stay. Returns how many bytes it took, or
   -errno. */
int64_t cpr_load_bytes(const struct cpr_page_pool *pool, struct cpr_load *load, const uint8_t *data,
                       uint64_t size);

/* The same from `fd`, after the *filled bytes that are in `buffer` already, until `stopped` or the
   end. Then the *filled bytes in `buffer` are those read and not taken. `capacity` is at least
   CPR_RECORD_MOST. Returns 0 or -errno. */
int cpr_load_fd(const struct cpr_page_pool *pool, struct cpr_load *load, int fd, uint8_t *buffer,
                uint64_t capacity, uint64_t *filled);

/* Ends a cpr_load_fd on another thread, and any later one, with -ECANCELED. */
void cpr_load_cancel(struct cpr_load *load);

#endif
