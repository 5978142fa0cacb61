/* What the library calls while it executes guest code: the hooks, and how they end a slice. */
#ifndef CPR_TCG_HOOKS_H
#define CPR_TCG_HOOKS_H

#include "engine.h"

/* All of them, once.  UC_ERR_OK, or the library's error. */
int tcg_hooks_add(struct tcg_engine *engine);

/* The block hook again, with what the library has kept for it given back; between two slices, without
   translations.  UC_ERR_OK, or the library's error. */
int tcg_hooks_renew_block(struct tcg_engine *engine);

/* Puts back the bytes of ROM that the guest has written. */
void tcg_hooks_undo_rom_writes(struct tcg_engine *engine);

#endif
