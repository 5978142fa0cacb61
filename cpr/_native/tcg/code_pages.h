/* Which pages of RAM have code that an engine has translated, so that only writes to these are slow.

The library has each write of the guest's look for translated code.  It has what it takes to let
writes to other pages go straight to memory, but does not use it: its own functions that set up a
page and that note code in one are called by way of this file, which does. */
#ifndef CPR_TCG_CODE_PAGES_H
#define CPR_TCG_CODE_PAGES_H

#include <stddef.h>
#include <stdint.h>

#include "ram.h"

/* Of one engine.  Set before the first run: `ram`; `bit`, its own in the notes of pages there; and
   `engine_count`, of all that there are. */
struct tcg_code_pages {
    const struct tcg_ram_map *ram;
    uint8_t bit;
    const uint32_t *engine_count;
    void *uc;
    void *cpu;                         /* the library's, once it has set up a page */
    uint64_t addresses[TCG_RAM_MAX];   /* where the library counts each range of RAM from */
};

/* Gets between the functions of the library, which is not used yet.  NULL, or what is wrong. */
const char *tcg_code_pages_hook(void *library);

/* Whether all engines' pages are known; before an engine has run code nobody can say. */
int tcg_code_pages_are_known(void);

/* The library has been given the RAM of the map. */
void tcg_code_pages_map(struct tcg_code_pages *pages, void *uc);

/* Around a run of the engine, in the thread that runs it. */
void tcg_code_pages_begin(struct tcg_code_pages *pages);
void tcg_code_pages_end(void);

/* The library has forgotten all translations. */
void tcg_code_pages_forget(struct tcg_code_pages *pages);

/* Has the library forget those of one page of RAM, between runs. */
void tcg_code_pages_invalidate(struct tcg_code_pages *pages, uint64_t address);

#endif
