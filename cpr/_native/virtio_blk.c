/* The threads of a disk. Each takes whatever queue has requests; several may work on one queue. */
#include "virtio_blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "virtio_blk_io.h"

/* What an event of the epoll instance is about: a queue's index, or one of these. */
enum { EVENT_STOP = CPR_BLK_QUEUES_MOST, EVENT_HELP };

struct blk_queue {
    struct cpr_virtqueue *queue;
    int kick;
    uint32_t kept; /* under the queue's lock, as what follows */
    uint16_t heads[CPR_VIRTQUEUE_MOST];
};

struct cpr_blk {
    struct cpr_blk_options options;
    int epoll, stop, help;
    bool stopping, halted, write_through;
    bool was_unsynced; /* when the threads were started */
    struct cpr_blk_sync sync;
    uint32_t idle;
    struct cpr_blk_error error;
    uint32_t running;
    pthread_t threads[CPR_BLK_WORKERS_MOST];
    struct blk_queue queues[];
};

static int listen_to(struct cpr_blk *blk, int fd, uint32_t events, uint32_t about)
{
    struct epoll_event event = {.events = events, .data.u32 = about};

    return epoll_ctl(blk->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int cpr_blk_new(const struct cpr_blk_options *options, struct cpr_blk **made)
{
    struct cpr_blk *blk;
    int error;

    if (!options->queues || options->queues > CPR_BLK_QUEUES_MOST) {
        return -EINVAL;
    }
    blk = calloc(1, sizeof(*blk) + options->queues * sizeof(blk->queues[0]));
    if (!blk) {
        return -ENOMEM;
    }
    blk->options = *options;
    pthread_mutex_init(&blk->sync.lock, NULL);
    blk->epoll = epoll_create1(EPOLL_CLOEXEC);
    blk->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    blk->help = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    error = blk->epoll < 0 || blk->stop < 0 || blk->help < 0 ? -errno : 0;
    if (!error) {
        error = listen_to(blk, blk->stop, EPOLLIN, EVENT_STOP);
    }
    if (!error) {
        error = listen_to(blk, blk->help, EPOLLIN | EPOLLET, EVENT_HELP);
    }
    if (error) {
        cpr_blk_free(blk);
        return error;
    }
    *made = blk;
    return 0;
}

void cpr_blk_free(struct cpr_blk *blk)
{
    int fds[] = {blk->epoll, blk->stop, blk->help};

    for (int i = 0; i < 3; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    pthread_mutex_destroy(&blk->sync.lock);
    free(blk);
}

int cpr_blk_set_queue(struct cpr_blk *blk, uint32_t index, struct cpr_virtqueue *queue, int kick)
{
    if (index >= blk->options.queues || blk->queues[index].queue) {
        return -EINVAL;
    }
    blk->queues[index].queue = queue;
    blk->queues[index].kick = kick;
    return listen_to(blk, kick, EPOLLIN | EPOLLET, index);
}

static void halt(struct cpr_blk *blk, const struct cpr_blk_result *result)
{
    uint64_t one = 1;

    if (!__atomic_exchange_n(&blk->halted, true, __ATOMIC_ACQ_REL)) {
        blk->error = (struct cpr_blk_error){result->error, result->is_write};
        if (write(blk->options.halted, &one, sizeof(one)) < 0) {
            return; /* a counter that is full is a signal too */
        }
    }
}

static int policy_of(const struct cpr_blk *blk, const struct cpr_blk_result *result)
{
    return result->is_write ? blk->options.write_error : blk->options.read_error;
}

/* Whether a request that has failed is to be kept; not one that would fail for ever. */
static bool keeps(const struct cpr_blk *blk, const struct cpr_blk_result *result)
{
    int policy = policy_of(blk, result);

    if (result->unsynced && blk->was_unsynced) {
        return false;
    }
    return policy == CPR_BLK_STOP || (policy == CPR_BLK_ENOSPC && result->error == ENOSPC);
}

/* Does what was taken, without the queue's lock, and gives it back; false where it is kept. */
static bool finish(struct cpr_blk *blk, struct blk_queue *each, struct cpr_chain *chain)
{
    const struct cpr_virtio_memory *memory = cpr_virtqueue_memory(each->queue);
    bool write_through = __atomic_load_n(&blk->write_through, __ATOMIC_RELAXED);
    struct cpr_blk_result result;

    cpr_virtqueue_unlock(each->queue);
    cpr_blk_execute(&blk->options, &blk->sync, &blk->stopping, write_through, memory, chain,
                    &result);
    cpr_virtqueue_lock(each->queue);
    if (result.problem) {
        cpr_virtqueue_break(each->queue, result.problem);
        return true;
    }
    if (result.error && keeps(blk, &result)) {
        halt(blk, &result);
        result.unfinished = true;
    }
    if (result.unfinished) {
        each->heads[each->kept++] = chain->head;
        return false;
    }
    if (result.error) {
        bool ignores = policy_of(blk, &result) == CPR_BLK_IGNORE && !result.unsynced;

        result.status = ignores ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    }
    *result.place = result.status;
    cpr_virtio_written(memory, result.place, 1);
    cpr_virtqueue_push(each->queue, chain->head, result.written);
    cpr_virtqueue_interrupt(each->queue);
    return true;
}

static bool is_over(struct cpr_blk *blk)
{
    return __atomic_load_n(&blk->stopping, __ATOMIC_ACQUIRE) ||
           __atomic_load_n(&blk->halted, __ATOMIC_ACQUIRE);
}

static int take(struct blk_queue *each, struct cpr_chain *chain)
{
    if (each->kept) {
        return cpr_virtqueue_again(each->queue, each->heads[--each->kept], chain);
    }
    return cpr_virtqueue_pop(each->queue, chain);
}

static void call_for_help(struct cpr_blk *blk, struct blk_queue *each)
{
    uint64_t one = 1;

    if (__atomic_load_n(&blk->idle, __ATOMIC_RELAXED) &&
        (each->kept || cpr_virtqueue_waits(each->queue))) {
        if (write(blk->help, &one, sizeof(one)) < 0) {
            return; /* there are enough calls */
        }
    }
}

static void serve(struct cpr_blk *blk, struct blk_queue *each, struct cpr_chain *chain)
{
    if (!each->queue) {
        return;
    }
    cpr_virtqueue_lock(each->queue);
    while (!is_over(blk)) {
        if (!take(each, chain)) {
            cpr_virtqueue_ask(each->queue, true);
            if (cpr_virtqueue_waits(each->queue)) {
                continue;
            }
            break;
        }
        cpr_virtqueue_ask(each->queue, false);
        call_for_help(blk, each);
        if (!finish(blk, each, chain)) {
            break;
        }
    }
    cpr_virtqueue_unlock(each->queue);
}

static void *work(void *argument)
{
    struct cpr_blk *blk = argument;
    struct cpr_chain *chain = malloc(sizeof(*chain));
    uint32_t about = EVENT_HELP;

    while (chain && !__atomic_load_n(&blk->stopping, __ATOMIC_ACQUIRE)) {
        struct epoll_event event;
        uint64_t count;

        if (about == EVENT_HELP) {
            for (uint32_t i = 0; i < blk->options.queues; i++) {
                serve(blk, &blk->queues[i], chain);
            }
        } else if (about < blk->options.queues) {
            serve(blk, &blk->queues[about], chain);
        }
        __atomic_add_fetch(&blk->idle, 1, __ATOMIC_RELAXED);
        about = epoll_wait(blk->epoll, &event, 1, -1) == 1 ? event.data.u32 : EVENT_STOP;
        __atomic_sub_fetch(&blk->idle, 1, __ATOMIC_RELAXED);
        if (about != EVENT_STOP) {
            int fd = about == EVENT_HELP ? blk->help : blk->queues[about].kick;

            if (read(fd, &count, sizeof(count)) < 0) {
                continue; /* another thread was faster: it looks, and so does this one */
            }
        }
    }
    free(chain);
    return NULL;
}

int cpr_blk_start(struct cpr_blk *blk, uint32_t workers)
{
    sigset_t all, old;
    int error = 0;

    workers = workers < CPR_BLK_WORKERS_MOST ? workers : CPR_BLK_WORKERS_MOST;
    blk->error = (struct cpr_blk_error){0};
    blk->halted = false;
    blk->was_unsynced = blk->sync.error;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (blk->running < workers && !error) {
        error = pthread_create(&blk->threads[blk->running], NULL, work, blk);
        blk->running += !error;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return blk->running ? 0 : -error;
}

void cpr_blk_stop(struct cpr_blk *blk)
{
    uint64_t count = 1;

    if (!blk->running) {
        return;
    }
    __atomic_store_n(&blk->stopping, true, __ATOMIC_RELEASE);
    if (write(blk->stop, &count, sizeof(count)) < 0) {
        abort(); /* it is read below, and never full */
    }
    while (blk->running) {
        pthread_join(blk->threads[--blk->running], NULL);
    }
    if (read(blk->stop, &count, sizeof(count)) < 0) {
        abort();
    }
    blk->stopping = false;
}

void cpr_blk_set_write_through(struct cpr_blk *blk, bool on)
{
    __atomic_store_n(&blk->write_through, on, __ATOMIC_RELAXED);
}

void cpr_blk_last_error(struct cpr_blk *blk, struct cpr_blk_error *error)
{
    *error = __atomic_load_n(&blk->halted, __ATOMIC_ACQUIRE) ? blk->error
                                                             : (struct cpr_blk_error){0};
}

int cpr_blk_sync_error(struct cpr_blk *blk)
{
    return __atomic_load_n(&blk->sync.error, __ATOMIC_ACQUIRE);
}

void cpr_blk_set_sync_error(struct cpr_blk *blk, int error)
{
    blk->sync.error = error;
}

uint32_t cpr_blk_kept(struct cpr_blk *blk, uint32_t index, uint16_t *heads)
{
    struct blk_queue *each = &blk->queues[index];

    for (uint32_t i = 0; i < each->kept; i++) {
        heads[i] = each->heads[i];
    }
    return each->kept;
}

int cpr_blk_keep(struct cpr_blk *blk, uint32_t index, const uint16_t *heads, uint32_t count)
{
    struct blk_queue *each = &blk->queues[index];

    if (index >= blk->options.queues || count > CPR_VIRTQUEUE_MOST) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        each->heads[i] = heads[i];
    }
    each->kept = count;
    return 0;
}
