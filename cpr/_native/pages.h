#ifndef CPR_PAGES_H
#define CPR_PAGES_H

#include "page_work.h"

/* What becomes of a page that is zero in the source of a copy. */
enum cpr_zero_pages {
    CPR_ZERO_COPY,  /* it is copied: no page is looked at */
    CPR_ZERO_SKIP,  /* nothing: the target is known to be zero there */
    CPR_ZERO_CLEAR, /* the target's page is cleared, unless it is a hole or zero already */
};

/* Copies the pages of `walk` to the same page numbers of `target`, which must have them and must
   not overlap. A page costs the budget its size if it is copied, else nothing. Returns 0 or
   -errno. */
int cpr_pages_copy(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                   const struct cpr_page_memory *target, enum cpr_zero_pages zero_pages,
                   uint64_t budget, struct cpr_page_counts *counts);

/* Makes the pages of `walk` zero, leaving alone those that are holes or zero already; those count
   as zero and the others as normal. Returns 0 or -errno. */
int cpr_pages_clear(struct cpr_page_pool *pool, struct cpr_page_walk *walk,
                    struct cpr_page_counts *counts);

#endif
