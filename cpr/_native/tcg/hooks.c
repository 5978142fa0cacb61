#include "hooks.h"

#include <string.h>

#include "syscall.h"
#include "unicorn_api.h"
#include "vm.h"

enum { RFLAGS_IF = 1 << 9 };
enum { MSR_TSC_AUX = 0xc0000103u };
enum { STOP = CPR_TCG_KICK | CPR_TCG_INIT | CPR_TCG_SIPI | TCG_YIELD | TCG_STALE | TCG_MANY };

/* Writes to ROM.  The engine carries out what the hook lets pass, also where memory is mapped
   read-only; so the hook keeps the bytes, and the next block puts them back. */

void tcg_hooks_undo_rom_writes(struct tcg_engine *engine)
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
        tcg_hooks_undo_rom_writes(engine);
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

int tcg_hooks_renew_block(struct tcg_engine *engine)
{
    const int error = unicorn.hook_del(engine->cpu.uc, engine->block_hook);

    return error ? error : add_block_hook(engine);
}

int tcg_hooks_add(struct tcg_engine *engine)
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
