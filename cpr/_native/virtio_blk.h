#ifndef CPR_VIRTIO_BLK_H
#define CPR_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio_ring.h"

/* A disk: threads that take requests out of virtqueues (virtio 1.2, 5.2) and do them on a file. */
struct cpr_blk;

enum {
    CPR_BLK_QUEUES_MOST = 64,
    CPR_BLK_WORKERS_MOST = 64,
    CPR_BLK_SERIAL_SIZE = 20,
};

/* What becomes of a request that fails: the guest is told; it is told that nothing was wrong; the
   request is kept, and the VM is to be stopped; this only for want of space, and else it is told.
   Where an fdatasync has failed what was written may be lost, and so all that need one fail from then
   on: they are told, except that those until the VM has stopped are kept by CPR_BLK_STOP and
   CPR_BLK_ENOSPC. */
enum { CPR_BLK_REPORT, CPR_BLK_IGNORE, CPR_BLK_STOP, CPR_BLK_ENOSPC };

struct cpr_blk_options {
    int fd;            /* stays the caller's */
    uint64_t sectors;  /* of 512 bytes, the capacity */
    uint32_t queues;
    bool readonly;
    bool discards;     /* whether the file may lose blocks */
    bool syncs;        /* whether a flush is one */
    int read_error, write_error;
    int halted;        /* eventfd that is written when a request is kept; stays the caller's */
    uint8_t serial[20];
};

/* What has halted the disk: `error` is the errno, 0 for nothing. */
struct cpr_blk_error {
    int error;
    bool is_write;
};

/* Makes a disk without threads. Returns 0, or -errno. */
int cpr_blk_new(const struct cpr_blk_options *options, struct cpr_blk **made);

/* Frees it; it must not be running. */
void cpr_blk_free(struct cpr_blk *blk);

/* Gives it queue `index`, whose notifications come by the non-blocking eventfd `kick`. Both stay
   the caller's. Returns 0 or -errno. */
int cpr_blk_set_queue(struct cpr_blk *blk, uint32_t index, struct cpr_virtqueue *queue, int kick);

/* Starts the threads, at least one and at most `workers`, deaf to signals. They begin with the
   requests that were kept, and with what the queues have. Returns 0 or -errno. */
int cpr_blk_start(struct cpr_blk *blk, uint32_t workers);

/* The inverse. When it returns, each request that had been taken is done and given back, or kept;
   the others are in their queues. Nothing happens where there are no threads. */
void cpr_blk_stop(struct cpr_blk *blk);

/* Whether each write is to be followed by a flush; from any thread. */
void cpr_blk_set_write_through(struct cpr_blk *blk, bool on);

/* What has halted it since the last start. */
void cpr_blk_last_error(struct cpr_blk *blk, struct cpr_blk_error *error);

/* The errno of the fdatasync that has failed, 0 for none; from any thread. */
int cpr_blk_sync_error(struct cpr_blk *blk);

/* Makes it so, while it is not running. */
void cpr_blk_set_sync_error(struct cpr_blk *blk, int error);

/* The heads of the kept requests of a queue, at most CPR_VIRTQUEUE_MOST, while it is not running;
   returns how many. */
uint32_t cpr_blk_kept(struct cpr_blk *blk, uint32_t index, uint16_t *heads);

/* The inverse. Returns 0, or -EINVAL for more than a queue can have. */
int cpr_blk_keep(struct cpr_blk *blk, uint32_t index, const uint16_t *heads, uint32_t count);

#endif
