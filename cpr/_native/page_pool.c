/* A pool of threads in which the caller works too and never waits for one that has yet to wake. */
#include "page_pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

struct cpr_page_pool {
    const struct cpr_page_ops *ops;
    pthread_mutex_t caller; /* held by the one whose work it is */
    pthread_mutex_t lock;   /* of what follows */
    pthread_cond_t wanted_changed;
    pthread_cond_t idle;
    void (*work)(void *argument);
    void *argument;
    uint32_t wanted; /* helpers that may yet begin */
    uint32_t running;
    bool closing;
    uint32_t helpers;
    pthread_t threads[];
};

static void *help(void *argument)
{
    struct cpr_page_pool *pool = argument;

    pthread_mutex_lock(&pool->lock);
    while (!pool->closing) {
        if (!pool->wanted) {
            pthread_cond_wait(&pool->wanted_changed, &pool->lock);
            continue;
        }
        pool->wanted--;
        pool->running++;
        pthread_mutex_unlock(&pool->lock);
        pool->work(pool->argument);
        pthread_mutex_lock(&pool->lock);
        if (--pool->running == 0) {
            pthread_cond_signal(&pool->idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Starts the helpers, deaf to signals; returns 0 or -errno. */
static int start(struct cpr_page_pool *pool, uint32_t helpers)
{
    sigset_t all, old;
    int error = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool->helpers < helpers && !error) {
        error = pthread_create(&pool->threads[pool->helpers], NULL, help, pool);
        pool->helpers += !error;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -error;
}

int cpr_page_pool_create(uint32_t threads, const char *instruction_set,
                         struct cpr_page_pool **pool)
{
    const struct cpr_page_ops *ops = cpr_page_ops_find(instruction_set);
    struct cpr_page_pool *made;
    int error;

    if (!threads) {
        return -EINVAL;
    }
    if (!ops) {
        return -ENOTSUP;
    }
    made = calloc(1, sizeof(*made) + (threads - 1) * sizeof(made->threads[0]));
    if (!made) {
        return -ENOMEM;
    }
    made->ops = ops;
    pthread_mutex_init(&made->caller, NULL);
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->wanted_changed, NULL);
    pthread_cond_init(&made->idle, NULL);
    error = start(made, threads - 1);
    if (error) {
        cpr_page_pool_destroy(made);
        return error;
    }
    *pool = made;
    return 0;
}

void cpr_page_pool_destroy(struct cpr_page_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->wanted_changed);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->helpers; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->wanted_changed);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->caller);
    free(pool);
}

const struct cpr_page_ops *cpr_page_pool_ops(const struct cpr_page_pool *pool)
{
    return pool->ops;
}

void cpr_page_pool_run(struct cpr_page_pool *pool, void (*work)(void *argument), void *argument,
                       uint32_t helpers)
{
    pthread_mutex_lock(&pool->caller);
    pthread_mutex_lock(&pool->lock);
    pool->work = work;
    pool->argument = argument;
    pool->wanted = helpers < pool->helpers ? helpers : pool->helpers;
    for (uint32_t i = 0; i < pool->wanted; i++) {
        pthread_cond_signal(&pool->wanted_changed);
    }
    pthread_mutex_unlock(&pool->lock);
    work(argument);
    pthread_mutex_lock(&pool->lock);
    pool->wanted = 0;
    while (pool->running) {
        pthread_cond_wait(&pool->idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->caller);
}
