#ifndef CPR_PAGE_POOL_H
#define CPR_PAGE_POOL_H

#include "page_ops.h"

/* Threads that work on pages, and the instruction set that they do it in. */
struct cpr_page_pool;

/* Makes a pool of `threads` threads, of which the caller of an operation is one: a pool of one
   starts none. They take no signals. `instruction_set` as for cpr_page_ops_find. The caller owns
   *pool. Returns 0; -EINVAL for no threads; -ENOTSUP for an instruction set that this CPU has not;
   -ENOMEM or -EAGAIN where there can be no more threads, and then there is no pool. */
int cpr_page_pool_create(uint32_t threads, const char *instruction_set,
                         struct cpr_page_pool **pool);

/* Joins the threads and frees the pool; no operation may be under way. */
void cpr_page_pool_destroy(struct cpr_page_pool *pool);

const struct cpr_page_ops *cpr_page_pool_ops(const struct cpr_page_pool *pool);

/* Calls work(argument) on this thread, and at the same time on up to `helpers` others of the pool;
   returns when all have returned. A helper that has not begun by the time that this thread is done
   does not begin: `work` must leave nothing to others that it can do itself. Two callers take
   turns. */
void cpr_page_pool_run(struct cpr_page_pool *pool, void (*work)(void *argument), void *argument,
                       uint32_t helpers);

#endif
