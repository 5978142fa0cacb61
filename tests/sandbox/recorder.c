/* Preloaded into a program that makes a seccomp filter: says on stderr which rules it asks
   libseccomp for, as "rule NAME NUMBER ACTION CONDITIONS". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/audit.h>
#include <stdint.h>
#include <stdio.h>

int seccomp_rule_add_array(void *context, uint32_t action, int number, unsigned int count,
                           const void *conditions)
{
    int (*add)(void *, uint32_t, int, unsigned int, const void *) =
        dlsym(RTLD_NEXT, "seccomp_rule_add_array");
    char *(*name)(uint32_t, int) = dlsym(RTLD_DEFAULT, "seccomp_syscall_resolve_num_arch");

    fprintf(stderr, "rule %s %d %u %u\n", name(AUDIT_ARCH_X86_64, number), number, action, count);
    return add(context, action, number, count, conditions);
}
