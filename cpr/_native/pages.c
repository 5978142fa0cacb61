/* Copying and clearing guest pages in memory. */
#include "pages.h"

#include <stdint.h>
#include <string.h>

struct copy {
    const struct cpr_page_ops *ops;
    const struct cpr_page_memory *source;
    const struct cpr_page_memory *target;
    enum cpr_zero_pages zero_pages;
};

static int64_t copy_batch(struct cpr_page_job *job, void *argument,
                          const struct cpr_page_batch *batch)
{
    const struct copy *copy = argument;
    uint64_t copied = 0;
    int error = 0;

    (void)job;
    for (uint32_t i = 0, count; i < batch->count && !error; i += count) {
        uint64_t first = batch->page[i];

        count = cpr_page_batch_run(batch, i);
        if (!batch->zero[i]) {
            error = cpr_pages_put_run(copy->ops, copy->target, first, count,
                                      copy->source->host + first * CPR_PAGE_SIZE, CPR_PAGE_SIZE);
            copied += count;
        } else if (copy->zero_pages == CPR_ZERO_CLEAR) {
            cpr_pages_clear_run(copy->ops, copy->target, first, count);
        }
    }
    copy->ops->fence();
    return error ? error : (int64_t)(copied * CPR_PAGE_SIZE);
}

int cpr_pages_copy(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                   const struct cpr_page_memory *target, enum cpr_zero_pages zero_pages,
                   uint64_t budget, struct cpr_page_counts *counts)
{
    struct copy copy = {cpr_page_pool_ops(pool), &walk->memory, target, zero_pages};
    struct cpr_page_work work = {
        .handle = copy_batch,
        .argument = &copy,
        .page_cost = CPR_PAGE_SIZE,
        .find_zero = zero_pages != CPR_ZERO_COPY,
    };

    return cpr_page_job_run(pool, walk, &work, budget, counts);
}

static int64_t clear_batch(struct cpr_page_job *job, void *argument,
                           const struct cpr_page_batch *batch)
{
    const struct cpr_page_memory *memory = argument;

    (void)job;
    for (uint32_t i = 0; i < batch->count; i++) {
        if (!batch->zero[i]) {
            memset(memory->host + batch->page[i] * CPR_PAGE_SIZE, 0, CPR_PAGE_SIZE);
        }
    }
    return 0;
}

int cpr_pages_clear(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                    struct cpr_page_counts *counts)
{
    struct cpr_page_work work = {
        .handle = clear_batch,
        .argument = &walk->memory,
        .page_cost = CPR_PAGE_SIZE,
        .find_zero = true,
    };

    return cpr_page_job_run(pool, walk, &work, UINT64_MAX, counts);
}
