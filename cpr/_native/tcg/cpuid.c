/* Leaves and bits are those of the Intel SDM, volume 2, CPUID. */
#include "cpuid.h"

#include <string.h>

#include "unicorn_api.h"

enum { EAX, EBX, ECX, EDX };

enum {
    LEAF_HIGHEST = 0,
    LEAF_VERSION = 1,
    LEAF_CACHES = 4,
    LEAF_FEATURES = 7,
    LEAF_TOPOLOGY = 0xb,
    LEAF_TSC = 0x15
};
static const uint32_t leaf_highest_extended = 0x80000000, leaf_power = 0x80000007;

enum { APIC_ID_SHIFT = 24, COUNT_SHIFT = 16, LOW_HALF = 0xffff, HTT = 1 << 28 };
enum { CORES_SHIFT = 26 };              /* of leaf 4 */
enum { LEVEL_THREAD = 1, LEVEL_CORE = 2, LEVEL_SHIFT = 8 };
enum { TSC_ADJUST = 1 << 1 };           /* of leaf 7: the MSR is there, and stays 0 */
enum { INVARIANT_TSC = 1 << 8 };
enum { CLOCK_HZ = 1000000000 };         /* of the TSC, and of the local APIC's timer */

static const struct {
    uint32_t number, subleaf;
} asked[TCG_CPUID_LEAVES] = {
    {LEAF_HIGHEST, 0},  {LEAF_VERSION, 0}, {LEAF_CACHES, 0}, {LEAF_CACHES, 1},
    {LEAF_CACHES, 2},   {LEAF_CACHES, 3},  {LEAF_FEATURES, 0}, {LEAF_TSC, 0},
    {0x80000000, 0},    {0x80000007, 0},
};

static const uint8_t code[] = {0x0f, 0xa2, 0xf4}; /* cpuid; hlt */
enum { CODE_SIZE = 4096 };

/* Runs the instruction; the code is at 0. */
static int ask(struct tcg_cpu *cpu, struct tcg_cpuid_leaf *leaf)
{
    const uint64_t rax = leaf->number, rcx = leaf->subleaf;
    const uint64_t *regs = cpu->registers->regs;
    int error;

    unicorn.reg_write(cpu->uc, UC_X86_REG_RAX, &rax);
    unicorn.reg_write(cpu->uc, UC_X86_REG_RCX, &rcx);
    error = unicorn.emu_start(cpu->uc, 0, 0, 0, 0);
    tcg_cpu_load(cpu);
    leaf->registers[EAX] = (uint32_t)regs[0];
    leaf->registers[ECX] = (uint32_t)regs[1];
    leaf->registers[EDX] = (uint32_t)regs[2];
    leaf->registers[EBX] = (uint32_t)regs[3];
    return error;
}

static void change(struct tcg_cpuid_leaf *leaf)
{
    uint32_t *registers = leaf->registers;

    if (leaf->number == LEAF_HIGHEST && registers[EAX] < LEAF_TSC) {
        registers[EAX] = LEAF_TSC;
    } else if (leaf->number == LEAF_FEATURES) {
        registers[EBX] |= TSC_ADJUST;
    } else if (leaf->number == LEAF_TSC) {
        registers[EAX] = registers[EBX] = 1; /* the TSC's frequency by that of the crystal */
        registers[ECX] = CLOCK_HZ;
        registers[EDX] = 0;
    } else if (leaf->number == leaf_highest_extended && registers[EAX] < leaf_power) {
        registers[EAX] = leaf_power;
    } else if (leaf->number == leaf_power) {
        registers[EDX] |= INVARIANT_TSC;
    }
}

int tcg_cpuid_read(struct tcg_cpuid *cpuid, struct tcg_cpu *cpu, uint32_t apic_id)
{
    int error = unicorn.mem_map(cpu->uc, 0, CODE_SIZE, UC_PROT_ALL);

    if (error) {
        return error;
    }
    cpuid->apic_id = apic_id;
    unicorn.mem_write(cpu->uc, 0, code, sizeof(code));
    for (int i = 0; i < TCG_CPUID_LEAVES && !error; i++) {
        cpuid->leaves[i].number = asked[i].number;
        cpuid->leaves[i].subleaf = asked[i].subleaf;
        error = ask(cpu, &cpuid->leaves[i]);
        change(&cpuid->leaves[i]);
    }
    unicorn.mem_unmap(cpu->uc, 0, CODE_SIZE);
    return error;
}

/* How many bits of an APIC ID tell `count` processors apart. */
static uint32_t width_of(uint32_t count)
{
    uint32_t width = 0;

    while (1u << width < count) {
        width++;
    }
    return width;
}

static void get_topology(const struct tcg_cpuid *cpuid, uint32_t vcpu_count, uint32_t subleaf,
                         uint32_t registers[4])
{
    memset(registers, 0, 4 * sizeof(registers[0]));
    registers[ECX] = subleaf;
    registers[EDX] = cpuid->apic_id;
    if (subleaf == 0) {
        registers[EBX] = 1;
        registers[ECX] |= LEVEL_THREAD << LEVEL_SHIFT;
    } else if (subleaf == 1) {
        registers[EAX] = width_of(vcpu_count);
        registers[EBX] = vcpu_count;
        registers[ECX] |= LEVEL_CORE << LEVEL_SHIFT;
    }
}

static void add_topology(const struct tcg_cpuid *cpuid, uint32_t vcpu_count, uint32_t number,
                         uint32_t registers[4])
{
    const uint32_t ids = 1u << width_of(vcpu_count);

    if (number == LEAF_VERSION) {
        registers[EBX] = (registers[EBX] & LOW_HALF) | cpuid->apic_id << APIC_ID_SHIFT;
        if (vcpu_count > 1) {
            registers[EBX] |= ids << COUNT_SHIFT;
            registers[EDX] |= HTT;
        }
    } else if (number == LEAF_CACHES && registers[EAX]) {
        registers[EAX] |= (ids - 1) << CORES_SHIFT;
    }
}

int tcg_cpuid_get(const struct tcg_cpuid *cpuid, uint32_t vcpu_count, uint32_t number,
                  uint32_t subleaf, uint32_t registers[4])
{
    const int has_subleaves = number == LEAF_CACHES || number == LEAF_FEATURES;

    if (number == LEAF_TOPOLOGY) {
        get_topology(cpuid, vcpu_count, subleaf, registers);
        return 1;
    }
    for (int i = 0; i < TCG_CPUID_LEAVES; i++) {
        const struct tcg_cpuid_leaf *leaf = &cpuid->leaves[i];
        if (leaf->number == number && (!has_subleaves || leaf->subleaf == subleaf)) {
            memcpy(registers, leaf->registers, sizeof(leaf->registers));
            add_topology(cpuid, vcpu_count, number, registers);
            return 1;
        }
    }
    return 0;
}
