#include "engine.h"

#include <string.h>
#include <time.h>

#include "interrupt.h"
#include "memory.h"
#include "syscall.h"
#include "unicorn_api.h"
#include "vm.h"

enum { RFLAGS_IF = 1 << 9, HFLAG_INHIBIT_IRQ = 1 << 3 };
enum { MSR_TSC_AUX = 0xc0000103u };
enum { CS = 1, VECTOR_BREAKPOINT = 3, OPCODE_INT3 = 0xcc, OPCODE_INT = 0xcd };
enum { STOP = CPR_TCG_KICK | CPR_TCG_INIT | CPR_TCG_SIPI | TCG_YIELD | TCG_STALE | TCG_MANY };

uint64_t tcg_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Requests. */

uint32_t tcg_requests(const struct tcg_engine *engine)
{
    return __atomic_load_n(&engine->requests, __ATOMIC_ACQUIRE);
}

void tcg_add_requests(struct tcg_engine *engine, uint32_t requests)
{
    __atomic_fetch_or(&engine->requests, requests, __ATOMIC_RELEASE);
}

uint32_t tcg_take_requests(struct tcg_engine *engine, uint32_t requests)
{
    return __atomic_fetch_and(&engine->requests, ~requests, __ATOMIC_ACQ_REL) & requests;
}

/* Memory. */

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned int size, void *user)
{
    const struct tcg_mapping *mapping = user;

    (void)uc;
    return cpr_tcg_mmio_read(mapping->handle, mapping->address + offset, size);
}

static void on_mmio_write(void *uc, uint64_t offset, unsigned int size, uint64_t value, void *user)
{
    const struct tcg_mapping *mapping = user;

    (void)uc;
    if (!tcg_notify_write(mapping->notifies, mapping->address + offset, size)) {
        cpr_tcg_mmio_write(mapping->handle, mapping->address + offset, size, value);
    }
}

/* Maps RAM, or the bus where `ram` is NULL. */
static int add_mapping(struct tcg_engine *engine, uint64_t address, uint64_t size,
                       const struct tcg_ram *ram)
{
    struct tcg_mapping *mapping = &engine->mappings[engine->mapping_count];
    int error;

    if (!size) {
        return 0;
    }
    mapping->handle = engine->handle;
    mapping->notifies = engine->notifies;
    mapping->address = address;
    mapping->size = size;
    if (ram) {
        const uint32_t protection = ram->readonly ? UC_PROT_READ | UC_PROT_EXEC : UC_PROT_ALL;
        error = unicorn.mem_map_ptr(engine->cpu.uc, address, size, protection, ram->host);
    } else {
        error = unicorn.mmio_map(engine->cpu.uc, address, size, on_mmio_read, mapping,
                                 on_mmio_write, mapping);
    }
    engine->mapping_count += error == 0;
    return error;
}

/* Gives the engine the VM's RAM, and the bus wherever there is none. */
static int map_memory(struct tcg_engine *engine)
{
    const struct tcg_ram_map *map = engine->cpu.ram;
    uint64_t end = 0;
    int error = 0;

    if (engine->mapping_count && engine->ram_version == map->version) {
        return 0;
    }
    while (engine->mapping_count) {
        const struct tcg_mapping *last = &engine->mappings[--engine->mapping_count];
        unicorn.mem_unmap(engine->cpu.uc, last->address, last->size);
    }
    for (uint32_t i = 0; i < map->count && !error; i++) {
        const struct tcg_ram *ram = &map->slots[i];
        error = add_mapping(engine, end, ram->address - end, NULL);
        if (!error) {
            error = add_mapping(engine, ram->address, ram->size, ram);
        }
        end = ram->address + ram->size;
    }
    if (!error) {
        error = add_mapping(engine, end, tcg_physical_end - end, NULL);
    }
    if (!error) {
        engine->ram_version = map->version;
    }
    tcg_cpu_flush(&engine->cpu);
    tcg_code_pages_map(&engine->code_pages, engine->cpu.uc);
    return error;
}

/* Writes to ROM.  The engine carries out what the hook lets pass, also where memory is mapped
   read-only; so the hook keeps the bytes, and the next block puts them back. */

static void undo_rom_writes(struct tcg_engine *engine)
{
    while (engine->rom_write_count) {
        const struct tcg_rom_write *write = &engine->rom_writes[--engine->rom_write_count];
        memcpy(write->host, write->bytes, write->size);
    }
    tcg_take_requests(engine, TCG_UNDO_ROM);
}

static int keep_rom(struct tcg_engine *engine, uint64_t address, uint64_t size)
{
    struct tcg_rom_write *write = &engine->rom_writes[engine->rom_write_count];
    uint64_t available;
    uint8_t *host = tcg_ram_find(engine->cpu.ram, address, 0, &available);

    if (!host || size > sizeof(write->bytes) || engine->rom_write_count == TCG_ROM_WRITES_MAX) {
        return 0;
    }
    write->host = host;
    write->size = (uint32_t)(size < available ? size : available);
    memcpy(write->bytes, host, write->size);
    engine->rom_write_count++;
    tcg_add_requests(engine, TCG_UNDO_ROM);
    return 1;
}

/* True lets the access pass; code outside RAM is fetched from the bus. */
static _Bool on_protected_access(void *uc, int type, uint64_t address, int size, int64_t value,
                                 void *user)
{
    (void)uc;
    (void)value;
    return type == UC_MEM_WRITE_PROT ? keep_rom(user, address, (uint64_t)size) : 1;
}

/* Ends of a slice. */

static void serve_requests(struct tcg_engine *engine, uint32_t requests)
{
    uint64_t rflags;

    if (requests & TCG_UNDO_ROM) {
        undo_rom_writes(engine);
    }
    if (requests & TCG_SHADOW) {
        tcg_take_requests(engine, TCG_SHADOW);
        requests &= ~(uint32_t)CPR_TCG_INTERRUPT;
    }
    if (!(requests & STOP)) {
        if (!(requests & CPR_TCG_INTERRUPT)) {
            return;
        }
        unicorn.reg_read(engine->cpu.uc, UC_X86_REG_RFLAGS, &rflags);
        if (!(rflags & RFLAGS_IF)) {
            return;
        }
    }
    engine->stopped = 1;
    unicorn.emu_stop(engine->cpu.uc);
}

/* At the start of each translated block: the one place where a slice is ended from outside.
   (uc_emu_stop from another thread cannot be told from HLT, and is lost if it comes early.) */
static void on_block(void *uc, uint64_t address, uint32_t size, void *user)
{
    struct tcg_engine *engine = user;
    const uint32_t requests = __atomic_load_n(&engine->requests, __ATOMIC_RELAXED);

    (void)uc;
    (void)address;
    (void)size;
    if (__builtin_expect(requests != 0, 0)) {
        serve_requests(engine, requests);
    }
}

static void on_translation(void *uc, void *block, void *before, void *user)
{
    struct tcg_engine *engine = user;

    (void)uc;
    (void)block;
    (void)before;
    if (++engine->translations == TCG_TRANSLATIONS_MAX) {
        tcg_add_requests(engine, TCG_MANY);
    }
}

static void on_interrupt(void *uc, uint32_t vector, void *user)
{
    struct tcg_engine *engine = user;

    engine->vector = (int)vector;
    unicorn.emu_stop(uc);
}

static void on_syscall(void *uc, void *user)
{
    struct tcg_engine *engine = user;

    engine->system_call = tcg_syscall;
    unicorn.emu_stop(uc);
}

static void on_sysenter(void *uc, void *user)
{
    struct tcg_engine *engine = user;

    engine->system_call = tcg_sysenter;
    unicorn.emu_stop(uc);
}

/* Instructions.  The result 1 of the last three says that the hook was the whole instruction. */

static uint32_t on_in(void *uc, uint32_t port, int size, void *user)
{
    const struct tcg_engine *engine = user;

    (void)uc;
    return cpr_tcg_io_read(engine->handle, port, (uint32_t)size);
}

static void on_out(void *uc, uint32_t port, int size, uint32_t value, void *user)
{
    const struct tcg_engine *engine = user;

    (void)uc;
    cpr_tcg_io_write(engine->handle, port, (uint32_t)size, value);
}

static int on_rdtsc(void *uc, void *user)
{
    const struct tcg_engine *engine = user;
    const uint64_t tsc = tcg_now_ns() + *engine->tsc_offset;
    const uint64_t low = (uint32_t)tsc, high = tsc >> 32;

    unicorn.reg_write(uc, UC_X86_REG_RAX, &low);
    unicorn.reg_write(uc, UC_X86_REG_RDX, &high);
    return 1;
}

static int on_rdtscp(void *uc, void *user)
{
    struct tcg_engine *engine = user;
    const uint64_t aux = (uint32_t)tcg_cpu_read_msr(&engine->cpu, MSR_TSC_AUX);

    unicorn.reg_write(uc, UC_X86_REG_RCX, &aux);
    return on_rdtsc(uc, user);
}

/* Most leaves are as the library has them. */
static int on_cpuid(void *uc, void *user)
{
    static const int results[4] = {UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDX};
    const struct tcg_engine *engine = user;
    uint64_t number, subleaf, value;
    uint32_t registers[4];

    unicorn.reg_read(uc, UC_X86_REG_RAX, &number);
    unicorn.reg_read(uc, UC_X86_REG_RCX, &subleaf);
    if (!tcg_cpuid_get(&engine->cpuid, *engine->vcpu_count, (uint32_t)number, (uint32_t)subleaf,
                       registers)) {
        return 0;
    }
    for (int i = 0; i < 4; i++) {
        value = registers[i];
        unicorn.reg_write(uc, results[i], &value);
    }
    return 1;
}

static int add_hook(struct tcg_engine *engine, size_t *hook, int type, void *callback,
                    int instruction)
{
    return unicorn.hook_add(engine->cpu.uc, hook, type, callback, engine, (uint64_t)1,
                            (uint64_t)0, instruction);
}

static int add_block_hook(struct tcg_engine *engine)
{
    engine->translations = 0;
    return add_hook(engine, &engine->block_hook, UC_HOOK_BLOCK, (void *)on_block, 0);
}

static int add_hooks(struct tcg_engine *engine)
{
    const struct {
        int type;
        int instruction;
        void *callback;
    } hooks[] = {
        {UC_HOOK_EDGE_GENERATED, 0, (void *)on_translation},
        {UC_HOOK_INTR, 0, (void *)on_interrupt},
        {UC_HOOK_MEM_WRITE_PROT | UC_HOOK_MEM_FETCH_PROT, 0, (void *)on_protected_access},
        {UC_HOOK_INSN, UC_X86_INS_IN, (void *)on_in},
        {UC_HOOK_INSN, UC_X86_INS_OUT, (void *)on_out},
        {UC_HOOK_INSN, UC_X86_INS_SYSCALL, (void *)on_syscall},
        {UC_HOOK_INSN, UC_X86_INS_SYSENTER, (void *)on_sysenter},
        {UC_HOOK_INSN, UC_X86_INS_CPUID, (void *)on_cpuid},
        {UC_HOOK_INSN, UC_X86_INS_RDTSC, (void *)on_rdtsc},
        {UC_HOOK_INSN, UC_X86_INS_RDTSCP, (void *)on_rdtscp},
    };
    size_t hook;
    int error = add_block_hook(engine);

    for (size_t i = 0; i < sizeof(hooks) / sizeof(hooks[0]) && !error; i++) {
        error = add_hook(engine, &hook, hooks[i].type, hooks[i].callback, hooks[i].instruction);
    }
    return error;
}

const char *tcg_engine_open(struct tcg_engine *engine, const struct tcg_ram_map *ram,
                            uint32_t apic_id)
{
    const char *problem = tcg_cpu_open(&engine->cpu, ram);
    int error;

    if (problem) {
        return problem;
    }
    engine->code_pages.ram = ram;
    engine->code_pages.bit = (uint8_t)(1 << apic_id % 8);
    engine->code_pages.engine_count = engine->vcpu_count;
    error = tcg_cpuid_read(&engine->cpuid, &engine->cpu, apic_id);
    if (!error) {
        error = add_hooks(engine);
    }
    if (!error) {
        return NULL;
    }
    tcg_engine_close(engine);
    return unicorn.strerror(error);
}

void tcg_engine_close(struct tcg_engine *engine)
{
    tcg_cpu_close(&engine->cpu);
}

/* Running. */

int tcg_engine_is_interruptible(struct tcg_engine *engine)
{
    tcg_cpu_load(&engine->cpu);
    return (engine->cpu.rflags & RFLAGS_IF) &&
           !(engine->cpu.registers->hflags & HFLAG_INHIBIT_IRQ);
}

static enum tcg_end end_of_delivery(int result)
{
    return result < 0 ? TCG_END_SHUTDOWN : TCG_END_REQUEST;
}

/* Whether the breakpoint exception is of an INT3 that another vCPU has taken away meanwhile: each
   engine has translations of its own, and learns of no other's writes. */
static int is_stale_breakpoint(struct tcg_engine *engine)
{
    struct tcg_cpu *cpu = &engine->cpu;
    const uint64_t end = cpu->registers->segs[CS].base + cpu->registers->rip;
    struct tcg_fault ignored;
    uint8_t code[2] = {0, 0};

    return engine->vector == VECTOR_BREAKPOINT && cpu->exception->is_software &&
           tcg_read(cpu, end - 2, code, sizeof(code), &ignored) == 0 && code[1] != OPCODE_INT3 &&
           !(code[0] == OPCODE_INT && code[1] == VECTOR_BREAKPOINT);
}

static void forget_code(struct tcg_engine *engine)
{
    tcg_cpu_forget_code(&engine->cpu);
    tcg_code_pages_forget(&engine->code_pages);
}

static int forget_as_asked(struct tcg_engine *engine)
{
    const uint32_t requests = tcg_take_requests(engine, CPR_TCG_CODE | TCG_MANY);
    int error = 0;

    if (requests) {
        forget_code(engine);
    }
    if (requests & TCG_MANY) {
        /* What the library has kept for the hook goes with it. */
        error = unicorn.hook_del(engine->cpu.uc, engine->block_hook);
        if (!error) {
            error = add_block_hook(engine);
        }
    }
    return error;
}

void tcg_engine_forget_stale(struct tcg_engine *engine)
{
    if (engine->stale_count > TCG_STALE_MAX) {
        forget_code(engine);
    } else {
        tcg_code_pages_begin(&engine->code_pages);
        for (uint32_t i = 0; i < engine->stale_count; i++) {
            tcg_code_pages_invalidate(&engine->code_pages, engine->stale[i]);
        }
        tcg_code_pages_end();
    }
    engine->stale_count = 0;
}

/* Goes back to the instruction that is there now. */
static enum tcg_end retry_breakpoint(struct tcg_engine *engine)
{
    struct tcg_cpu *cpu = &engine->cpu;

    cpu->registers->rip--;
    cpu->exception->being_delivered = TCG_NO_VECTOR;
    tcg_cpu_store(cpu);
    forget_code(engine);
    return TCG_END_REQUEST;
}

/* Does what the hooks left undone when uc_emu_start returned `error`. */
static enum tcg_end finish_slice(struct tcg_engine *engine, int error)
{
    struct tcg_cpu *cpu = &engine->cpu;

    if (error == UC_ERR_INSN_INVALID) {
        return end_of_delivery(tcg_deliver(cpu, TCG_EXCEPTION, TCG_EXCEPTION_UD, 0));
    }
    if (error) {
        engine->problem = unicorn.strerror(error);
        return TCG_END_ERROR;
    }
    if (engine->vector != TCG_NO_VECTOR) {
        tcg_cpu_load(cpu);
        if (is_stale_breakpoint(engine)) {
            return retry_breakpoint(engine);
        }
        return end_of_delivery(
            tcg_deliver(cpu, cpu->exception->is_software ? TCG_SOFTWARE : TCG_EXCEPTION,
                        (uint32_t)engine->vector, (uint32_t)cpu->exception->error_code));
    }
    if (engine->system_call) {
        return end_of_delivery(engine->system_call(cpu));
    }
    return engine->stopped ? TCG_END_REQUEST : TCG_END_HALT;
}

enum tcg_end tcg_engine_run(struct tcg_engine *engine)
{
    struct tcg_cpu *cpu = &engine->cpu;
    int error = map_memory(engine);

    engine->stopped = 0;
    engine->vector = TCG_NO_VECTOR;
    engine->system_call = NULL;
    if (!error) {
        tcg_code_pages_begin(&engine->code_pages);
        error = forget_as_asked(engine);
        if (!error) {
            tcg_cpu_load(cpu);
            if (cpu->registers->hflags & HFLAG_INHIBIT_IRQ) {
                tcg_add_requests(engine, TCG_SHADOW);
            }
            error = unicorn.emu_start(cpu->uc, cpu->registers->rip, 0, 0, 0);
        }
        tcg_code_pages_end();
        undo_rom_writes(engine);
    }
    return finish_slice(engine, error);
}
