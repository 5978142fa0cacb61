/* Leaves and bits are those of the Intel SDM, volume 2, CPUID. */
#include "cpuid.h"

#include <stddef.h>

#include "unicorn_api.h"

enum { EAX, EBX, ECX, EDX };

enum { LEAF_HIGHEST = 0, LEAF_VERSION = 1, LEAF_TSC = 0x15 };
static const uint32_t leaf_highest_extended = 0x80000000, leaf_power = 0x80000007;

enum { APIC_ID_SHIFT = 24, OTHER_THAN_APIC_ID = 0x00ffffff };
enum { INVARIANT_TSC = 1 << 8 };
enum { CLOCK_HZ = 1000000000 }; /* of the TSC, and of the local APIC's timer */

static const uint8_t code[] = {0x0f, 0xa2, 0xf4}; /* cpuid; hlt */
enum { CODE_SIZE = 4096 };

/* Runs the instruction; the code is at 0. */
static int ask(struct tcg_cpu *cpu, uint32_t number, uint32_t *registers)
{
    const uint64_t leaf = number, subleaf = 0;
    const uint64_t *regs = cpu->registers->regs;
    int error;

    unicorn.reg_write(cpu->uc, UC_X86_REG_RAX, &leaf);
    unicorn.reg_write(cpu->uc, UC_X86_REG_RCX, &subleaf);
    error = unicorn.emu_start(cpu->uc, 0, 0, 0, 0);
    tcg_cpu_load(cpu);
    registers[EAX] = (uint32_t)regs[0];
    registers[ECX] = (uint32_t)regs[1];
    registers[EDX] = (uint32_t)regs[2];
    registers[EBX] = (uint32_t)regs[3];
    return error;
}

static void change(uint32_t number, uint32_t *registers, uint32_t apic_id)
{
    if (number == LEAF_HIGHEST && registers[EAX] < LEAF_TSC) {
        registers[EAX] = LEAF_TSC;
    } else if (number == LEAF_VERSION) {
        registers[EBX] = (registers[EBX] & OTHER_THAN_APIC_ID) | apic_id << APIC_ID_SHIFT;
    } else if (number == LEAF_TSC) {
        registers[EAX] = registers[EBX] = 1; /* the TSC's frequency by that of the crystal */
        registers[ECX] = CLOCK_HZ;
        registers[EDX] = 0;
    } else if (number == leaf_highest_extended && registers[EAX] < leaf_power) {
        registers[EAX] = leaf_power;
    } else if (number == leaf_power) {
        registers[EDX] |= INVARIANT_TSC;
    }
}

int tcg_cpuid_read(struct tcg_cpuid *cpuid, struct tcg_cpu *cpu, uint32_t apic_id)
{
    const uint32_t numbers[TCG_CPUID_LEAVES] = {
        LEAF_HIGHEST, LEAF_VERSION, LEAF_TSC, leaf_highest_extended, leaf_power,
    };
    int error = unicorn.mem_map(cpu->uc, 0, CODE_SIZE, UC_PROT_ALL);

    if (error) {
        return error;
    }
    unicorn.mem_write(cpu->uc, 0, code, sizeof(code));
    for (int i = 0; i < TCG_CPUID_LEAVES && !error; i++) {
        cpuid->leaves[i].number = numbers[i];
        error = ask(cpu, numbers[i], cpuid->leaves[i].registers);
        change(numbers[i], cpuid->leaves[i].registers, apic_id);
    }
    unicorn.mem_unmap(cpu->uc, 0, CODE_SIZE);
    return error;
}

const uint32_t *tcg_cpuid_find(const struct tcg_cpuid *cpuid, uint32_t number)
{
    for (int i = 0; i < TCG_CPUID_LEAVES; i++) {
        if (cpuid->leaves[i].number == number) {
            return cpuid->leaves[i].registers;
        }
    }
    return NULL;
}
