#include "memory.h"

#include <string.h>

#include "ram.h"

enum { EXCEPTION_PF = 14 };
enum { PF_PRESENT = 1 << 0, PF_WRITE = 1 << 1 };

enum { CR0_WP = 1 << 16, CR4_PSE = 1 << 4, CR4_PAE = 1 << 5, EFER_LMA = 1 << 10 };
static const uint64_t cr0_pg = 1ull << 31;

enum { PTE_PRESENT = 1 << 0, PTE_WRITABLE = 1 << 1, PTE_LARGE = 1 << 7 };
static const uint64_t page_size = 4096;

/* A paging mode (Intel SDM vol. 3, 4.1.1): where its walk starts and how wide its tables are. */
struct paging {
    int top_shift;
    int index_bits;
    size_t entry_size;
    uint64_t root_mask;
    uint64_t frame_mask;
    int largest_leaf_shift;
};

static const struct paging paging_32 = {22, 10, 4, 0xfffff000, 0xfffff000, 22};
static const struct paging paging_pae = {30, 9, 8, 0xffffffe0, 0x000ffffffffff000, 21};
static const struct paging paging_4_level = {
    39, 9, 8, 0x000ffffffffff000, 0x000ffffffffff000, 30,
};

static uint64_t read_entry(const struct tcg_cpu *cpu, uint64_t address, size_t size)
{
    uint64_t available, entry = 0;
    const uint8_t *host;

    address &= (uint64_t)(int64_t)cpu->registers->a20_mask;
    host = tcg_ram_find(cpu->ram, address, 0, &available);
    memcpy(&entry, host ? host : (const uint8_t *)"\xff\xff\xff\xff\xff\xff\xff\xff", size);
    return entry;
}

static const struct paging *paging_of(const struct tcg_registers *r)
{
    if (r->efer & EFER_LMA) {
        return &paging_4_level;
    }
    return r->cr[4] & CR4_PAE ? &paging_pae : &paging_32;
}

static int is_leaf(const struct tcg_registers *r, const struct paging *p, int shift, uint64_t entry)
{
    if (shift == 12) {
        return 1;
    }
    if (!(entry & PTE_LARGE) || shift > p->largest_leaf_shift) {
        return 0;
    }
    return p != &paging_32 || (r->cr[4] & CR4_PSE);
}

/* 0 and *physical, or -1 and the page fault's error code. */
static int translate(const struct tcg_cpu *cpu, uint64_t linear, int is_write, uint64_t *physical,
                     uint32_t *error_code)
{
    const struct tcg_registers *r = cpu->registers;
    const uint64_t a20_mask = (uint64_t)(int64_t)r->a20_mask;
    const struct paging *p = paging_of(r);
    uint64_t table = r->cr[3] & p->root_mask;
    const int obeys_writable = is_write && (r->cr[0] & CR0_WP);

    if (!(r->efer & EFER_LMA)) {
        linear = (uint32_t)linear;
    }
    if (!(r->cr[0] & cr0_pg)) {
        *physical = linear & a20_mask;
        return 0;
    }
    for (int shift = p->top_shift;; shift -= p->index_bits) {
        uint64_t index = linear >> shift & ((1u << p->index_bits) - 1);
        uint64_t entry = read_entry(cpu, table + index * p->entry_size, p->entry_size);
        int has_writable = p != &paging_pae || shift != p->top_shift;

        *error_code = is_write ? PF_WRITE : 0;
        if (!(entry & PTE_PRESENT)) {
            return -1;
        }
        if (obeys_writable && has_writable && !(entry & PTE_WRITABLE)) {
            *error_code |= PF_PRESENT;
            return -1;
        }
        if (is_leaf(r, p, shift, entry)) {
            uint64_t inside = (1ull << shift) - 1;
            *physical = ((entry & p->frame_mask & ~inside) | (linear & inside)) & a20_mask;
            return 0;
        }
        table = entry & p->frame_mask;
    }
}

/* Translates and finds the host memory of one piece: *size is cut to what lies together. */
static int find_piece(struct tcg_cpu *cpu, uint64_t linear, int is_write, size_t *size,
                      uint8_t **host, struct tcg_fault *fault)
{
    uint64_t physical, available, in_page = page_size - linear % page_size;

    if (translate(cpu, linear, is_write, &physical, &fault->error_code) < 0) {
        fault->vector = EXCEPTION_PF;
        cpu->registers->cr[2] = linear;
        return -1;
    }
    *host = tcg_ram_find(cpu->ram, physical, is_write, &available);
    if (*size > in_page) {
        *size = in_page;
    }
    if (*size > available) {
        *size = available;
    }
    return 0;
}

int tcg_read(struct tcg_cpu *cpu, uint64_t linear, void *to, size_t size, struct tcg_fault *fault)
{
    while (size) {
        size_t piece = size;
        uint8_t *host;

        if (find_piece(cpu, linear, 0, &piece, &host, fault) < 0) {
            return -1;
        }
        if (host) {
            memcpy(to, host, piece);
        } else {
            memset(to, 0xff, piece);
        }
        to = (uint8_t *)to + piece;
        linear += piece;
        size -= piece;
    }
    return 0;
}

int tcg_write(struct tcg_cpu *cpu, uint64_t linear, const void *from, size_t size,
              struct tcg_fault *fault)
{
    while (size) {
        size_t piece = size;
        uint8_t *host;

        if (find_piece(cpu, linear, 1, &piece, &host, fault) < 0) {
            return -1;
        }
        if (host) {
            memcpy(host, from, piece);
        }
        from = (const uint8_t *)from + piece;
        linear += piece;
        size -= piece;
    }
    return 0;
}
