#ifndef CPR_PAGE_LOAD_H
#define CPR_PAGE_LOAD_H

#include "page_work.h"

/* A block that records may be of. */
struct cpr_load_block {
    const char *idstr; /* of idstr_length bytes, without a NUL */
    uint64_t idstr_length;
    struct cpr_page_memory memory;
    uint64_t taken; /* pages, by all the calls so far */
};

/* Takes the records of pages (page_records.h) of a stream. It stops before any record that is not a
   page of one of the blocks and within it, and sets `stopped`: the caller knows the others, and
   what is wrong with a bad one. */
struct cpr_load {
    struct cpr_load_block *blocks;
    uint32_t count;
    int32_t current; /* the block of the last record, or -1 */
    bool stopped;
    struct cpr_page_counts counts;
};

/* Puts the pages of the whole records in `size` bytes at `data` into memory; a zero page is written
   only where the page is not zero already, so that holes stay. Returns how many bytes it took, or
   -errno. */
int64_t cpr_load_bytes(const struct cpr_page_pool *pool, struct cpr_load *load, const uint8_t *data,
                       uint64_t size);

#endif
