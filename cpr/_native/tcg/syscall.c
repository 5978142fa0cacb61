#include "syscall.h"

#include <stdint.h>

#include "interrupt.h"

enum { CS = 1, SS = 2 };
enum { RCX = 1, RSP = 4, R11 = 11 };
enum { RFLAGS_IF = 1 << 9, RFLAGS_RF = 1 << 16, RFLAGS_VM = 1 << 17 };
enum { EFER_SCE = 1 << 0, EFER_LMA = 1 << 10 };

/* Descriptor flags, in place in the second word (Intel SDM vol. 3, 3.4.5). */
enum { SEGMENT_S = 1 << 12, SEGMENT_P = 1 << 15, SEGMENT_L = 1 << 21 };
enum { SEGMENT_DB = 1 << 22, SEGMENT_G = 1 << 23 };
enum { FLAT_DATA = SEGMENT_S | SEGMENT_P | SEGMENT_DB | SEGMENT_G | 3 << 8 };
enum { FLAT_CODE = SEGMENT_S | SEGMENT_P | SEGMENT_G | 0xb << 8 };

enum { MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP = 0x175, MSR_SYSENTER_EIP = 0x176 };
static const uint32_t msr_star = 0xc0000081, msr_lstar = 0xc0000082, msr_cstar = 0xc0000083;
static const uint32_t msr_fmask = 0xc0000084;

static void set_flat_segments(struct tcg_registers *r, uint32_t selector, int is_64_bit)
{
    const struct cpr_segment code = {
        selector & 0xfffc, 0, 0xffffffff, FLAT_CODE | (is_64_bit ? SEGMENT_L : SEGMENT_DB),
    };
    const struct cpr_segment data = {(selector & 0xfffc) + 8, 0, 0xffffffff, FLAT_DATA};

    r->segs[CS] = code;
    r->segs[SS] = data;
}

/* Delivers an exception of the two-byte instruction that RIP has already passed. */
static int refuse_instruction(struct tcg_cpu *cpu, uint32_t vector)
{
    cpu->registers->rip -= 2;
    tcg_cpu_store(cpu);
    return tcg_deliver(cpu, TCG_EXCEPTION, vector, 0);
}

/* SDM vol. 2, SYSCALL. */
int tcg_syscall(struct tcg_cpu *cpu)
{
    struct tcg_registers *r = cpu->registers;
    const uint64_t star = tcg_cpu_read_msr(cpu, msr_star);

    tcg_cpu_load(cpu);
    if (!(r->efer & EFER_SCE)) {
        return refuse_instruction(cpu, TCG_EXCEPTION_UD);
    }
    if (r->efer & EFER_LMA) {
        const int from_64_bit = (r->segs[CS].flags & SEGMENT_L) != 0;
        r->regs[RCX] = r->rip;
        r->regs[R11] = cpu->rflags & ~(uint64_t)RFLAGS_RF;
        r->rip = tcg_cpu_read_msr(cpu, from_64_bit ? msr_lstar : msr_cstar);
        cpu->rflags &= ~(tcg_cpu_read_msr(cpu, msr_fmask) | RFLAGS_RF);
        set_flat_segments(r, (uint32_t)(star >> 32), 1);
    } else {
        r->regs[RCX] = (uint32_t)r->rip;
        r->rip = (uint32_t)star;
        cpu->rflags &= ~(uint64_t)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
        set_flat_segments(r, (uint32_t)(star >> 32), 0);
    }
    tcg_cpu_derive(cpu);
    tcg_cpu_store(cpu);
    return 0;
}

/* SDM vol. 2, SYSENTER. */
int tcg_sysenter(struct tcg_cpu *cpu)
{
    struct tcg_registers *r = cpu->registers;
    const uint32_t selector = (uint32_t)tcg_cpu_read_msr(cpu, MSR_SYSENTER_CS);

    tcg_cpu_load(cpu);
    if (!(selector & ~3u)) {
        return refuse_instruction(cpu, TCG_EXCEPTION_GP);
    }
    r->regs[RSP] = tcg_cpu_read_msr(cpu, MSR_SYSENTER_ESP);
    r->rip = tcg_cpu_read_msr(cpu, MSR_SYSENTER_EIP);
    cpu->rflags &= ~(uint64_t)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
    set_flat_segments(r, selector, (r->efer & EFER_LMA) != 0);
    tcg_cpu_derive(cpu);
    tcg_cpu_store(cpu);
    return 0;
}
