/* What the guest is told of its processor where that is not what the library would say. */
#ifndef CPR_TCG_CPUID_H
#define CPR_TCG_CPUID_H

#include <stdint.h>

#include "cpu.h"

enum { TCG_CPUID_LEAVES = 5 };

struct tcg_cpuid {
    struct {
        uint32_t number;
        uint32_t registers[4]; /* EAX, EBX, ECX, EDX */
    } leaves[TCG_CPUID_LEAVES];
};

/* Asks the library for its leaves by running the instruction on `cpu`, which has no memory yet, and
   changes them: the APIC ID, and a TSC that counts ns at all times.  An error of the library, or 0. */
int tcg_cpuid_read(struct tcg_cpuid *cpuid, struct tcg_cpu *cpu, uint32_t apic_id);

/* The four registers of leaf `number`, or NULL where the library's own are right. */
const uint32_t *tcg_cpuid_find(const struct tcg_cpuid *cpuid, uint32_t number);

#endif
