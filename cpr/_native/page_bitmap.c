/* Bitmaps of pages: what KVM's dirty log says, and what device code adds to it. */
#include "page_bitmap.h"

#define WORD_BITS 64
/* Documentation/admin-guide/mm/pagemap.rst: bit 63 is "page present", bit 62 "page swapped". */
#define PAGEMAP_EXISTS ((uint64_t)3 << 62)

/* The lowest `count` bits, of which there are at most 64. */
static uint64_t low_bits(uint64_t count)
{
    return count < WORD_BITS ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0;
}

void cpr_bitmap_set(uint64_t *words, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % WORD_BITS;
        uint64_t part = count < WORD_BITS - shift ? count : WORD_BITS - shift;

        __atomic_fetch_or(&words[first / WORD_BITS], low_bits(part) << shift, __ATOMIC_RELAXED);
        first += part;
        count -= part;
    }
}

void cpr_bitmap_take(uint64_t *target, uint64_t *source, uint64_t bits)
{
    for (uint64_t i = 0; i * WORD_BITS < bits; i++) {
        if (__atomic_load_n(&source[i], __ATOMIC_RELAXED)) {
            target[i] |= __atomic_exchange_n(&source[i], 0, __ATOMIC_ACQUIRE);
        }
    }
}

void cpr_bitmap_merge(uint64_t *target, uint64_t first, const uint64_t *source, uint64_t count)
{
    uint64_t shift = first % WORD_BITS;

    target += first / WORD_BITS;
    for (uint64_t i = 0; count; i++) {
        uint64_t part = count < WORD_BITS ? count : WORD_BITS;
        uint64_t word = source[i] & low_bits(part);

        if (word) {
            target[i] |= word << shift;
        }
        if (shift && word >> (WORD_BITS - shift)) {
            target[i + 1] |= word >> (WORD_BITS - shift);
        }
        count -= part;
    }
}

void cpr_bitmap_merge_pagemap(uint64_t *target, uint64_t first, const uint64_t *entries,
                              uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t exists = (entries[i] & PAGEMAP_EXISTS) != 0;

        target[(first + i) / WORD_BITS] |= exists << (first + i) % WORD_BITS;
    }
}

uint64_t cpr_bitmap_count(const uint64_t *words, uint64_t bits)
{
    uint64_t count = 0;

    for (uint64_t i = 0; i * WORD_BITS < bits; i++) {
        count += (uint64_t)__builtin_popcountll(words[i] & low_bits(bits - i * WORD_BITS));
    }
    return count;
}
