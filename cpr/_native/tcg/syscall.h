/* SYSCALL and SYSENTER, which unicorn leaves to its user (SYSRET and SYSEXIT it executes). */
#ifndef CPR_TCG_SYSCALL_H
#define CPR_TCG_SYSCALL_H

#include "cpu.h"

/* RIP is after the instruction, which is two bytes long.  0, or -1: a triple fault. */
int tcg_syscall(struct tcg_cpu *cpu);
int tcg_sysenter(struct tcg_cpu *cpu);

#endif
