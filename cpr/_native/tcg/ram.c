#include "ram.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

const uint64_t tcg_physical_end = 1ull << 40;

static const uint64_t page_size = 4096;

int tcg_ram_add(struct tcg_ram_map *map, const struct tcg_ram *ram)
{
    const struct tcg_ram *before, *after;
    uint8_t *notes;
    uint32_t place = 0;

    if (!ram->size || (ram->address | ram->size) % page_size || ram->size > tcg_physical_end ||
        ram->address > tcg_physical_end - ram->size) {
        return -EINVAL;
    }
    if (map->count == TCG_RAM_MAX) {
        return -ENOSPC;
    }
    while (place < map->count && map->slots[place].address < ram->address) {
        place++;
    }
    before = place ? &map->slots[place - 1] : NULL;
    after = place < map->count ? &map->slots[place] : NULL;
    if ((before && before->address + before->size > ram->address) ||
        (after && ram->address + ram->size > after->address)) {
        return -EINVAL;
    }
    notes = calloc(ram->size / page_size, 1);
    if (!notes) {
        return -ENOMEM;
    }
    memmove(&map->slots[place + 1], &map->slots[place], (map->count - place) * sizeof(*ram));
    map->slots[place] = *ram;
    map->slots[place].notes = notes;
    map->count++;
    map->version++;
    return 0;
}

int tcg_ram_remove(struct tcg_ram_map *map, uint64_t address, uint64_t size)
{
    for (uint32_t i = 0; i < map->count; i++) {
        struct tcg_ram *ram = &map->slots[i];
        if (ram->address == address && ram->size == size) {
            free(ram->notes);
            map->count--;
            memmove(ram, ram + 1, (map->count - i) * sizeof(*ram));
            map->version++;
            return 0;
        }
    }
    return -EINVAL;
}

void tcg_ram_clear(struct tcg_ram_map *map)
{
    while (map->count) {
        free(map->slots[--map->count].notes);
    }
}

uint8_t *tcg_ram_find(const struct tcg_ram_map *map, uint64_t address, int is_write,
                      uint64_t *available)
{
    for (uint32_t i = 0; i < map->count; i++) {
        const struct tcg_ram *ram = &map->slots[i];
        if (address - ram->address < ram->size) {
            *available = ram->size - (address - ram->address);
            return is_write && ram->readonly ? NULL : ram->host + (address - ram->address);
        }
    }
    *available = page_size - address % page_size;
    return NULL;
}
