/* The x87, SSE and AVX registers of an engine. */
#ifndef CPR_TCG_FPU_H
#define CPR_TCG_FPU_H

#include "cpu.h"

/* Between the engine and `fxsave` and `ymm_high` of a state.  They go by the code segment in the
   copy: FXSAVE images of 64-bit code have no FCS and FDS. */
void tcg_fpu_get(struct tcg_cpu *cpu, struct cpr_tcg_state *state);
void tcg_fpu_set(struct tcg_cpu *cpu, const struct cpr_tcg_state *state);

#endif
