/* What the guest is told of its processor where that is not what the library would say. */
#ifndef CPR_TCG_CPUID_H
#define CPR_TCG_CPUID_H

#include <stdint.h>

#include "cpu.h"

enum { TCG_CPUID_LEAVES = 10 };

struct tcg_cpuid_leaf {
    uint32_t number;
    uint32_t subleaf;
    uint32_t registers[4]; /* EAX, EBX, ECX, EDX */
};

struct tcg_cpuid {
    struct tcg_cpuid_leaf leaves[TCG_CPUID_LEAVES];
    uint32_t apic_id;
};

/* Asks the library for its leaves by running the instruction on `cpu`, which has no memory yet, and
   changes what is the same for all vCPUs: the TSC counts ns at all times, and cannot be adjusted.
   An error of the library, or 0. */
int tcg_cpuid_read(struct tcg_cpuid *cpuid, struct tcg_cpu *cpu, uint32_t apic_id);

/* Writes a leaf of a VM with `vcpu_count` vCPUs, the cores of one package, into `registers`.  False
   where the library's own is right. */
int tcg_cpuid_get(const struct tcg_cpuid *cpuid, uint32_t vcpu_count, uint32_t number,
                  uint32_t subleaf, uint32_t registers[4]);

#endif
