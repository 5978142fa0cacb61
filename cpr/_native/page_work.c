/* An operation on many pages: batches of them, handed out to the threads of a pool. */
#include "page_work.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#define WORD_BITS 64

struct cpr_page_job {
    const struct cpr_page_ops *ops;
    const struct cpr_page_work *work;
    uint64_t budget;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    struct cpr_page_walk *walk;
    struct cpr_page_counts *counts;
    uint64_t spent;    /* bytes */
    uint64_t reserved; /* bytes that the batches under way may take */
    uint64_t taken;    /* batches */
    uint64_t turn;     /* the batch that all before are done */
    int error;
};

void cpr_page_walk_cancel(struct cpr_page_walk *walk)
{
    __atomic_store_n(&walk->cancelled, 1, __ATOMIC_RELAXED);
}

/* Takes the next `limit` pages of the walk, or as many as there are. */
static void fill(struct cpr_page_walk *walk, uint32_t limit, struct cpr_page_batch *batch)
{
    uint64_t end = walk->memory.pages;
    uint64_t next = walk->next;

    batch->count = 0;
    while (batch->count < limit && next < end) {
        uint64_t word = walk->bitmap ? walk->bitmap[next / WORD_BITS] ^ walk->inverted : ~0ull;

        word &= ~0ull << next % WORD_BITS;
        next -= next % WORD_BITS;
        if (!word) {
            next += WORD_BITS;
            continue;
        }
        next += (uint64_t)__builtin_ctzll(word);
        if (next < end) {
            batch->page[batch->count++] = next++;
        }
    }
    walk->next = next < end ? next : end;
}

uint32_t cpr_page_batch_run(const struct cpr_page_batch *batch, uint32_t begin)
{
    uint32_t end = begin + 1;

    while (end < batch->count && batch->page[end] == batch->page[end - 1] + 1 &&
           batch->zero[end] == batch->zero[begin]) {
        end++;
    }
    return end - begin;
}

static void find_zero(const struct cpr_page_job *job, struct cpr_page_batch *batch)
{
    memset(batch->zero, 0, sizeof(batch->zero));
    if (!job->work->find_zero) {
        return;
    }
    for (uint32_t i = 0, count; i < batch->count; i += count) {
        count = cpr_page_batch_run(batch, i);
        cpr_pages_find_zero(job->ops, &job->walk->memory, batch->page[i], count, batch->zero + i);
    }
}

/* How many pages the budget has room for now. */
static uint32_t affordable(const struct cpr_page_job *job)
{
    uint64_t used = job->spent + job->reserved;
    uint64_t pages = used < job->budget ? (job->budget - used) / job->work->page_cost : 0;

    if (!pages && !used) {
        return 1;
    }
    return pages < CPR_RUN_PAGES ? (uint32_t)pages : CPR_RUN_PAGES;
}

/* Takes a batch; false where there is nothing more to do. When the budget has no room left, the
   batches under way may yet take less than they could. */
static bool take(struct cpr_page_job *job, struct cpr_page_batch *batch)
{
    struct cpr_page_walk *walk = job->walk;
    uint32_t pages;

    pthread_mutex_lock(&job->lock);
    pages = affordable(job);
    while (!pages && job->reserved && !job->error) {
        pthread_cond_wait(&job->changed, &job->lock);
        pages = affordable(job);
    }
    if (!job->error && __atomic_load_n(&walk->cancelled, __ATOMIC_RELAXED)) {
        job->error = -ECANCELED;
    }
    batch->count = 0;
    if (!job->error) {
        fill(walk, pages, batch);
    }
    if (batch->count) {
        batch->sequence = job->taken++;
        job->reserved += batch->count * job->work->page_cost;
    }
    pthread_mutex_unlock(&job->lock);
    return batch->count > 0;
}

static void finish(struct cpr_page_job *job, const struct cpr_page_batch *batch, int64_t result)
{
    uint64_t zero = 0;

    for (uint32_t i = 0; i < batch->count; i++) {
        zero += batch->zero[i];
    }
    pthread_mutex_lock(&job->lock);
    job->reserved -= batch->count * job->work->page_cost;
    job->turn = batch->sequence + 1;
    if (result < 0) {
        job->error = job->error ? job->error : (int)result;
    } else {
        job->spent += (uint64_t)result;
        job->counts->bytes += (uint64_t)result;
        job->counts->zero += zero;
        job->counts->normal += batch->count - zero;
    }
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->lock);
}

bool cpr_page_job_wait_turn(struct cpr_page_job *job, const struct cpr_page_batch *batch)
{
    bool good;

    pthread_mutex_lock(&job->lock);
    while (job->turn != batch->sequence && !job->error) {
        pthread_cond_wait(&job->changed, &job->lock);
    }
    good = !job->error;
    pthread_mutex_unlock(&job->lock);
    return good;
}

static void take_part(void *argument)
{
    struct cpr_page_job *job = argument;
    struct cpr_page_batch batch;

    while (take(job, &batch)) {
        find_zero(job, &batch);
        finish(job, &batch, job->work->handle(job, job->work->argument, &batch));
    }
}

/* How many threads beside the caller's can be of use: one for each batch after the first. */
static uint32_t useful_helpers(const struct cpr_page_walk *walk, const struct cpr_page_work *work,
                               uint64_t budget)
{
    uint64_t left = walk->next < walk->memory.pages ? walk->memory.pages - walk->next : 0;
    uint64_t pages = budget / work->page_cost < left ? budget / work->page_cost : left;

    pages /= CPR_RUN_PAGES;
    return pages < UINT32_MAX ? (uint32_t)pages : UINT32_MAX;
}

int cpr_page_job_run(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                     const struct cpr_page_work *work, uint64_t budget,
                     struct cpr_page_counts *counts)
{
    struct cpr_page_job job = {
        .ops = cpr_page_pool_ops(pool),
        .work = work,
        .budget = budget,
        .walk = walk,
        .counts = counts,
    };

    pthread_mutex_init(&job.lock, NULL);
    pthread_cond_init(&job.changed, NULL);
    cpr_page_pool_run(pool, take_part, &job, useful_helpers(walk, work, budget));
    pthread_cond_destroy(&job.changed);
    pthread_mutex_destroy(&job.lock);
    return job.error;
}
