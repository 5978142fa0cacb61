/* One vCPU's unicorn engine with its memory and hooks, and how it runs one slice of guest code. */
#ifndef CPR_TCG_ENGINE_H
#define CPR_TCG_ENGINE_H

#include <stdint.h>

#include "code_pages.h"
#include "cpu.h"
#include "cpuid.h"
#include "notify.h"
#include "ram.h"

enum { TCG_ROM_WRITES_MAX = 256 };
enum { TCG_STALE_MAX = 256 };
enum { TCG_TRANSLATIONS_MAX = 1 << 18 };
enum { TCG_MAPPINGS_MAX = 65 }; /* all RAM slots, and the gaps around them */

/* What is asked of an engine beside the requests of vm.h. */
enum {
    TCG_YIELD = 1 << 16,    /* another vCPU has waited for a whole time slice */
    TCG_UNDO_ROM = 1 << 17, /* there are writes to ROM to undo */
    TCG_STALE = 1 << 19,    /* a device has written code */
    TCG_MANY = 1 << 20,     /* TCG_TRANSLATIONS_MAX blocks have been translated */
    TCG_SHADOW = 1 << 18    /* the first block is the instruction in an interrupt shadow */
};

/* How a slice ended. */
enum tcg_end {
    TCG_END_REQUEST,  /* asked for, or an exception that has been delivered */
    TCG_END_HALT,     /* HLT */
    TCG_END_SHUTDOWN, /* triple fault */
    TCG_END_ERROR     /* `problem` says what */
};

/* A range that the engine has mapped; for the bus's, `address` is the base of the offsets. */
struct tcg_mapping {
    void *handle;
    struct tcg_notifies *notifies;
    uint64_t address;
    uint64_t size;
};

/* Bytes of ROM before the guest's write. */
struct tcg_rom_write {
    uint8_t *host;
    uint32_t size;
    uint8_t bytes[8];
};

struct tcg_engine {
    struct tcg_cpu cpu;
    void *handle;                /* for the functions that Python defines */
    const uint64_t *tsc_offset;  /* what the TSC is ahead of CLOCK_MONOTONIC in ns */
    const uint32_t *vcpu_count;
    struct tcg_notifies *notifies;
    uint32_t requests;           /* bits, atomic */
    struct tcg_cpuid cpuid;
    const char *problem;

    struct tcg_mapping mappings[TCG_MAPPINGS_MAX];
    uint32_t mapping_count;
    uint32_t ram_version;

    /* For a hook the library keeps an entry of each block that it has ever translated. */
    size_t block_hook;
    uint32_t translations;

    struct tcg_code_pages code_pages;
    /* Pages of code that devices have written, by their addresses; under the VM's lock.  Where there
       are too many the count is past the end, and stands for all. */
    uint64_t stale[TCG_STALE_MAX];
    uint32_t stale_count;

    struct tcg_rom_write rom_writes[TCG_ROM_WRITES_MAX];
    uint32_t rom_write_count;

    /* How the hooks ended the slice; if it was none of them, it was HLT. */
    int stopped;
    int vector;
    int (*system_call)(struct tcg_cpu *cpu);
};

/* `engine` is zeroed but for what the caller sets: handle, tsc_offset, vcpu_count, notifies.  NULL, or
   what is wrong in static storage, and nothing stays open. */
const char *tcg_engine_open(struct tcg_engine *engine, const struct tcg_ram_map *ram,
                            uint32_t apic_id);
void tcg_engine_close(struct tcg_engine *engine);

/* Runs guest code until a request ends it at the start of a block, or until it ends otherwise. */
enum tcg_end tcg_engine_run(struct tcg_engine *engine);

/* Has the engine, between its runs, forget the translations of pages that devices have written. */
void tcg_engine_forget_stale(struct tcg_engine *engine);

/* Whether an interrupt may be delivered now, by RFLAGS.IF and the interrupt shadow. */
int tcg_engine_is_interruptible(struct tcg_engine *engine);

uint32_t tcg_requests(const struct tcg_engine *engine);
void tcg_add_requests(struct tcg_engine *engine, uint32_t requests);
/* Returns and clears those of `requests` that are there. */
uint32_t tcg_take_requests(struct tcg_engine *engine, uint32_t requests);

/* CLOCK_MONOTONIC. */
uint64_t tcg_now_ns(void);

#endif
