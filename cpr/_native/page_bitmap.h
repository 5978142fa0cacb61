#ifndef CPR_PAGE_BITMAP_H
#define CPR_PAGE_BITMAP_H

#include <stdint.h>

/* Bitmaps of pages, in the layout of KVM's dirty log: page n is bit n % 64 of word n / 64. */

/* Sets `count` bits from bit `first` on. Threads may do this, and one of them cpr_bitmap_take from
   `words`, at the same time: no bit is lost. */
void cpr_bitmap_set(uint64_t *words, uint64_t first, uint64_t count);

/* Moves `bits` bits: those set in `source` are set in `target`, and cleared in `source`. */
void cpr_bitmap_take(uint64_t *target, uint64_t *source, uint64_t bits);

/* Sets bit `first` + n of `target` for each bit n < `count` that is set in `source`. */
void cpr_bitmap_merge(uint64_t *target, uint64_t first, const uint64_t *source, uint64_t count);

/* Sets bit `first` + n of `target` for each of `count` entries of /proc/PID/pagemap that is of a page
   in memory or in swap. */
void cpr_bitmap_merge_pagemap(uint64_t *target, uint64_t first, const uint64_t *entries,
                              uint64_t count);

/* How many of the first `bits` bits are set. */
uint64_t cpr_bitmap_count(const uint64_t *words, uint64_t bits);

#endif
