#ifndef CPR_PAGE_RECORDS_H
#define CPR_PAGE_RECORDS_H

#include "page_work.h"

/* The pages of a block as records of the migration stream's section 'ram': u64 offset | flags,
   big-endian; without CONTINUE u8 length, idstr; then u8 0 (ZERO) or the page (PAGE). */
enum {
    CPR_RECORD_ZERO = 0x02,
    CPR_RECORD_PAGE = 0x08,
    CPR_RECORD_CONTINUE = 0x20,
    CPR_RECORD_MOST = 8 + 1 + 255 + CPR_PAGE_SIZE, /* the bytes of the longest record */
};

/* The block whose pages they are. `continued`: the record before is of this block too; set by the
   first record. */
struct cpr_record_block {
    uint8_t idstr_length;
    char idstr[256];
    bool continued;
};

/* Writes the records of the pages of `walk` to `fd`, the data by writev from where it is. The
   thread that writes does not hold up the others' search for zeros. Returns 0 or -errno. */
int cpr_records_write(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                      struct cpr_record_block *block, int fd, uint64_t budget,
                      struct cpr_page_counts *counts);

#endif
