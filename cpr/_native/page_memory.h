#ifndef CPR_PAGE_MEMORY_H
#define CPR_PAGE_MEMORY_H

#include "page_ops.h"

/* At most so many pages are handled at a time; it is half of the kernel's IOV_MAX. */
enum { CPR_RUN_PAGES = 512 };

/* Guest memory. `fd` is the file that is mapped, shared and from its start, at `host`, or -1: then
   the memory is private, or its holes do not matter. With it, holes are found by SEEK_DATA instead
   of being read: reading a hole of a memfd through a mapping would fill it. */
struct cpr_page_memory {
    uint8_t *host; /* aligned to a page */
    uint64_t pages;
    int32_t fd;
};

/* In these a run is `count` (1 to CPR_RUN_PAGES) pages from page number `first` on. */

/* Sets zero[i] to whether page first + i is a hole, or holds zeros only. */
void cpr_pages_find_zero(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                         uint64_t first, uint32_t count, bool *zero);

/* Makes a run zero. What is a hole, or zero already, is not written to. */
void cpr_pages_clear_run(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                         uint64_t first, uint32_t count);

/* Puts a run in place, page i from `from` + i * `stride`; ops->fence is the caller's to call. A run
   of holes is filled by pwritev, which is faster than page faults and where a full file system is
   an error instead of SIGBUS. Returns 0 or -errno. */
int cpr_pages_put_run(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                      uint64_t first, uint32_t count, const uint8_t *from, uint64_t stride);

/* Whether all of a run is a hole. */
bool cpr_pages_are_hole(const struct cpr_page_memory *memory, uint64_t first, uint32_t count);

#endif
