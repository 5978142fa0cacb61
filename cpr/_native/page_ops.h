#ifndef CPR_PAGE_OPS_H
#define CPR_PAGE_OPS_H

#include <stdbool.h>
#include <stdint.h>

enum { CPR_PAGE_SIZE = 4096 };

/* What is done to one page, in one instruction set. A page that the guest writes meanwhile is read
   as it is before or after each store; whoever needs it whole has it in a dirty bitmap. */
struct cpr_page_ops {
    const char *name;
    bool (*is_zero)(const void *page);
    /* `to` is aligned to a page, `from` need not be. The stores may be non-temporal: `fence` is
       needed before another thread is told of them. */
    void (*copy)(void *to, const void *from);
    void (*fence)(void);
};

/* The operations called `name` ("avx512", "avx2", "portable"), or where that is NULL the fastest
   that this CPU has. Returns NULL where it has not, or there are none of that name. */
const struct cpr_page_ops *cpr_page_ops_find(const char *name);

#endif
