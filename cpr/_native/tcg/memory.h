/* Guest memory through the page tables, as the supervisor sees it: for delivering interrupts. */
#ifndef CPR_TCG_MEMORY_H
#define CPR_TCG_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

/* The exception that an access or a check leads to. */
struct tcg_fault {
    uint32_t vector;
    uint32_t error_code;
};

/* Access linear addresses at privilege level 0 through the page tables, by the registers in the
   copy.  Where there is no RAM, reads give ones and writes vanish.  -1 with *fault set, and CR2 in
   the copy, on a page fault; bytes before the fault may be done. */
int tcg_read(struct tcg_cpu *cpu, uint64_t linear, void *to, size_t size, struct tcg_fault *fault);
int tcg_write(struct tcg_cpu *cpu, uint64_t linear, const void *from, size_t size,
              struct tcg_fault *fault);

#endif
