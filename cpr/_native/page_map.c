/* Mappings whose address is a multiple of more than a page. */
#include "page_map.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

/* Reserves more than is wanted, maps over the part that is aligned, and gives the rest back. */
void *cpr_map_aligned(int fd, uint64_t offset, uint64_t size, uint64_t alignment, int flags)
{
    uint64_t span = size + alignment;
    char *base = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *start;

    if (base == MAP_FAILED) {
        return MAP_FAILED;
    }
    start = base + (alignment - (uintptr_t)base % alignment) % alignment;
    if (mmap(start, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, (off_t)offset) ==
        MAP_FAILED) {
        int error = errno;

        munmap(base, span);
        errno = error;
        return MAP_FAILED;
    }
    if (start > base) {
        munmap(base, (size_t)(start - base));
    }
    if (base + span > start + size) {
        munmap(start + size, (size_t)(base + span - (start + size)));
    }
    return start;
}
