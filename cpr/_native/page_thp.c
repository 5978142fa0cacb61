/* Huge pages ahead of the writes to a tmpfs file. */
#include "page_thp.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "page_map.h"
#include "page_ops.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* include/uapi/asm-generic/mman-common.h, newer than Debian 12's libc */
#endif

#define EXTENT ((uint64_t)2 << 20) /* of a page middle directory entry: HPAGE_PMD_SIZE */
#define LEAST (2 * EXTENT)

struct cpr_thp {
    int fd;
    uint64_t old_size; /* of the file */
    uint8_t *base; /* where the file is mapped from offset `first` on */
    uint64_t first;
    uint64_t end; /* of what is mapped */
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    uint64_t planned;   /* the offset up to which the file is going to be written */
    uint64_t written;   /* and up to which it is, or is being */
    uint64_t claimed;   /* some thread has got pages up to there, or is at it */
    uint64_t ready;     /* has pages up to there */
    bool exhausted;     /* there are no more huge pages */
    uint8_t finished[]; /* for each extent */
};

static uint64_t round_up(uint64_t value)
{
    return (value + EXTENT - 1) / EXTENT * EXTENT;
}

static bool on_tmpfs(int fd, struct stat *status)
{
    struct statfs system;

    return !fstat(fd, status) && S_ISREG(status->st_mode) && !fstatfs(fd, &system) &&
           system.f_type == TMPFS_MAGIC && !(fcntl(fd, F_GETFL) & O_APPEND);
}

/* Maps the file, which may have been opened for writing only, aligned as huge pages need it. */
static bool map(struct cpr_thp *thp)
{
    char path[sizeof("/proc/self/fd/") + 3 * sizeof(int)];
    void *mapped;
    int fd;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", thp->fd);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    mapped = cpr_map_aligned(fd, thp->first, thp->end - thp->first, EXTENT, MAP_SHARED);
    close(fd);
    if (mapped == MAP_FAILED) {
        return false;
    }
    thp->base = mapped;
    return true;
}

/* Gets a huge page for an extent. One without any page cannot be collapsed: it gets a small one
   first. False where there is none to be had. */
static bool collapse(const struct cpr_thp *thp, uint64_t extent)
{
    uint8_t *begin = thp->base + extent * EXTENT;

    return !madvise(begin + EXTENT - CPR_PAGE_SIZE, CPR_PAGE_SIZE, MADV_POPULATE_WRITE) &&
           !madvise(begin, EXTENT, MADV_COLLAPSE);
}

struct cpr_thp *cpr_thp_open(int fd, uint64_t most)
{
    struct cpr_thp *thp;
    struct stat status;
    off_t position;
    uint64_t first;
    uint64_t end;

    if (most < LEAST || !on_tmpfs(fd, &status)) {
        return NULL;
    }
    position = lseek(fd, 0, SEEK_CUR);
    if (position < 0) {
        return NULL;
    }
    first = (uint64_t)position / EXTENT * EXTENT;
    end = round_up((uint64_t)position + most);
    thp = calloc(1, sizeof(*thp) + (end - first) / EXTENT);
    if (!thp) {
        return NULL;
    }
    thp->fd = fd;
    thp->old_size = (uint64_t)status.st_size;
    thp->end = end;
    thp->first = thp->claimed = thp->ready = first;
    thp->planned = thp->written = (uint64_t)position;
    if (!map(thp)) {
        free(thp);
        return NULL;
    }
    pthread_mutex_init(&thp->lock, NULL);
    pthread_cond_init(&thp->changed, NULL);
    thp->exhausted = end > thp->old_size && ftruncate(fd, (off_t)end);
    return thp;
}

static uint64_t add(const struct cpr_thp *thp, uint64_t offset, uint64_t bytes)
{
    return thp->end - offset < bytes ? thp->end : offset + bytes;
}

void cpr_thp_plan(struct cpr_thp *thp, uint64_t bytes)
{
    pthread_mutex_lock(&thp->lock);
    thp->planned = add(thp, thp->planned, bytes);
    while (!thp->exhausted && thp->claimed < thp->planned) {
        uint64_t extent = (thp->claimed - thp->first) / EXTENT;
        bool good;

        thp->claimed += EXTENT;
        pthread_mutex_unlock(&thp->lock);
        good = collapse(thp, extent);
        pthread_mutex_lock(&thp->lock);
        thp->exhausted = thp->exhausted || !good;
        thp->finished[extent] = 1;
        while (thp->ready < thp->claimed && thp->finished[(thp->ready - thp->first) / EXTENT]) {
            thp->ready += EXTENT;
        }
        pthread_cond_broadcast(&thp->changed);
    }
    pthread_mutex_unlock(&thp->lock);
}

void cpr_thp_wait(struct cpr_thp *thp, uint64_t bytes)
{
    pthread_mutex_lock(&thp->lock);
    thp->written = add(thp, thp->written, bytes);
    while (!thp->exhausted && thp->ready < thp->written) {
        pthread_cond_wait(&thp->changed, &thp->lock);
    }
    pthread_mutex_unlock(&thp->lock);
}

int cpr_thp_close(struct cpr_thp *thp)
{
    off_t position;
    uint64_t end;
    int error = 0;

    if (!thp) {
        return 0;
    }
    position = lseek(thp->fd, 0, SEEK_CUR);
    end = (uint64_t)position > thp->old_size ? (uint64_t)position : thp->old_size;
    munmap(thp->base, thp->end - thp->first);
    if (position < 0 || ftruncate(thp->fd, (off_t)end)) {
        error = -errno;
    }
    pthread_cond_destroy(&thp->changed);
    pthread_mutex_destroy(&thp->lock);
    free(thp);
    return error;
}
