/* One request of a disk; for C only. */
#ifndef CPR_VIRTIO_BLK_IO_H
#define CPR_VIRTIO_BLK_IO_H

#include <pthread.h>

#include "virtio_blk.h"
#include "virtio_chain.h"

/* The fdatasyncs of a disk, one at a time. The `error` of one that has failed is that of all later ones,
   and those that wait for the same one have its result. */
struct cpr_blk_sync {
    pthread_mutex_t lock;
    uint64_t begun;
    int error; /* an errno, 0 for none */
};

/* What a request has come to. `error` is an errno of the file's, 0 for none; `status` is the
   guest's (VIRTIO_BLK_S_…), unless there is an error; `problem` is set for a chain that is no
   request, a constant text. `unfinished`: the device stops, and the request is to be done again from
   its beginning. `unsynced`: the error is that of an fdatasync. */
struct cpr_blk_result {
    int error;
    bool unfinished;
    bool unsynced;
    bool is_write;
    uint8_t status;
    uint8_t *place; /* of the status in the guest's RAM */
    uint32_t written; /* bytes of the chain, the status included */
    const char *problem;
};

/* Does the request in `chain`, whose pieces it uses up. The status is not written. A request of
   several steps is left between two of them where another thread has set `*stopping`. */
void cpr_blk_execute(const struct cpr_blk_options *options, struct cpr_blk_sync *sync,
                     const bool *stopping, bool write_through, const struct cpr_virtio_memory *memory,
                     struct cpr_chain *chain, struct cpr_blk_result *result);

#endif
