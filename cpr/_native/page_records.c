/* Guest pages to records of the migration stream. */
#include "page_records.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "page_thp.h"
#include "page_io.h"

#define HEADER_SIZE 8
#define ZERO_RECORD_SIZE (HEADER_SIZE + 1)

struct sink {
    const struct cpr_page_walk *walk;
    struct cpr_record_block *block;
    int fd;
    struct cpr_thp *thp; /* or NULL */
};

/* The records of a batch, in pieces: what is not page data is in `bytes`. */
struct records {
    uint64_t size;
    int count;
    struct iovec pieces[2 * CPR_RUN_PAGES];
    uint8_t *end; /* of what is used of `bytes` */
    uint8_t bytes[CPR_RUN_PAGES * ZERO_RECORD_SIZE + 256];
};

/* Appends a piece, or makes the last one longer if this one follows it. */
static void append(struct records *records, void *data, size_t size)
{
    struct iovec *last = records->count ? &records->pieces[records->count - 1] : NULL;

    records->size += size;
    if (last && (uint8_t *)last->iov_base + last->iov_len == (uint8_t *)data) {
        last->iov_len += size;
        return;
    }
    records->pieces[records->count++] = (struct iovec){data, size};
}

static void append_bytes(struct records *records, const void *data, size_t size)
{
    memcpy(records->end, data, size);
    append(records, records->end, size);
    records->end += size;
}

static void append_header(struct records *records, uint64_t word,
                          const struct cpr_record_block *block, bool continued)
{
    uint64_t header = htobe64(continued ? word | CPR_RECORD_CONTINUE : word);

    append_bytes(records, &header, sizeof(header));
    if (!continued) {
        append_bytes(records, &block->idstr_length, 1);
        append_bytes(records, block->idstr, block->idstr_length);
    }
}

static void build(struct records *records, const struct sink *sink,
                  const struct cpr_page_batch *batch)
{
    const struct cpr_record_block *block = sink->block;

    records->size = 0;
    records->count = 0;
    records->end = records->bytes;
    for (uint32_t i = 0; i < batch->count; i++) {
        uint64_t offset = batch->page[i] * CPR_PAGE_SIZE;
        bool continued = batch->sequence || i || block->continued;

        if (batch->zero[i]) {
            append_header(records, offset | CPR_RECORD_ZERO, block, continued);
            append_bytes(records, "", 1);
        } else {
            append_header(records, offset | CPR_RECORD_PAGE, block, continued);
            append(records, sink->walk->memory.host + offset, CPR_PAGE_SIZE);
        }
    }
}

static int64_t write_batch(struct cpr_page_job *job, void *argument,
                           const struct cpr_page_batch *batch)
{
    struct sink *sink = argument;
    struct records records;
    int error;

    build(&records, sink, batch);
    if (sink->thp) {
        cpr_thp_plan(sink->thp, records.size);
    }
    if (!cpr_page_job_wait_turn(job, batch)) {
        return -ECANCELED;
    }
    if (sink->thp) {
        cpr_thp_wait(sink->thp, records.size);
    }
    error = cpr_write_all(sink->fd, records.pieces, records.count, &sink->walk->cancelled);
    return error ? error : (int64_t)records.size;
}

int cpr_records_write(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                      struct cpr_record_block *block, int fd, uint64_t budget,
                      struct cpr_page_counts *counts)
{
    uint64_t idstr_size = block->continued ? 0 : 1 + block->idstr_length;
    uint64_t most =
        (walk->memory.pages - walk->next) * (HEADER_SIZE + CPR_PAGE_SIZE) + idstr_size;
    uint64_t before = counts->bytes;
    struct sink sink = {
        .walk = walk,
        .block = block,
        .fd = fd,
        .thp = cpr_thp_open(fd, most < budget ? most : budget),
    };
    struct cpr_page_work work = {
        .handle = write_batch,
        .argument = &sink,
        .page_cost = HEADER_SIZE + CPR_PAGE_SIZE,
        .find_zero = true,
    };
    int error = cpr_page_job_run(pool, walk, &work, budget > idstr_size ? budget - idstr_size : 0,
                                 counts);
    int closed = cpr_thp_close(sink.thp);

    block->continued = block->continued || counts->bytes > before;
    return error ? error : closed;
}
