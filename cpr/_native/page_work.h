#ifndef CPR_PAGE_WORK_H
#define CPR_PAGE_WORK_H

#include "page_memory.h"
#include "page_pool.h"

/* Which pages of a memory an operation is for, and how far it is. All of them where `bitmap` is
   NULL; else those whose bit is set, page n's being bit n % 64 of word n / 64, as in KVM's dirty
   log; `inverted` is XORed to each word: ~0 for those whose bit is clear. */
struct cpr_page_walk {
    struct cpr_page_memory memory;
    const uint64_t *bitmap;
    uint64_t inverted;
    uint64_t next;     /* the first page not yet handled; tells nothing after an error */
    int32_t cancelled; /* set by cpr_page_walk_cancel */
};

/* What an operation has done; added to, not set. `bytes` are those written or read elsewhere. */
struct cpr_page_counts {
    uint64_t zero;
    uint64_t normal;
    uint64_t bytes;
};

/* Up to CPR_RUN_PAGES of the pages of a walk, ascending. */
struct cpr_page_batch {
    uint64_t sequence; /* 0, 1, 2, ... within an operation */
    uint32_t count;
    uint64_t page[CPR_RUN_PAGES];
    bool zero[CPR_RUN_PAGES]; /* all false where the operation does not look */
};

struct cpr_page_job;

/* An operation: what it does to each batch, on any thread. `handle` returns the bytes that the
   batch took, or -errno, which ends the operation. `page_cost` is the most that a page can take. */
struct cpr_page_work {
    int64_t (*handle)(struct cpr_page_job *job, void *argument, const struct cpr_page_batch *batch);
    void *argument;
    uint64_t page_cost;
    bool find_zero;
};

/* Stops an operation on this walk, and any later one, with -ECANCELED; from any thread. */
void cpr_page_walk_cancel(struct cpr_page_walk *walk);

/* Handles the pages of `walk` from `next` on, until `budget` bytes are spent: no more than those,
   but at least one page. Returns 0 or -errno. */
int cpr_page_job_run(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                     const struct cpr_page_work *work, uint64_t budget,
                     struct cpr_page_counts *counts);

/* For `handle`: waits until all the batches before this one are done. False: one has failed, and
   this one must do no more. */
bool cpr_page_job_wait_turn(struct cpr_page_job *job, const struct cpr_page_batch *batch);

/* How many of the batch's pages, from index `begin` on, follow each other in memory and are alike
   in being zero. At least 1. */
uint32_t cpr_page_batch_run(const struct cpr_page_batch *batch, uint32_t begin);

#endif
