#include "notify.h"

#include <errno.h>
#include <unistd.h>

/* The index of what is at the address; `count` for none. */
static uint32_t find(const struct tcg_notifies *notifies, uint64_t address, uint32_t size)
{
    uint32_t i = 0;

    while (i < notifies->count &&
           (notifies->all[i].address != address || notifies->all[i].size != size)) {
        i++;
    }
    return i;
}

int tcg_notify_add(struct tcg_notifies *notifies, const struct tcg_notify *notify)
{
    int result = 0;

    pthread_mutex_lock(&notifies->lock);
    if (find(notifies, notify->address, notify->size) < notifies->count) {
        result = -EEXIST;
    } else if (notifies->count == TCG_NOTIFY_MAX) {
        result = -ENOSPC;
    } else {
        notifies->all[notifies->count++] = *notify;
    }
    pthread_mutex_unlock(&notifies->lock);
    return result;
}

int tcg_notify_remove(struct tcg_notifies *notifies, const struct tcg_notify *notify)
{
    int result = -ENOENT;
    uint32_t place;

    pthread_mutex_lock(&notifies->lock);
    place = find(notifies, notify->address, notify->size);
    if (place < notifies->count && notifies->all[place].fd == notify->fd) {
        notifies->all[place] = notifies->all[--notifies->count];
        result = 0;
    }
    pthread_mutex_unlock(&notifies->lock);
    return result;
}

int tcg_notify_write(struct tcg_notifies *notifies, uint64_t address, uint32_t size)
{
    const uint64_t one = 1;
    uint32_t place;
    int found;

    pthread_mutex_lock(&notifies->lock);
    place = find(notifies, address, size);
    found = place < notifies->count;
    /* A counter that is full is a signal too. */
    if (found && write(notifies->all[place].fd, &one, sizeof(one)) < 0) {
        found = 1;
    }
    pthread_mutex_unlock(&notifies->lock);
    return found;
}
