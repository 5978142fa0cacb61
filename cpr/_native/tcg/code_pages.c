#include "code_pages.h"

#include <dlfcn.h>

enum { PAGE_SHIFT = 12, PAGE_SIZE = 1 << PAGE_SHIFT };
enum { PROT_WRITE_BIT = 1 << 1 }; /* of the library's */

/* The library's functions that these stand before, and that they use; their names are its own. */
void tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t linear, uint64_t physical, uint32_t attrs,
                                    int protection, int mmu_index, uint64_t size);
void tlb_protect_code_x86_64(void *uc, uint64_t ram_address);
void tlb_unprotect_code_x86_64(void *uc, uint64_t ram_address);

static struct {
    void (*set_page)(void *cpu, uint64_t linear, uint64_t physical, uint32_t attrs, int protection,
                     int mmu_index, uint64_t size);
    void (*protect)(void *uc, uint64_t ram_address);
    void (*unprotect)(void *uc, uint64_t ram_address);
    void (*make_fast)(void *cpu, uint64_t linear);
    void (*make_slow)(void *cpu, uintptr_t host, uintptr_t size);
    void (*invalidate)(void *uc, uint64_t start, uint64_t end);
    uint64_t (*ram_address)(void *uc, void *host);
} library;

static const struct {
    const char *name;
    size_t slot;
} symbols[] = {
    {"tlb_set_page_with_attrs_x86_64", 0 * sizeof(void *)},
    {"tlb_protect_code_x86_64", 1 * sizeof(void *)},
    {"tlb_unprotect_code_x86_64", 2 * sizeof(void *)},
    {"tlb_set_dirty_x86_64", 3 * sizeof(void *)},
    {"tlb_reset_dirty_x86_64", 4 * sizeof(void *)},
    {"tb_invalidate_phys_range_x86_64", 5 * sizeof(void *)},
    {"qemu_ram_addr_from_host_x86_64", 6 * sizeof(void *)},
};

static int sets_pages, protects; /* whether the library comes by here */
static __thread struct tcg_code_pages *running;

const char *tcg_code_pages_hook(void *handle)
{
    Dl_info own;

    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
        void *address = dlsym(handle, symbols[i].name);

        if (!address) {
            return "it lacks a function of the 2.1 releases known to cpr";
        }
        *(void **)((char *)&library + symbols[i].slot) = address;
    }
    /* What is global comes before the library's own when it looks for a function. */
    if (!dladdr((void *)tcg_code_pages_hook, &own) ||
        !dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_GLOBAL)) {
        return "this module does not find itself";
    }
    return NULL;
}

int tcg_code_pages_are_known(void)
{
    return __atomic_load_n(&sets_pages, __ATOMIC_RELAXED) &&
           __atomic_load_n(&protects, __ATOMIC_RELAXED);
}

/* Engines share bits where there are more than these. */
static int is_alone(const struct tcg_code_pages *pages)
{
    return *pages->engine_count <= 8;
}

static uint8_t *note_of(const struct tcg_ram *ram, uint64_t offset)
{
    return &ram->notes[offset >> PAGE_SHIFT];
}

static const struct tcg_ram *find(const struct tcg_code_pages *pages, uint64_t ram_address,
                                  uint64_t *offset)
{
    for (uint32_t i = 0; i < pages->ram->count; i++) {
        *offset = ram_address - pages->addresses[i];
        if (*offset < pages->ram->slots[i].size) {
            return &pages->ram->slots[i];
        }
    }
    return NULL;
}

void tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t linear, uint64_t physical, uint32_t attrs,
                                    int protection, int mmu_index, uint64_t size)
{
    struct tcg_code_pages *pages = running;

    library.set_page(cpu, linear, physical, attrs, protection, mmu_index, size);
    __atomic_store_n(&sets_pages, 1, __ATOMIC_RELAXED);
    if (!pages) {
        return;
    }
    pages->cpu = cpu;
    if (!(protection & PROT_WRITE_BIT) || !tcg_code_pages_are_known()) {
        return;
    }
    for (uint32_t i = 0; i < pages->ram->count; i++) {
        const struct tcg_ram *ram = &pages->ram->slots[i];
        const uint64_t offset = physical - ram->address;

        if (offset < ram->size) {
            if (!ram->readonly &&
                !(__atomic_load_n(note_of(ram, offset), __ATOMIC_RELAXED) & pages->bit)) {
                library.make_fast(cpu, linear);
            }
            return;
        }
    }
}

void tlb_protect_code_x86_64(void *uc, uint64_t ram_address)
{
    struct tcg_code_pages *pages = running;
    const struct tcg_ram *ram;
    uint64_t offset;

    library.protect(uc, ram_address);
    __atomic_store_n(&protects, 1, __ATOMIC_RELAXED);
    ram = pages ? find(pages, ram_address, &offset) : NULL;
    if (ram && !(__atomic_fetch_or(note_of(ram, offset), pages->bit, __ATOMIC_SEQ_CST) &
                 pages->bit)) {
        library.make_slow(pages->cpu, (uintptr_t)ram->host + (offset & ~(PAGE_SIZE - 1ull)),
                          PAGE_SIZE);
    }
}

void tlb_unprotect_code_x86_64(void *uc, uint64_t ram_address)
{
    struct tcg_code_pages *pages = running;
    const struct tcg_ram *ram;
    uint64_t offset;

    library.unprotect(uc, ram_address);
    ram = pages && is_alone(pages) ? find(pages, ram_address, &offset) : NULL;
    if (ram) {
        __atomic_fetch_and(note_of(ram, offset), (uint8_t)~pages->bit, __ATOMIC_SEQ_CST);
    }
}

void tcg_code_pages_map(struct tcg_code_pages *pages, void *uc)
{
    pages->uc = uc;
    for (uint32_t i = 0; i < pages->ram->count; i++) {
        pages->addresses[i] = library.ram_address(uc, pages->ram->slots[i].host);
    }
}

void tcg_code_pages_begin(struct tcg_code_pages *pages)
{
    running = pages;
}

void tcg_code_pages_end(void)
{
    running = NULL;
}

void tcg_code_pages_forget(struct tcg_code_pages *pages)
{
    for (uint32_t i = 0; i < pages->ram->count && is_alone(pages); i++) {
        const struct tcg_ram *ram = &pages->ram->slots[i];

        for (uint64_t offset = 0; offset < ram->size; offset += PAGE_SIZE) {
            uint8_t *note = note_of(ram, offset);

            if (__atomic_load_n(note, __ATOMIC_RELAXED) & pages->bit) {
                __atomic_fetch_and(note, (uint8_t)~pages->bit, __ATOMIC_SEQ_CST);
            }
        }
    }
}

void tcg_code_pages_invalidate(struct tcg_code_pages *pages, uint64_t address)
{
    for (uint32_t i = 0; i < pages->ram->count; i++) {
        const uint64_t offset = address - pages->ram->slots[i].address;

        if (offset < pages->ram->slots[i].size) {
            const uint64_t start = pages->addresses[i] + offset;

            library.invalidate(pages->uc, start, start + PAGE_SIZE);
        }
    }
}
