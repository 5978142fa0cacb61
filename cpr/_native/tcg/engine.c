#include "engine.h"

#include <time.h>

#include "hooks.h"
#include "interrupt.h"
#include "memory.h"
#include "unicorn_api.h"
#include "vm.h"

enum { RFLAGS_IF = 1 << 9, HFLAG_INHIBIT_IRQ = 1 << 3 };
enum { CS = 1, VECTOR_BREAKPOINT = 3, OPCODE_INT3 = 0xcc, OPCODE_INT = 0xcd };

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
        error = tcg_hooks_add(engine);
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
        error = tcg_hooks_renew_block(engine);
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
        tcg_hooks_undo_rom_writes(engine);
    }
    return finish_slice(engine, error);
}
