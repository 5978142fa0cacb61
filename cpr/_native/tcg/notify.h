/* Guest-physical addresses at which a write is a write to an eventfd, and nothing else. */
#ifndef CPR_TCG_NOTIFY_H
#define CPR_TCG_NOTIFY_H

#include <pthread.h>
#include <stdint.h>

enum { TCG_NOTIFY_MAX = 512 };

struct tcg_notify {
    uint64_t address;
    uint32_t size;
    int fd;
};

/* Used from any thread. */
struct tcg_notifies {
    pthread_mutex_t lock;
    uint32_t count;
    struct tcg_notify all[TCG_NOTIFY_MAX];
};

/* The eventfd stays the caller's.  0, -EEXIST, or -ENOSPC. */
int tcg_notify_add(struct tcg_notifies *notifies, const struct tcg_notify *notify);
/* The inverse: when it returns, the eventfd is not written any more.  0, or -ENOENT. */
int tcg_notify_remove(struct tcg_notifies *notifies, const struct tcg_notify *notify);

/* Whether the write was one of these. */
int tcg_notify_write(struct tcg_notifies *notifies, uint64_t address, uint32_t size);

#endif
