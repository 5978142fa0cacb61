/* Interrupts and exceptions, whose delivery unicorn leaves to its user. */
#ifndef CPR_TCG_INTERRUPT_H
#define CPR_TCG_INTERRUPT_H

#include <stdint.h>

#include "cpu.h"

enum tcg_event_kind { TCG_EXTERNAL, TCG_SOFTWARE, TCG_EXCEPTION };

enum { TCG_EXCEPTION_UD = 6, TCG_EXCEPTION_GP = 13 };

/*
 * Enters the guest's handler of `vector`, by the interrupt vector table or the IDT; RIP in the
 * engine is where the handler is to return to.  A fault on the way is delivered in its place, or a
 * double fault.  `error_code` counts for exceptions that have one.  Returns 0, or -1: a triple
 * fault, with the registers as they were.
 */
int tcg_deliver(struct tcg_cpu *cpu, enum tcg_event_kind kind, uint32_t vector,
                uint32_t error_code);

#endif
