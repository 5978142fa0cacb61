/* The guest-physical memory that is host memory. */
#ifndef CPR_TCG_RAM_H
#define CPR_TCG_RAM_H

#include <stdint.h>

enum { TCG_RAM_MAX = 32 };

struct tcg_ram {
    uint64_t address;
    uint64_t size;
    uint8_t *host;
    uint32_t readonly;
    uint8_t *notes; /* the map's: a byte for each page, with a bit for each engine that has
                       translated code there; engine n has bit n % 8 */
};

/* Ordered by address; `version` changes with every change. */
struct tcg_ram_map {
    struct tcg_ram slots[TCG_RAM_MAX];
    uint32_t count;
    uint32_t version;
};

/* Where guest-physical memory ends: the engines' addresses have 40 bits. */
extern const uint64_t tcg_physical_end;

/* 0; -EINVAL for a range that overlaps another, is not of whole pages or is out of reach; -ENOSPC
   when there are too many; -ENOMEM. */
int tcg_ram_add(struct tcg_ram_map *map, const struct tcg_ram *ram);
/* 0, or -EINVAL: there is no such range. */
int tcg_ram_remove(struct tcg_ram_map *map, uint64_t address, uint64_t size);
void tcg_ram_clear(struct tcg_ram_map *map);

/* The host memory of a guest-physical address, or NULL: it is not RAM, or not writable RAM.
   *available is how many bytes from there on are alike. */
uint8_t *tcg_ram_find(const struct tcg_ram_map *map, uint64_t address, int is_write,
                      uint64_t *available);

#endif
