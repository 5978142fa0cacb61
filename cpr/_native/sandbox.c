/* -sandbox: seccomp filters (Documentation/userspace-api/seccomp_filter.rst). */
#include "sandbox.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define MAX_CALLS 32
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)

static const int OBSOLETE[] = {
    SYS_reboot, SYS_swapon, SYS_swapoff, SYS_syslog, SYS_mount, SYS_umount2, SYS_kexec_load,
    SYS_afs_syscall, SYS_ustat, SYS__sysctl, SYS_uselib, SYS_vserver, SYS_sysfs, SYS_tuxcall,
    SYS_create_module, SYS_get_kernel_syms, SYS_query_module, SYS_nfsservctl, SYS_getpmsg,
    SYS_putpmsg, SYS_security, SYS_epoll_ctl_old, SYS_epoll_wait_old,
};
static const int SPAWN[] = {SYS_fork, SYS_vfork, SYS_execve, SYS_execveat};
static const int ELEVATE[] = {
    SYS_setuid,    SYS_setgid,    SYS_setpgid, SYS_setsid, SYS_setreuid, SYS_setregid,
    SYS_setresuid, SYS_setresgid, SYS_setfsuid, SYS_setfsgid,
};
static const int RESOURCECONTROL[] = {
    SYS_setpriority,        SYS_sched_setparam, SYS_sched_setscheduler,
    SYS_sched_setaffinity,  SYS_sched_setattr,
};

/* Appends "if the call is `number`, return `action`". */
static size_t match(struct sock_filter *filter, size_t used, int number, uint32_t action)
{
    filter[used++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1);
    filter[used++] = (struct sock_filter)RETURN(action);
    return used;
}

static int no_new_privs(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

/* Installs "another architecture: kill; one of `calls`: action; else allow", in which `processes`
   adds that clone of anything but a thread answers EPERM. */
static int install(const int *calls, size_t count, uint32_t action, int processes)
{
    struct sock_filter filter[2 * MAX_CALLS + 16];
    struct sock_fprog program = {.filter = filter};
    size_t used = 0;
    int error = no_new_privs();

    if (error) {
        return error;
    }
    filter[used++] = (struct sock_filter)LOAD(arch);
    filter[used++] =
        (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    filter[used++] = (struct sock_filter)RETURN(SECCOMP_RET_KILL_PROCESS);
    filter[used++] = (struct sock_filter)LOAD(nr);
    for (size_t i = 0; i < count; i++) {
        used = match(filter, used, calls[i], action);
    }
    if (processes) {
        /* clone3 has its flags in memory, out of a filter's sight: ENOSYS makes libc use clone. */
        used = match(filter, used, SYS_clone3, SECCOMP_RET_ERRNO | ENOSYS);
        filter[used++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3);
        filter[used++] = (struct sock_filter)LOAD(args[0]);
        filter[used++] =
            (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 1, 0);
        filter[used++] = (struct sock_filter)RETURN(SECCOMP_RET_ERRNO | EPERM);
    }
    filter[used++] = (struct sock_filter)RETURN(SECCOMP_RET_ALLOW);
    program.len = (unsigned short)used;
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) {
        return errno ? -errno : -ESRCH;
    }
    return 0;
}

int cpr_sandbox_obsolete(void)
{
    return install(OBSOLETE, COUNT(OBSOLETE), SECCOMP_RET_KILL_PROCESS, 0);
}

int cpr_sandbox_spawn(void)
{
    return install(SPAWN, COUNT(SPAWN), SECCOMP_RET_ERRNO | EPERM, 1);
}

int cpr_sandbox_elevate(void)
{
    return install(ELEVATE, COUNT(ELEVATE), SECCOMP_RET_ERRNO | EPERM, 0);
}

int cpr_sandbox_resourcecontrol(void)
{
    return install(RESOURCECONTROL, COUNT(RESOURCECONTROL), SECCOMP_RET_ERRNO | EPERM, 0);
}
