/* Sections and tables named here are those of the Intel SDM, volume 3. */
#include "interrupt.h"

#include <string.h>

#include "memory.h"

enum { ES, CS, SS, DS, FS, GS };
enum { RSP = 4 };

enum {
    EXCEPTION_DE = 0,
    EXCEPTION_DF = 8,
    EXCEPTION_TS = 10,
    EXCEPTION_NP = 11,
    EXCEPTION_SS = 12,
    EXCEPTION_GP = 13,
    EXCEPTION_PF = 14
};

/* The exceptions that push an error code (table 6-1). */
static const uint32_t with_error_code =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;

enum {
    RFLAGS_TF = 1 << 8,
    RFLAGS_IF = 1 << 9,
    RFLAGS_NT = 1 << 14,
    RFLAGS_RF = 1 << 16,
    RFLAGS_VM = 1 << 17,
    RFLAGS_AC = 1 << 18
};
enum { CR0_PE = 1 << 0, EFER_LMA = 1 << 10 };

/* Descriptor flags, in place in the second word (3.4.5). */
enum {
    SEGMENT_FLAGS = 0x00f0ff00,
    SEGMENT_WRITABLE = 1 << 9,
    SEGMENT_CONFORMING = 1 << 10,
    SEGMENT_CODE = 1 << 11,
    SEGMENT_S = 1 << 12,
    SEGMENT_P = 1 << 15,
    SEGMENT_L = 1 << 21,
    SEGMENT_DB = 1 << 22,
    SEGMENT_G = 1 << 23
};

enum { GATE_INTERRUPT_16 = 6, GATE_TRAP_16 = 7, GATE_INTERRUPT_32 = 14, GATE_TRAP_32 = 15 };
enum { TSS_16 = 1 };
enum { OPCODE_INT3 = 0xcc, OPCODE_INTO = 0xce };

struct event {
    enum tcg_event_kind kind;
    uint32_t vector;
    uint32_t error_code;
};

/* A gate of the IDT. */
struct gate {
    uint16_t selector;
    uint64_t offset;
    int type;
    int stack_table;
};

/* Where a handler's frame is pushed. */
struct stack {
    struct cpr_segment segment;
    uint64_t base;
    uint64_t mask;
    uint64_t pointer;
    size_t width;
};

static int fail(struct tcg_fault *fault, uint32_t vector, uint32_t error_code)
{
    fault->vector = vector;
    fault->error_code = error_code;
    return -1;
}

static uint32_t privilege(uint32_t segment_flags)
{
    return segment_flags >> 13 & 3;
}

static int is_long_mode(const struct tcg_registers *r)
{
    return (r->efer & EFER_LMA) != 0;
}

static int has_error_code(const struct event *event)
{
    return event->kind == TCG_EXCEPTION && event->vector < 32 &&
           (with_error_code >> event->vector & 1);
}

static int push(struct tcg_cpu *cpu, struct stack *stack, uint64_t value, struct tcg_fault *fault)
{
    uint64_t pointer = (stack->pointer - stack->width) & stack->mask;

    if (tcg_write(cpu, stack->base + pointer, &value, stack->width, fault) < 0) {
        return -1;
    }
    stack->pointer = (stack->pointer & ~stack->mask) | pointer;
    return 0;
}

/* The stack in use, for a frame of `width`-byte values. */
static void use_current_stack(const struct tcg_registers *r, size_t width, struct stack *stack)
{
    stack->segment = r->segs[SS];
    stack->base = r->segs[SS].base;
    stack->mask = r->segs[SS].flags & SEGMENT_DB ? 0xffffffff : 0xffff;
    stack->pointer = r->regs[RSP];
    stack->width = width;
    if (is_long_mode(r)) {
        stack->base = 0;
        stack->mask = ~0ull;
    }
}

/* 20.1.4: the frame is FLAGS, CS, IP, and the vector a far pointer. */
static int deliver_real(struct tcg_cpu *cpu, const struct event *event, struct tcg_fault *fault)
{
    struct tcg_registers *r = cpu->registers;
    struct stack stack;
    uint16_t entry[2];

    if (event->vector * 4 + 3 > r->idt.limit) {
        return fail(fault, EXCEPTION_GP, event->vector * 8 + 2);
    }
    if (tcg_read(cpu, r->idt.base + event->vector * 4, entry, sizeof(entry), fault) < 0) {
        return -1;
    }
    use_current_stack(r, 2, &stack);
    if (push(cpu, &stack, cpu->rflags, fault) < 0 ||
        push(cpu, &stack, r->segs[CS].selector, fault) < 0 ||
        push(cpu, &stack, r->rip, fault) < 0) {
        return -1;
    }
    r->regs[RSP] = stack.pointer;
    r->rip = entry[0];
    r->segs[CS].selector = entry[1];
    r->segs[CS].base = (uint64_t)entry[1] << 4;
    cpu->rflags &= ~(uint64_t)(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF);
    return 0;
}

/* Reads the descriptor that `selector` names.  A fault of it has vector `vector`. */
static int read_descriptor(struct tcg_cpu *cpu, uint16_t selector, uint32_t vector,
                           struct cpr_segment *segment, struct tcg_fault *fault)
{
    const struct tcg_registers *r = cpu->registers;
    const struct cpr_segment *table = selector & 4 ? &r->ldt : &r->gdt;
    uint32_t offset = selector & ~7u, words[2];

    if (!(selector & ~3)) {
        return fail(fault, vector, 0);
    }
    if (offset + 7 > table->limit) {
        return fail(fault, vector, selector & ~3u);
    }
    if (tcg_read(cpu, table->base + offset, words, sizeof(words), fault) < 0) {
        return -1;
    }
    segment->selector = selector;
    segment->base = words[0] >> 16 | (words[1] & 0xff) << 16 | (words[1] & 0xff000000);
    segment->limit = (words[0] & 0xffff) | (words[1] & 0xf0000);
    if (words[1] & SEGMENT_G) {
        segment->limit = segment->limit << 12 | 0xfff;
    }
    segment->flags = words[1] & SEGMENT_FLAGS;
    return 0;
}

/* 6.11 and 6.14.1: gates are 8 bytes, in long mode 16. */
static int read_gate(struct tcg_cpu *cpu, const struct event *event, struct gate *gate,
                     struct tcg_fault *fault)
{
    const struct tcg_registers *r = cpu->registers;
    const uint32_t size = is_long_mode(r) ? 16 : 8;
    const uint32_t error_code = event->vector * 8 + 2;
    uint32_t words[4] = {0, 0, 0, 0};

    if (event->vector * size + size - 1 > r->idt.limit) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    if (tcg_read(cpu, r->idt.base + event->vector * size, words, size, fault) < 0) {
        return -1;
    }
    gate->selector = (uint16_t)(words[0] >> 16);
    gate->offset = (uint64_t)words[2] << 32 | (words[1] & 0xffff0000) | (words[0] & 0xffff);
    gate->type = words[1] >> 8 & 0x1f;
    gate->stack_table = is_long_mode(r) ? words[1] & 7 : 0;
    if (gate->type == GATE_INTERRUPT_16 || gate->type == GATE_TRAP_16) {
        gate->offset &= 0xffff;
    }
    if ((gate->type != GATE_INTERRUPT_32 && gate->type != GATE_TRAP_32 &&
         gate->type != GATE_INTERRUPT_16 && gate->type != GATE_TRAP_16) ||
        (is_long_mode(r) && gate->type < GATE_INTERRUPT_32)) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    if (event->kind == TCG_SOFTWARE && privilege(words[1]) < privilege(r->segs[SS].flags)) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    if (!(words[1] & SEGMENT_P)) {
        return fail(fault, EXCEPTION_NP, error_code);
    }
    return 0;
}

/* Reads and checks the handler's code segment. */
static int read_code_segment(struct tcg_cpu *cpu, uint16_t selector, struct cpr_segment *code,
                             struct tcg_fault *fault)
{
    const struct tcg_registers *r = cpu->registers;
    const uint32_t error_code = selector & ~3u;

    if (read_descriptor(cpu, selector, EXCEPTION_GP, code, fault) < 0) {
        return -1;
    }
    if ((code->flags & (SEGMENT_S | SEGMENT_CODE)) != (SEGMENT_S | SEGMENT_CODE) ||
        privilege(code->flags) > privilege(r->segs[SS].flags)) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    if (is_long_mode(r) && (code->flags & (SEGMENT_L | SEGMENT_DB)) != SEGMENT_L) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    if (!(code->flags & SEGMENT_P)) {
        return fail(fault, EXCEPTION_NP, error_code);
    }
    if ((cpu->rflags & RFLAGS_VM) &&
        ((code->flags & SEGMENT_CONFORMING) || privilege(code->flags) != 0)) {
        return fail(fault, EXCEPTION_GP, error_code);
    }
    return 0;
}

/* 7.2: the stack of privilege level `level` out of a 16- or 32-bit TSS. */
static int use_task_stack(struct tcg_cpu *cpu, uint32_t level, struct stack *stack,
                          struct tcg_fault *fault)
{
    const struct cpr_segment *tr = &cpu->registers->tr;
    const int is_16_bit = (tr->flags >> 8 & 0xd) == TSS_16;
    const size_t width = is_16_bit ? 2 : 4;
    const uint32_t offset = is_16_bit ? 2 + 4 * level : 4 + 8 * level;
    uint32_t pointer = 0, selector = 0;

    if (offset + 2 * width - 1 > tr->limit) {
        return fail(fault, EXCEPTION_TS, tr->selector & ~3u);
    }
    if (tcg_read(cpu, tr->base + offset, &pointer, width, fault) < 0 ||
        tcg_read(cpu, tr->base + offset + width, &selector, 2, fault) < 0 ||
        read_descriptor(cpu, (uint16_t)selector, EXCEPTION_TS, &stack->segment, fault) < 0) {
        return -1;
    }
    if ((selector & 3) != level || privilege(stack->segment.flags) != level ||
        (stack->segment.flags & (SEGMENT_S | SEGMENT_CODE | SEGMENT_WRITABLE)) !=
            (SEGMENT_S | SEGMENT_WRITABLE)) {
        return fail(fault, EXCEPTION_TS, selector & ~3u);
    }
    if (!(stack->segment.flags & SEGMENT_P)) {
        return fail(fault, EXCEPTION_SS, selector & ~3u);
    }
    stack->base = stack->segment.base;
    stack->mask = stack->segment.flags & SEGMENT_DB ? 0xffffffff : 0xffff;
    stack->pointer = pointer;
    return 0;
}

/* 7.7: the stack of privilege level `level`, or of interrupt stack table entry `table`, out of a
   64-bit TSS. */
static int use_long_mode_stack(struct tcg_cpu *cpu, uint32_t level, int table, int changes_level,
                               struct stack *stack, struct tcg_fault *fault)
{
    const struct tcg_registers *r = cpu->registers;
    const uint32_t offset = table ? 0x1c + 8 * (uint32_t)table : 4 + 8 * level;

    if (changes_level || table) {
        if (offset + 7 > r->tr.limit) {
            return fail(fault, EXCEPTION_TS, r->tr.selector & ~3u);
        }
        if (tcg_read(cpu, r->tr.base + offset, &stack->pointer, 8, fault) < 0) {
            return -1;
        }
    }
    if (changes_level) {
        memset(&stack->segment, 0, sizeof(stack->segment));
        stack->segment.selector = level;
        stack->segment.flags = level << 13;
    }
    stack->pointer &= ~15ull;
    return 0;
}

static int push_frame(struct tcg_cpu *cpu, const struct event *event, struct stack *stack,
                      int with_old_stack, struct tcg_fault *fault)
{
    const struct tcg_registers *r = cpu->registers;
    uint64_t frame[10];
    int count = 0;

    if (cpu->rflags & RFLAGS_VM) {
        frame[count++] = r->segs[GS].selector;
        frame[count++] = r->segs[FS].selector;
        frame[count++] = r->segs[DS].selector;
        frame[count++] = r->segs[ES].selector;
    }
    if (with_old_stack) {
        frame[count++] = r->segs[SS].selector;
        frame[count++] = r->regs[RSP];
    }
    frame[count++] = cpu->rflags;
    frame[count++] = r->segs[CS].selector;
    frame[count++] = r->rip;
    if (has_error_code(event)) {
        frame[count++] = event->error_code;
    }
    for (int i = 0; i < count; i++) {
        if (push(cpu, stack, frame[i], fault) < 0) {
            return -1;
        }
    }
    return 0;
}

static void clear_segment(struct cpr_segment *segment)
{
    memset(segment, 0, sizeof(*segment));
}

/* 6.12.1 and 6.14: protected and long mode.  Task gates lead to #GP: there is no task switch. */
static int deliver_protected(struct tcg_cpu *cpu, const struct event *event,
                             struct tcg_fault *fault)
{
    struct tcg_registers *r = cpu->registers;
    const int long_mode = is_long_mode(r);
    struct cpr_segment code;
    struct gate gate;
    struct stack stack;
    uint32_t level;
    int changes_level;

    if (read_gate(cpu, event, &gate, fault) < 0 ||
        read_code_segment(cpu, gate.selector, &code, fault) < 0) {
        return -1;
    }
    level = privilege(code.flags & SEGMENT_CONFORMING ? r->segs[SS].flags : code.flags);
    changes_level = level != privilege(r->segs[SS].flags);
    use_current_stack(r, long_mode ? 8 : gate.type >= GATE_INTERRUPT_32 ? 4 : 2, &stack);
    if (long_mode) {
        if (use_long_mode_stack(cpu, level, gate.stack_table, changes_level, &stack, fault) < 0) {
            return -1;
        }
    } else if (changes_level && use_task_stack(cpu, level, &stack, fault) < 0) {
        return -1;
    }
    if (push_frame(cpu, event, &stack, long_mode || changes_level, fault) < 0) {
        return -1;
    }

    if (cpu->rflags & RFLAGS_VM) {
        for (int i = DS; i <= GS; i++) {
            clear_segment(&r->segs[i]);
        }
        clear_segment(&r->segs[ES]);
    }
    r->regs[RSP] = stack.pointer;
    r->segs[SS] = stack.segment;
    code.selector = (gate.selector & ~3u) | level;
    r->segs[CS] = code;
    r->rip = gate.offset;
    cpu->rflags &= ~(uint64_t)(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM);
    if (gate.type == GATE_INTERRUPT_16 || gate.type == GATE_INTERRUPT_32) {
        cpu->rflags &= ~(uint64_t)RFLAGS_IF;
    }
    return 0;
}

static int is_contributory(uint32_t vector)
{
    return vector == EXCEPTION_DE || (vector >= EXCEPTION_TS && vector <= EXCEPTION_GP);
}

/* Table 6-5: what becomes of `fault`, met while `event` was being delivered.  -1: shutdown. */
static int next_event(struct event *event, const struct tcg_fault *fault)
{
    const int was_exception = event->kind == TCG_EXCEPTION;
    const int was_fault = was_exception && (is_contributory(event->vector) ||
                                            event->vector == EXCEPTION_PF);

    if (was_exception && event->vector == EXCEPTION_DF) {
        return -1;
    }
    if (was_fault && (is_contributory(fault->vector) ||
                      (event->vector == EXCEPTION_PF && fault->vector == EXCEPTION_PF))) {
        event->vector = EXCEPTION_DF;
        event->error_code = 0;
    } else {
        event->vector = fault->vector;
        event->error_code = fault->error_code;
    }
    event->kind = TCG_EXCEPTION;
    return 0;
}

/* A fault of INT n, INT3 or INTO returns to the instruction itself; RIP is after it. */
static void step_back(struct tcg_cpu *cpu, uint32_t vector)
{
    struct tcg_registers *r = cpu->registers;
    struct tcg_fault ignored;
    uint8_t opcode = 0;

    tcg_read(cpu, r->segs[CS].base + r->rip - 1, &opcode, 1, &ignored);
    r->rip -= 1;
    if (!(vector == 3 && opcode == OPCODE_INT3) && !(vector == 4 && opcode == OPCODE_INTO)) {
        r->rip -= 1;
    }
}

int tcg_deliver(struct tcg_cpu *cpu, enum tcg_event_kind kind, uint32_t vector,
                uint32_t error_code)
{
    struct event event = {kind, vector, error_code};
    struct tcg_fault fault;
    int failed;

    tcg_cpu_load(cpu);
    do {
        failed = cpu->registers->cr[0] & CR0_PE ? deliver_protected(cpu, &event, &fault)
                                                : deliver_real(cpu, &event, &fault);
        if (failed && event.kind == TCG_SOFTWARE) {
            step_back(cpu, vector);
        }
        if (failed && next_event(&event, &fault) < 0) {
            return -1;
        }
    } while (failed);
    cpu->exception->being_delivered = TCG_NO_VECTOR; /* the engine leaves that to its hook */
    tcg_cpu_derive(cpu);
    tcg_cpu_store(cpu);
    return 0;
}
