/* Runs of guest pages, and the holes in their files. */
#include "page_memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "page_io.h"

/* Of most pages that are not zero only the first bytes are read: what takes time is to get there. */
enum { AHEAD = 8 };

static uint8_t *page_at(const struct cpr_page_memory *memory, uint64_t page)
{
    return memory->host + page * CPR_PAGE_SIZE;
}

/* The first page from `page` on that is not a hole; `end` if there is none before it. */
static uint64_t next_data(const struct cpr_page_memory *memory, uint64_t page, uint64_t end)
{
    uint64_t found;
    off_t data;

    if (memory->fd < 0) {
        return page;
    }
    data = lseek(memory->fd, (off_t)(page * CPR_PAGE_SIZE), SEEK_DATA);
    if (data < 0) {
        return errno == ENXIO ? end : page;
    }
    found = (uint64_t)data / CPR_PAGE_SIZE;
    if (found < page) {
        return page; /* a device, which seeks nowhere */
    }
    return found < end ? found : end;
}

bool cpr_pages_are_hole(const struct cpr_page_memory *memory, uint64_t first, uint32_t count)
{
    return next_data(memory, first, first + count) == first + count;
}

/* Sets hole[i]. Residency is looked up for the whole run at once: only what is not resident can be
   a hole, but it may also be swapped out, which SEEK_DATA tells. */
static void find_holes(const struct cpr_page_memory *memory, uint64_t first, uint32_t count,
                       bool *hole)
{
    unsigned char resident[CPR_RUN_PAGES];
    uint64_t end = first + count;
    uint64_t begin = next_data(memory, first, end);
    uint64_t page = begin;

    memset(hole, 0, count);
    memset(hole, 1, begin - first);
    if (begin == end ||
        mincore(page_at(memory, begin), (end - begin) * CPR_PAGE_SIZE, resident) < 0) {
        return;
    }
    while (page < end) {
        uint64_t data = resident[page - begin] & 1 ? page : next_data(memory, page, end);

        memset(hole + (page - first), 1, data - page);
        page = data + 1;
    }
}

/* The page faults of this thread so far. */
static long faults(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_minflt + usage.ru_majflt;
}

/* Puts a run into the page tables at once, where it is not: that costs less than a fault for every
   few pages. Where it is, that would cost half as much as the search, so its two ends are tried
   first. What this cannot map is mapped by the faults. */
static void populate(const struct cpr_page_memory *memory, uint64_t first, uint32_t count)
{
    long before = faults();

    (void)*(volatile uint8_t *)page_at(memory, first);
    (void)*(volatile uint8_t *)page_at(memory, first + count - 1);
    if (faults() != before) {
        madvise(page_at(memory, first), (size_t)count * CPR_PAGE_SIZE, MADV_POPULATE_READ);
    }
}

void cpr_pages_find_zero(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                         uint64_t first, uint32_t count, bool *zero)
{
    if (memory->fd >= 0) {
        find_holes(memory, first, count, zero);
    } else {
        memset(zero, 0, count);
    }
    for (uint32_t i = 0, end; i < count; i = end + 1) {
        for (end = i; end < count && !zero[end]; end++) {
        }
        if (end > i) {
            populate(memory, first + i, end - i);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        if (i + AHEAD < count && !zero[i + AHEAD]) {
            __builtin_prefetch(page_at(memory, first + i + AHEAD));
        }
        zero[i] = zero[i] || ops->is_zero(page_at(memory, first + i));
    }
}

void cpr_pages_clear_run(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                         uint64_t first, uint32_t count)
{
    bool zero[CPR_RUN_PAGES];

    cpr_pages_find_zero(ops, memory, first, count, zero);
    for (uint32_t i = 0; i < count; i++) {
        if (!zero[i]) {
            memset(page_at(memory, first + i), 0, CPR_PAGE_SIZE);
        }
    }
}

static int fill_holes(const struct cpr_page_memory *memory, uint64_t first, uint32_t count,
                      const uint8_t *from, uint64_t stride)
{
    struct iovec vectors[CPR_RUN_PAGES];

    for (uint32_t i = 0; i < count; i++) {
        vectors[i].iov_base = (void *)(from + i * stride);
        vectors[i].iov_len = CPR_PAGE_SIZE;
    }
    return cpr_pwrite_all(memory->fd, vectors, (int)count, first * CPR_PAGE_SIZE);
}

int cpr_pages_put_run(const struct cpr_page_ops *ops, const struct cpr_page_memory *memory,
                      uint64_t first, uint32_t count, const uint8_t *from, uint64_t stride)
{
    if (cpr_pages_are_hole(memory, first, count)) {
        return fill_holes(memory, first, count, from, stride);
    }
    for (uint32_t i = 0; i < count; i++) {
        ops->copy(page_at(memory, first + i), from + i * stride);
    }
    return 0;
}
