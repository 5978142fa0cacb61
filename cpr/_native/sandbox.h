#ifndef CPR_SANDBOX_H
#define CPR_SANDBOX_H
#include <stdint.h>

/* QEMU's groups of system calls; DEFAULT is denied with every -sandbox on. */
enum cpr_sandbox_group {
    CPR_SANDBOX_DEFAULT = 1,
    CPR_SANDBOX_OBSOLETE = 2,
    CPR_SANDBOX_ELEVATEPRIVILEGES = 4,
    CPR_SANDBOX_SPAWN = 8,
    CPR_SANDBOX_RESOURCECONTROL = 16,
};

/* Installs a seccomp filter that denies those `groups`, for all threads and over an exec; it cannot
   be undone, and implies no_new_privs. 0 or -errno. */
int cpr_sandbox(uint32_t groups);

#endif
