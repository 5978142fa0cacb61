#ifndef CPR_PAGE_FILE_H
#define CPR_PAGE_FILE_H

#include "page_work.h"

/* The pages of a block at fixed places of a file, as in QEMU's mapped-ram: page n is at `offset` +
   n * 4096, where `offset` is a multiple of 4096, so that the descriptor may be O_DIRECT. */

/* Writes those of the pages of `walk` that are not zero, and sets their bits in `present`; clears
   the bits of those that are. `present` is laid out as a walk's bitmap. Returns 0 or -errno. */
int cpr_file_save(struct cpr_page_pool *pool, struct cpr_page_walk *walk, int fd, uint64_t offset,
                  uint64_t *present, uint64_t budget, struct cpr_page_counts *counts);

/* Reads the pages of `walk`. Returns 0 or -errno; -ENODATA where the file is too short. */
int cpr_file_load(struct cpr_page_pool *pool, struct cpr_page_walk *walk, int fd, uint64_t offset,
                  struct cpr_page_counts *counts);

#endif
