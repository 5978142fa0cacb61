/* The registers of one vCPU in its unicorn engine, with those that the library hides. */
#ifndef CPR_TCG_CPU_H
#define CPR_TCG_CPU_H

#include <stdint.h>

struct tcg_ram_map;

/* A segment register with its descriptor cache; flags are bits 8 to 23 of a descriptor's second
   word, in place. */
struct cpr_segment {
    uint32_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

/* The start of unicorn's x86 CPU structure, up to the last field that is needed here.  What is not
   a guest register is derived from them (hflags) or lazily evaluated flags (cc_*, df). */
struct tcg_registers {
    uint64_t regs[16];
    uint64_t rip;
    uint64_t rflags_rest;
    uint64_t cc_dst;
    uint64_t cc_src;
    uint64_t cc_src2;
    uint32_t cc_op;
    int32_t df;
    uint32_t hflags;
    uint32_t hflags2;
    struct cpr_segment segs[6];
    struct cpr_segment ldt;
    struct cpr_segment tr;
    struct cpr_segment gdt;
    struct cpr_segment idt;
    uint64_t cr[9];
    int32_t a20_mask;
    uint64_t bounds[4][2];
    uint64_t bounds_config[2];
    uint64_t bounds_msr;
    uint64_t efer;
};

enum { TCG_NO_VECTOR = -1 };

/* The part of that structure around the debug registers.  `being_delivered` is the vector of an
   exception during whose delivery another one would be a double fault, or -1. */
struct tcg_exception {
    int32_t error_code;
    int32_t is_software;
    uint64_t next_rip;
    uint64_t dr[8];
    uint64_t breakpoints[4];
    int32_t being_delivered;
};

/* An engine.  `registers` and `exception` point into `context`, a copy of the engine's CPU that
   tcg_cpu_load() refreshes and tcg_cpu_store() writes back; `rflags` is part of that copy. */
struct tcg_cpu {
    void *uc;
    void *context;
    struct tcg_registers *registers;
    struct tcg_exception *exception;
    uint64_t rflags;
    const struct tcg_ram_map *ram;
};

/* The architectural state of a vCPU, as accel/tcg/state.py carries it to and from x86.VMSTATE_CPU. */
struct cpr_tcg_state {
    uint64_t regs[16];
    uint64_t rip;
    uint64_t rflags;
    struct cpr_segment segs[6];
    struct cpr_segment ldt;
    struct cpr_segment tr;
    struct cpr_segment gdt;
    struct cpr_segment idt;
    uint64_t cr[5];
    uint64_t dr[8];
    uint64_t efer;
    uint32_t shadow;        /* interrupts are held off until after the next instruction */
    uint32_t a20;           /* the A20 line is open */
    uint8_t fxsave[512];    /* FXSAVE image, 64-bit form (Intel SDM vol. 1, 10.5.1) */
    uint8_t ymm_high[256];  /* upper halves of YMM0 to YMM15 */
    uint64_t tsc;           /* the time stamp counter, of all vCPUs of the VM alike */
    uint32_t mp_state;      /* as KVM_GET_MP_STATE counts */
};

/* Opens an engine in `cpu`, for a VM with the memory `ram`.  NULL, or what is wrong in static
   storage, and nothing stays open. */
const char *tcg_cpu_open(struct tcg_cpu *cpu, const struct tcg_ram_map *ram);
void tcg_cpu_close(struct tcg_cpu *cpu);

void tcg_cpu_load(struct tcg_cpu *cpu);
void tcg_cpu_store(struct tcg_cpu *cpu);
/* Recomputes in the copy what the engine derives from segments, control registers and EFER. */
void tcg_cpu_derive(struct tcg_cpu *cpu);
/* Forgets translated code. */
void tcg_cpu_forget_code(struct tcg_cpu *cpu);
/* Forgets translated code and cached translations of addresses. */
void tcg_cpu_flush(struct tcg_cpu *cpu);

/* Both are about everything but `tsc` and `mp_state`. */
void tcg_cpu_get_state(struct tcg_cpu *cpu, struct cpr_tcg_state *state);
void tcg_cpu_set_state(struct tcg_cpu *cpu, const struct cpr_tcg_state *state);
uint64_t tcg_cpu_read_msr(struct tcg_cpu *cpu, uint32_t index);
void tcg_cpu_write_msr(struct tcg_cpu *cpu, uint32_t index, uint64_t value);

#endif
