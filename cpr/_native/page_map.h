#ifndef CPR_PAGE_MAP_H
#define CPR_PAGE_MAP_H

#include <stdint.h>

/* Maps `size` bytes of `fd` from `offset` on, readable and writable, at a multiple of `alignment`;
   `flags` as for mmap(2), and `fd` -1 for anonymous memory. Returns MAP_FAILED and errno where that
   fails; nothing is left then. */
void *cpr_map_aligned(int fd, uint64_t offset, uint64_t size, uint64_t alignment, int flags);

#endif
