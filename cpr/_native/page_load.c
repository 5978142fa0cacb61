/* Records of the migration stream to guest pages. */
#include "page_load.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "page_records.h"

#define HEADER_SIZE 8
#define FLAGS (CPR_PAGE_SIZE - 1)

/* One record. */
struct record {
    int32_t block;
    bool zero;
    uint64_t page;
    const uint8_t *data; /* of a PAGE */
    uint64_t size;       /* of the whole record */
};

/* Pages of one block that follow each other, in memory and as records. */
struct run {
    int32_t block;
    bool zero;
    uint64_t first;
    uint32_t count;
    const uint8_t *data;
};

enum verdict { WHOLE, CUT, OTHER };

static int32_t find_block(const struct cpr_load *load, const uint8_t *idstr, uint8_t length)
{
    for (uint32_t i = 0; i < load->count; i++) {
        const struct cpr_load_block *block = &load->blocks[i];

        if (block->idstr_length == length && memcmp(block->idstr, idstr, length) == 0) {
            return (int32_t)i;
        }
    }
    return -1;
}

/* Reads the record at `data`: WHOLE, CUT short, or OTHER than a page that can be put in place. */
static enum verdict parse(const struct cpr_load *load, const uint8_t *data, uint64_t size,
                          struct record *record)
{
    uint64_t word, flags;

    if (size < HEADER_SIZE) {
        return CUT;
    }
    memcpy(&word, data, sizeof(word));
    word = be64toh(word);
    flags = word & FLAGS & ~(uint64_t)CPR_RECORD_CONTINUE;
    if (flags != CPR_RECORD_ZERO && flags != CPR_RECORD_PAGE) {
        return OTHER;
    }
    record->zero = flags == CPR_RECORD_ZERO;
    record->page = word / CPR_PAGE_SIZE;
    record->block = load->current;
    record->size = HEADER_SIZE;
    if (!(word & CPR_RECORD_CONTINUE)) {
        if (size < HEADER_SIZE + 1 || size < HEADER_SIZE + 1u + data[HEADER_SIZE]) {
            return CUT;
        }
        record->block = find_block(load, data + HEADER_SIZE + 1, data[HEADER_SIZE]);
        record->size += 1u + data[HEADER_SIZE];
    }
    if (record->block < 0 || record->page >= load->blocks[record->block].memory.pages) {
        return OTHER;
    }
    record->data = data + record->size;
    record->size += record->zero ? 1 : CPR_PAGE_SIZE;
    if (size < record->size) {
        return CUT;
    }
    return record->zero && *record->data ? OTHER : WHOLE;
}

/* Whether the record could be added to the run, which then is longer. */
static bool extend(struct run *run, const struct record *record)
{
    uint64_t stride = HEADER_SIZE + CPR_PAGE_SIZE;

    if (run->count == CPR_RUN_PAGES || record->block != run->block || record->zero != run->zero ||
        record->page != run->first + run->count ||
        (!run->zero && record->data != run->data + run->count * stride)) {
        return false;
    }
    run->count++;
    return true;
}

/* Puts the pages of a run in place and empties it; returns 0 or -errno. */
static int flush(const struct cpr_page_ops *ops, struct cpr_load *load, struct run *run)
{
    const struct cpr_page_memory *memory;
    struct cpr_load_block *block;
    uint32_t count = run->count;

    run->count = 0;
    if (!count) {
        return 0;
    }
    block = &load->blocks[run->block];
    memory = &block->memory;
    block->taken += count;
    if (run->zero) {
        cpr_pages_clear_run(ops, memory, run->first, count);
        load->counts.zero += count;
        return 0;
    }
    load->counts.normal += count;
    return cpr_pages_put_run(ops, memory, run->first, count, run->data,
                             HEADER_SIZE + CPR_PAGE_SIZE);
}

int64_t cpr_load_bytes(const struct cpr_page_pool *pool, struct cpr_load *load, const uint8_t *data,
                       uint64_t size)
{
    const struct cpr_page_ops *ops = cpr_page_pool_ops(pool);
    enum verdict verdict = WHOLE;
    struct run run = {.count = 0};
    struct record record;
    uint64_t taken = 0;
    int error = 0;

    while (!error && (verdict = parse(load, data + taken, size - taken, &record)) == WHOLE) {
        if (!run.count || !extend(&run, &record)) {
            error = flush(ops, load, &run);
            run = (struct run){record.block, record.zero, record.page, 1, record.data};
        }
        load->current = record.block;
        taken += record.size;
    }
    if (!error) {
        error = flush(ops, load, &run);
    }
    ops->fence();
    load->stopped = verdict == OTHER;
    load->counts.bytes += taken;
    return error ? error : (int64_t)taken;
}
