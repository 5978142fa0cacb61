/*
 * The part of libunicorn's C interface that vm.c uses, declared here because the library comes
 * from a wheel whose headers need not be there when this module is compiled.
 *
 * The numbers are those of unicorn.h and x86.h of unicorn 2.1; they are the library's ABI.
 */
#ifndef CPR_TCG_UNICORN_API_H
#define CPR_TCG_UNICORN_API_H

#include <stddef.h>
#include <stdint.h>

enum { UC_ARCH_X86 = 4, UC_MODE_64 = 8 };

enum { UC_ERR_OK = 0, UC_ERR_INSN_INVALID = 10 };

enum { UC_PROT_READ = 1, UC_PROT_WRITE = 2, UC_PROT_EXEC = 4, UC_PROT_ALL = 7 };

enum { UC_MEM_WRITE_PROT = 22 };

enum {
    UC_HOOK_INTR = 0x1,
    UC_HOOK_INSN = 0x2,
    UC_HOOK_BLOCK = 0x8,
    UC_HOOK_MEM_WRITE_PROT = 0x100,
    UC_HOOK_MEM_FETCH_PROT = 0x200,
    UC_HOOK_EDGE_GENERATED = 0x8000
};

enum {
    UC_X86_INS_CPUID = 113,
    UC_X86_INS_IN = 218,
    UC_X86_INS_OUT = 500,
    UC_X86_INS_RDTSC = 608,
    UC_X86_INS_RDTSCP = 609,
    UC_X86_INS_SYSCALL = 699,
    UC_X86_INS_SYSENTER = 700
};

enum {
    UC_X86_REG_FPSW = 31,
    UC_X86_REG_RAX = 35,
    UC_X86_REG_RBX = 37,
    UC_X86_REG_RCX = 38,
    UC_X86_REG_RDX = 40,
    UC_X86_REG_RIP = 41,
    UC_X86_REG_CR2 = 52,
    UC_X86_REG_DR0 = 66,
    UC_X86_REG_DR1 = 67,
    UC_X86_REG_R15 = 113,
    UC_X86_REG_ST0 = 114,
    UC_X86_REG_YMM0 = 154,
    UC_X86_REG_IDTR = 242,
    UC_X86_REG_GDTR = 243,
    UC_X86_REG_FPCW = 246,
    UC_X86_REG_FPTAG = 247,
    UC_X86_REG_MSR = 248,
    UC_X86_REG_MXCSR = 249,
    UC_X86_REG_RFLAGS = 253,
    UC_X86_REG_FIP = 254,
    UC_X86_REG_FCS = 255,
    UC_X86_REG_FDP = 256,
    UC_X86_REG_FDS = 257,
    UC_X86_REG_FOP = 258
};

/* Arguments of uc_ctl: the control's number, how many values follow, and that they are written. */
enum {
    UC_CTL_EXITS_ENABLE = 0x44000004,
    UC_CTL_TB_FLUSH = 0x4000000a,
    UC_CTL_TLB_FLUSH = 0x4000000b,
    UC_CTL_TCG_BUFFER_SIZE = 0x4400000d
};

/* A descriptor table register, as UC_X86_REG_GDTR and UC_X86_REG_IDTR take it. */
struct uc_x86_mmr {
    uint16_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

/* What UC_X86_REG_MSR takes. */
struct uc_x86_msr {
    uint32_t index;
    uint64_t value;
};

typedef uint64_t (*uc_mmio_read_callback)(void *uc, uint64_t offset, unsigned int size,
                                          void *user);
typedef void (*uc_mmio_write_callback)(void *uc, uint64_t offset, unsigned int size,
                                       uint64_t value, void *user);

struct unicorn_api {
    unsigned int (*version)(unsigned int *major, unsigned int *minor);
    const char *(*strerror)(int error);
    int (*open)(int arch, int mode, void **uc);
    int (*close)(void *uc);
    int (*ctl)(void *uc, int control, ...);
    int (*reg_read)(void *uc, int reg, void *value);
    int (*reg_write)(void *uc, int reg, const void *value);
    int (*mem_map)(void *uc, uint64_t address, uint64_t size, uint32_t protection);
    int (*mem_map_ptr)(void *uc, uint64_t address, uint64_t size, uint32_t protection,
                       void *host);
    int (*mmio_map)(void *uc, uint64_t address, uint64_t size, uc_mmio_read_callback read,
                    void *read_user, uc_mmio_write_callback write, void *write_user);
    int (*mem_unmap)(void *uc, uint64_t address, uint64_t size);
    int (*mem_write)(void *uc, uint64_t address, const void *bytes, size_t size);
    int (*hook_add)(void *uc, size_t *hook, int type, void *callback, void *user,
                    uint64_t begin, uint64_t end, ...);
    int (*hook_del)(void *uc, size_t hook);
    int (*emu_start)(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
    int (*emu_stop)(void *uc);
    size_t (*context_size)(void *uc);
    int (*context_alloc)(void *uc, void **context);
    int (*context_save)(void *uc, void *context);
    int (*context_restore)(void *uc, void *context);
    int (*context_free)(void *context);
};

/* The library's functions, valid once unicorn_load() has returned NULL. */
extern struct unicorn_api unicorn;

/*
 * Loads the library at `path` and keeps it loaded.  Returns NULL, or what is wrong: a sentence in
 * static storage.  Calls after a success do nothing.  Not for two threads at once.
 */
const char *unicorn_load(const char *path);

#endif
