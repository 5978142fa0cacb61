/* Guest pages at fixed places of a file. */
#include "page_file.h"

#include <stdint.h>

#include "page_io.h"

#define WORD_BITS 64
#define BOUNCE_PAGES 32 /* stays in the L2 cache between read and write */

struct file {
    const struct cpr_page_memory *memory;
    int fd;
    uint64_t offset;
    uint64_t *present;
};

/* Two batches may share a word. */
static void mark(uint64_t *present, uint64_t page, bool is_present)
{
    uint64_t bit = 1ull << page % WORD_BITS;

    if (is_present) {
        __atomic_fetch_or(&present[page / WORD_BITS], bit, __ATOMIC_RELAXED);
    } else {
        __atomic_fetch_and(&present[page / WORD_BITS], ~bit, __ATOMIC_RELAXED);
    }
}

static int64_t save_batch(struct cpr_page_job *job, void *argument,
                          const struct cpr_page_batch *batch)
{
    const struct file *file = argument;
    uint64_t written = 0;

    (void)job;
    for (uint32_t i = 0, count; i < batch->count; i += count) {
        uint64_t start = batch->page[i] * CPR_PAGE_SIZE;

        count = cpr_page_batch_run(batch, i);
        if (!batch->zero[i]) {
            struct iovec piece = {file->memory->host + start, (size_t)count * CPR_PAGE_SIZE};
            int error = cpr_pwrite_all(file->fd, &piece, 1, file->offset + start);

            if (error) {
                return error;
            }
            written += (uint64_t)count * CPR_PAGE_SIZE;
        }
        for (uint32_t k = 0; k < count; k++) {
            mark(file->present, batch->page[i + k], !batch->zero[i]);
        }
    }
    return (int64_t)written;
}

int cpr_file_save(struct cpr_page_pool *pool, struct cpr_page_walk *walk, int fd, uint64_t offset,
                  uint64_t *present, uint64_t budget, struct cpr_page_counts *counts)
{
    struct file file = {&walk->memory, fd, offset, present};
    struct cpr_page_work work = {
        .handle = save_batch,
        .argument = &file,
        .page_cost = CPR_PAGE_SIZE,
        .find_zero = true,
    };

    return cpr_page_job_run(pool, walk, &work, budget, counts);
}

/* Reads a run that is a hole, and fills it by writing: that is faster than page faults. */
static int load_hole(const struct file *file, uint64_t first, uint32_t count)
{
    uint8_t bounce[BOUNCE_PAGES * CPR_PAGE_SIZE] __attribute__((aligned(CPR_PAGE_SIZE)));
    int error = 0;

    while (count && !error) {
        uint32_t some = count < BOUNCE_PAGES ? count : BOUNCE_PAGES;
        struct iovec piece = {bounce, (size_t)some * CPR_PAGE_SIZE};
        uint64_t start = first * CPR_PAGE_SIZE;

        error = cpr_pread_all(file->fd, bounce, piece.iov_len, file->offset + start);
        if (!error) {
            error = cpr_pwrite_all(file->memory->fd, &piece, 1, start);
        }
        first += some;
        count -= some;
    }
    return error;
}

static int64_t load_batch(struct cpr_page_job *job, void *argument,
                          const struct cpr_page_batch *batch)
{
    const struct file *file = argument;

    (void)job;
    for (uint32_t i = 0, count; i < batch->count; i += count) {
        uint64_t first = batch->page[i];
        uint64_t start = first * CPR_PAGE_SIZE;
        int error;

        count = cpr_page_batch_run(batch, i);
        if (cpr_pages_are_hole(file->memory, first, count)) {
            error = load_hole(file, first, count);
        } else {
            error = cpr_pread_all(file->fd, file->memory->host + start,
                                  (size_t)count * CPR_PAGE_SIZE, file->offset + start);
        }
        if (error) {
            return error;
        }
    }
    return (int64_t)batch->count * CPR_PAGE_SIZE;
}

int cpr_file_load(struct cpr_page_pool *pool, struct cpr_page_walk *walk, int fd, uint64_t offset,
                  struct cpr_page_counts *counts)
{
    struct file file = {&walk->memory, fd, offset, NULL};
    struct cpr_page_work work = {
        .handle = load_batch,
        .argument = &file,
        .page_cost = CPR_PAGE_SIZE,
        .find_zero = false,
    };

    return cpr_page_job_run(pool, walk, &work, UINT64_MAX, counts);
}
