/* -sandbox: a seccomp filter (Documentation/userspace-api/seccomp_filter.rst). */
#include "sandbox.h"

#include <asm/unistd.h>
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
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
#define IF_EQUAL(value, skipped) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skipped)
#define UNLESS_EQUAL(value, skipped) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skipped, 0)
#define AND(bits) BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits)

static const struct {
    uint32_t group;
    uint32_t number;
    uint32_t action;
    int conditional;
} CALLS[] = {
#define CALL(group, name, action, conditional)                                                     \
    {CPR_SANDBOX_##group, __NR_##name, action, conditional},
#include "sandbox_calls.h"
#undef CALL
};

/* What clone(2) has for a thread of pthread_create(3), and what no thread has. */
#define OF_THREADS                                                                                 \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |            \
     CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
#define OF_PROCESSES                                                                               \
    (CSIGNAL | CLONE_PIDFD | CLONE_PTRACE | CLONE_VFORK | CLONE_PARENT | CLONE_NEWNS |             \
     CLONE_UNTRACED | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER |              \
     CLONE_NEWPID | CLONE_NEWNET | CLONE_IO)

/* Each is entered with the call matched, and its action follows: what it leaves alone is allowed. */
static const struct sock_filter UNLESS_A_THREAD[] = {
    LOAD(args[0]), AND(OF_THREADS | OF_PROCESSES), IF_EQUAL(OF_THREADS, 1),
    RETURN(SECCOMP_RET_ALLOW),
};
static const struct sock_filter UNLESS_IDLE[] = {
    LOAD(args[1]), IF_EQUAL(SCHED_IDLE, 1), RETURN(SECCOMP_RET_ALLOW),
};

#define MOST (6 + (2 + COUNT(UNLESS_A_THREAD)) * COUNT(CALLS))

static size_t append(struct sock_filter *filter, size_t used, const struct sock_filter *more,
                     size_t count)
{
    for (size_t i = 0; i < count; i++) {
        filter[used + i] = more[i];
    }
    return used + count;
}

/* "If the call is this one, and its arguments are not those that are allowed: its action." */
static size_t deny(struct sock_filter *filter, size_t used, size_t index)
{
    const struct sock_filter *condition = NULL;
    size_t length = 0;

    if (CALLS[index].conditional && CALLS[index].number == __NR_clone) {
        condition = UNLESS_A_THREAD;
        length = COUNT(UNLESS_A_THREAD);
    } else if (CALLS[index].conditional && CALLS[index].number == __NR_sched_setscheduler) {
        condition = UNLESS_IDLE;
        length = COUNT(UNLESS_IDLE);
    }
    filter[used++] = (struct sock_filter)IF_EQUAL(CALLS[index].number, (uint8_t)(length + 1));
    used = append(filter, used, condition, length);
    filter[used++] = (struct sock_filter)RETURN(CALLS[index].action);
    return used;
}

int cpr_sandbox(uint32_t groups)
{
    static const struct sock_filter HEAD[] = {
        LOAD(arch), UNLESS_EQUAL(AUDIT_ARCH_X86_64, 1), RETURN(SECCOMP_RET_KILL_PROCESS),
        LOAD(nr),
        /* The x32 ABI has each call under another number. */
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, __X32_SYSCALL_BIT, 0, 1),
        RETURN(SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_filter filter[MOST + 1];
    struct sock_fprog program = {.filter = filter};
    size_t used = append(filter, 0, HEAD, COUNT(HEAD));

    for (size_t i = 0; i < COUNT(CALLS); i++) {
        if (groups & CALLS[i].group) {
            used = deny(filter, used, i);
        }
    }
    filter[used++] = (struct sock_filter)RETURN(SECCOMP_RET_ALLOW);
    program.len = (unsigned short)used;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        return -errno;
    }
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) {
        return errno ? -errno : -ESRCH;
    }
    return 0;
}
