#include "cpu.h"

#include <stddef.h>
#include <string.h>

#include "fpu.h"
#include "unicorn_api.h"

enum { ES, CS, SS, DS, FS, GS };

/* Descriptor flags, and the register bits from which hflags follow (Intel SDM vol. 3). */
enum { SEGMENT_FLAGS = 0x00f0ff00, SEGMENT_L = 1 << 21, SEGMENT_DB = 1 << 22 };
enum { SEGMENT_DPL_SHIFT = 13 };
enum { CR0_PE = 1 << 0, CR0_MP_EM_TS = 7 << 1, CR4_OSFXSR = 1 << 9, CR4_SMAP = 1 << 21 };
enum { EFER_LMA = 1 << 10, RFLAGS_VM = 1 << 17, A20 = 1 << 20 };

/* The bits of hflags that follow from registers; the others are left as they are. */
enum {
    HFLAG_CPL = 3 << 0,
    HFLAG_INHIBIT_IRQ = 1 << 3,
    HFLAG_CS32 = 1 << 4,
    HFLAG_SS32 = 1 << 5,
    HFLAG_ADDSEG = 1 << 6,
    HFLAG_PE = 1 << 7,
    HFLAG_MP_EM_TS = 7 << 9,
    HFLAG_LMA = 1 << 14,
    HFLAG_CS64 = 1 << 15,
    HFLAG_OSFXSR = 1 << 22,
    HFLAG_SMAP = 1 << 23,
    HFLAG_DERIVED = HFLAG_CPL | HFLAG_CS32 | HFLAG_SS32 | HFLAG_ADDSEG | HFLAG_PE |
                    HFLAG_MP_EM_TS | HFLAG_LMA | HFLAG_CS64 | HFLAG_OSFXSR | HFLAG_SMAP
};
enum { HFLAG_MP_SHIFT = 9, CR0_MP_SHIFT = 1 };

/* The default, 1 GiB, takes 6 ms to set up. */
enum { TRANSLATION_BUFFER = 32 << 20 };

enum { MSR_EFER = 0xc0000080u };

static const char unknown_layout[] =
    "its CPU structure is laid out otherwise than in the 2.1 releases known to cpr";

/* Finds the 8 bytes of `value` in the context, on an 8-byte boundary. */
static uint8_t *find_in_context(struct tcg_cpu *cpu, uint64_t value)
{
    uint8_t *context = cpu->context;
    size_t size = unicorn.context_size(cpu->uc);

    for (size_t i = 0; i + sizeof(value) <= size; i += sizeof(value)) {
        if (memcmp(context + i, &value, sizeof(value)) == 0) {
            return context + i;
        }
    }
    return NULL;
}

/* Descriptor caches, EFER and error codes have no place in the library's interface, but a saved
   context has them.  So registers are given values that betray where the structure lies in it. */
static const char *locate_registers(struct tcg_cpu *cpu)
{
    const uint64_t r15 = 0x8f3a61d2c5b70e94, rip = 0x00007b1e5c93d460, cr2 = 0x51c8e3f60a97b2d4;
    const uint64_t dr0 = 0x2d96a07fb4e8135c, dr1 = 0x6e05f8b2913dc47a;
    const struct uc_x86_mmr gdt = {0, 0x3c71e9504ad28fb6, 0x1357, 0};
    const struct uc_x86_mmr idt = {0, 0x74b20d8e61f5a93c, 0x2468, 0};
    struct tcg_registers *registers;
    uint8_t *place;

    unicorn.reg_write(cpu->uc, UC_X86_REG_R15, &r15);
    unicorn.reg_write(cpu->uc, UC_X86_REG_RIP, &rip);
    unicorn.reg_write(cpu->uc, UC_X86_REG_CR2, &cr2);
    unicorn.reg_write(cpu->uc, UC_X86_REG_DR0, &dr0);
    unicorn.reg_write(cpu->uc, UC_X86_REG_DR1, &dr1);
    unicorn.reg_write(cpu->uc, UC_X86_REG_GDTR, &gdt);
    unicorn.reg_write(cpu->uc, UC_X86_REG_IDTR, &idt);
    unicorn.context_save(cpu->uc, cpu->context);

    place = find_in_context(cpu, r15);
    if (!place) {
        return unknown_layout;
    }
    registers = (struct tcg_registers *)(place - offsetof(struct tcg_registers, regs[15]));
    if (registers->rip != rip || registers->gdt.base != gdt.base ||
        registers->gdt.limit != gdt.limit || registers->idt.base != idt.base ||
        registers->idt.limit != idt.limit || registers->cr[2] != cr2 ||
        registers->efer != tcg_cpu_read_msr(cpu, MSR_EFER)) {
        return unknown_layout;
    }
    cpu->registers = registers;

    place = find_in_context(cpu, dr0);
    if (!place) {
        return unknown_layout;
    }
    cpu->exception = (struct tcg_exception *)(place - offsetof(struct tcg_exception, dr));
    if (cpu->exception->dr[1] != dr1 || cpu->exception->being_delivered != TCG_NO_VECTOR) {
        return unknown_layout;
    }
    return NULL;
}

const char *tcg_cpu_open(struct tcg_cpu *cpu, const struct tcg_ram_map *ram)
{
    const char *problem;
    int error;

    memset(cpu, 0, sizeof(*cpu));
    cpu->ram = ram;
    error = unicorn.open(UC_ARCH_X86, UC_MODE_64, &cpu->uc);
    if (error) {
        return unicorn.strerror(error);
    }
    error = unicorn.ctl(cpu->uc, UC_CTL_TCG_BUFFER_SIZE, (uint32_t)TRANSLATION_BUFFER);
    if (!error) {
        error = unicorn.ctl(cpu->uc, UC_CTL_EXITS_ENABLE, 1);
    }
    if (!error) {
        error = unicorn.context_alloc(cpu->uc, &cpu->context);
    }
    problem = error ? unicorn.strerror(error) : locate_registers(cpu);
    if (problem) {
        tcg_cpu_close(cpu);
    }
    return problem;
}

void tcg_cpu_close(struct tcg_cpu *cpu)
{
    if (cpu->context) {
        unicorn.context_free(cpu->context);
    }
    unicorn.close(cpu->uc);
    memset(cpu, 0, sizeof(*cpu));
}

void tcg_cpu_load(struct tcg_cpu *cpu)
{
    unicorn.context_save(cpu->uc, cpu->context);
    unicorn.reg_read(cpu->uc, UC_X86_REG_RFLAGS, &cpu->rflags);
}

void tcg_cpu_store(struct tcg_cpu *cpu)
{
    unicorn.context_restore(cpu->uc, cpu->context);
    unicorn.reg_write(cpu->uc, UC_X86_REG_RFLAGS, &cpu->rflags);
}

void tcg_cpu_forget_code(struct tcg_cpu *cpu)
{
    unicorn.ctl(cpu->uc, UC_CTL_TB_FLUSH);
}

void tcg_cpu_flush(struct tcg_cpu *cpu)
{
    unicorn.ctl(cpu->uc, UC_CTL_TLB_FLUSH);
    tcg_cpu_forget_code(cpu);
}

static uint32_t segment_hflags(const struct tcg_cpu *cpu)
{
    const struct tcg_registers *r = cpu->registers;
    uint32_t hflags = 0;

    if ((r->efer & EFER_LMA) && (r->segs[CS].flags & SEGMENT_L)) {
        return HFLAG_CS32 | HFLAG_SS32 | HFLAG_CS64;
    }
    if (r->segs[CS].flags & SEGMENT_DB) {
        hflags |= HFLAG_CS32;
    }
    if (r->segs[SS].flags & SEGMENT_DB) {
        hflags |= HFLAG_SS32;
    }
    /* Only flat 32-bit protected mode can leave out the segment bases. */
    if (!(r->cr[0] & CR0_PE) || (cpu->rflags & RFLAGS_VM) || !(hflags & HFLAG_CS32) ||
        r->segs[DS].base || r->segs[ES].base || r->segs[SS].base) {
        hflags |= HFLAG_ADDSEG;
    }
    return hflags;
}

void tcg_cpu_derive(struct tcg_cpu *cpu)
{
    struct tcg_registers *r = cpu->registers;
    uint32_t hflags = segment_hflags(cpu);

    hflags |= r->segs[SS].flags >> SEGMENT_DPL_SHIFT & HFLAG_CPL;
    hflags |= r->cr[0] & CR0_PE ? HFLAG_PE : 0;
    hflags |= (r->cr[0] & CR0_MP_EM_TS) << (HFLAG_MP_SHIFT - CR0_MP_SHIFT);
    hflags |= r->cr[4] & CR4_OSFXSR ? HFLAG_OSFXSR : 0;
    hflags |= r->cr[4] & CR4_SMAP ? HFLAG_SMAP : 0;
    hflags |= r->efer & EFER_LMA ? HFLAG_LMA : 0;
    r->hflags = (r->hflags & ~(uint32_t)HFLAG_DERIVED) | hflags;
}

static void copy_segment(struct cpr_segment *to, const struct cpr_segment *from)
{
    to->selector = from->selector;
    to->base = from->base;
    to->limit = from->limit;
    to->flags = from->flags & SEGMENT_FLAGS;
}

void tcg_cpu_get_state(struct tcg_cpu *cpu, struct cpr_tcg_state *state)
{
    const struct tcg_registers *r = cpu->registers;

    tcg_cpu_load(cpu);
    memset(state, 0, sizeof(*state));
    memcpy(state->regs, r->regs, sizeof(state->regs));
    state->rip = r->rip;
    state->rflags = cpu->rflags;
    for (int i = ES; i <= GS; i++) {
        copy_segment(&state->segs[i], &r->segs[i]);
    }
    copy_segment(&state->ldt, &r->ldt);
    copy_segment(&state->tr, &r->tr);
    copy_segment(&state->gdt, &r->gdt);
    copy_segment(&state->idt, &r->idt);
    memcpy(state->cr, r->cr, sizeof(state->cr));
    memcpy(state->dr, cpu->exception->dr, sizeof(state->dr));
    state->efer = r->efer;
    state->shadow = (r->hflags & HFLAG_INHIBIT_IRQ) != 0;
    state->a20 = (r->a20_mask & A20) != 0;
    tcg_fpu_get(cpu, state);
}

void tcg_cpu_set_state(struct tcg_cpu *cpu, const struct cpr_tcg_state *state)
{
    struct tcg_registers *r = cpu->registers;

    tcg_cpu_load(cpu);
    memcpy(r->regs, state->regs, sizeof(state->regs));
    r->rip = state->rip;
    cpu->rflags = state->rflags;
    memcpy(r->segs, state->segs, sizeof(state->segs));
    r->ldt = state->ldt;
    r->tr = state->tr;
    r->gdt = state->gdt;
    r->idt = state->idt;
    memcpy(r->cr, state->cr, sizeof(state->cr));
    memcpy(cpu->exception->dr, state->dr, sizeof(state->dr));
    cpu->exception->being_delivered = TCG_NO_VECTOR;
    r->efer = state->efer;
    r->a20_mask = state->a20 ? ~0 : ~A20;
    r->hflags &= ~(uint32_t)HFLAG_INHIBIT_IRQ;
    r->hflags |= state->shadow ? HFLAG_INHIBIT_IRQ : 0;
    tcg_cpu_derive(cpu);
    tcg_cpu_store(cpu);
    tcg_fpu_set(cpu, state);
    tcg_cpu_flush(cpu);
}

uint64_t tcg_cpu_read_msr(struct tcg_cpu *cpu, uint32_t index)
{
    struct uc_x86_msr msr = {index, 0};

    unicorn.reg_read(cpu->uc, UC_X86_REG_MSR, &msr);
    return msr.value;
}

void tcg_cpu_write_msr(struct tcg_cpu *cpu, uint32_t index, uint64_t value)
{
    const struct uc_x86_msr msr = {index, value};

    unicorn.reg_write(cpu->uc, UC_X86_REG_MSR, &msr);
}
