/* What the machine's memory can do, by the simplest code: the ceilings of the RAM copy benchmark. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One memcpy for each `piece` bytes. */
void copy_pieces(char *to, const char *from, size_t size, size_t piece)
{
    for (size_t at = 0; at < size; at += piece) {
        memcpy(to + at, from + at, piece);
    }
}

/* Reads every byte, in the widest loads that the CPU has. */
__attribute__((target_clones("avx512f", "avx2", "default"))) uint64_t
read_all(const uint64_t *from, size_t size)
{
    uint64_t any = 0;

    for (size_t i = 0; i < size / sizeof(*from); i++) {
        any |= from[i];
    }
    return any;
}
