/* The mm holder: keeps the old address space alive over an exec. */
#include "mm_holder.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "raw_syscall.h"

#define STACK_SIZE 16384
#define GUARD_SIZE 4096
/* How long it waits after the exec: a teardown beside the start of the new image slows that down. */
#define REST_NS 60000000

#define PIECE ((uint64_t)64 << 20) /* in which mappings are undone */

/* What the child works with: only one is there at a time. */
static struct {
    const struct cpr_mapping *mappings;
    uint32_t count;
    int32_t pipe_fd;
    uint32_t given_up; /* a futex: 1 where there is no exec */
} held;

CPR_IN_CHILD void cpr_mm_forget(const struct cpr_mapping *mappings, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t end = mappings[i].address + mappings[i].size;

        for (uint64_t at = mappings[i].address; at < end; at += PIECE) {
            uint64_t size = end - at < PIECE ? end - at : PIECE;

            if (cpr_syscall3(SYS_munmap, at, size, 0) < 0) {
                break; /* part of a huge page: it goes with the rest */
            }
        }
    }
}

CPR_IN_CHILD static int hold(void *argument)
{
    long pipe_fd = held.pipe_fd;
    struct sched_param none = {0};
    struct timespec rest = {0, REST_NS};
    char byte;

    (void)argument;
    if (pipe_fd > 0) {
        cpr_syscall3(SYS_close_range, 0, pipe_fd - 1, 0);
    }
    cpr_syscall3(SYS_close_range, pipe_fd + 1, UINT_MAX, 0);
    cpr_syscall3(SYS_sched_setscheduler, 0, SCHED_IDLE, &none); /* the guest comes first */
    while (cpr_syscall3(SYS_read, pipe_fd, &byte, 1) == -EINTR) {
    }
    cpr_syscall5(SYS_futex, &held.given_up, FUTEX_WAIT, 0, &rest, 0);
    if (!__atomic_load_n(&held.given_up, __ATOMIC_SEQ_CST)) { /* nobody else has this memory now */
        cpr_mm_forget(held.mappings, held.count);
    }
    cpr_syscall1(SYS_exit_group, 0);
    __builtin_unreachable();
}

/* The child's stack: mapped once, because only one holder is there at a time. */
static char *stack_top(void)
{
    static char *stack;

    if (stack == NULL) {
        char *base =
            mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (base == MAP_FAILED) {
            return NULL;
        }
        mprotect(base, GUARD_SIZE, PROT_NONE);
        stack = base;
    }
    return stack + STACK_SIZE;
}

int cpr_mm_holder_start(const struct cpr_mapping *mappings, uint32_t count, int *release_fd)
{
    int ends[2];
    sigset_t all, old;
    char *top = stack_top();
    int pid, error;

    if (top == NULL || pipe2(ends, O_CLOEXEC) < 0) {
        return -errno;
    }
    held.mappings = mappings;
    held.count = count;
    held.pipe_fd = ends[0];
    held.given_up = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* the child inherits it and hears no signal */
    pid = clone(hold, top, CLONE_VM, NULL);
    error = errno;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    close(ends[0]);
    if (pid < 0) {
        close(ends[1]);
        return -error;
    }
    *release_fd = ends[1];
    return pid;
}

int cpr_mm_holder_release(int pid, int release_fd)
{
    __atomic_store_n(&held.given_up, 1, __ATOMIC_SEQ_CST);
    close(release_fd);
    return cpr_mm_holder_reap(pid);
}

int cpr_mm_holder_reap(int pid)
{
    while (waitpid(pid, NULL, __WALL) < 0) {
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}
