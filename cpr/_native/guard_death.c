#include "guard_death.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>

#include "guard_proc.h"
#include "raw_syscall.h"

#define DEATH_MS 2000 /* for so long a new image that was killed is waited for */
#define FIRST_KILLED "1000" /* OOM_SCORE_ADJ_MAX of linux/oom.h */
#define INIT 1

CPR_IN_CHILD static int has_ended(int pid_fd, int timeout_ms)
{
    struct pollfd death = {.fd = pid_fd, .events = POLLIN};
    uint64_t deadline = cpr_monotonic_ns() + (uint64_t)timeout_ms * CPR_NS_PER_MS;
    long count;

    do { /* a signal may be about something else */
        count = cpr_syscall3(SYS_poll, &death, 1, timeout_ms);
    } while (count < 0 && cpr_monotonic_ns() < deadline);
    return count == 1;
}

CPR_IN_CHILD int cpr_guard_kill(int pid_fd)
{
    long result = cpr_syscall5(SYS_pidfd_send_signal, pid_fd, SIGKILL, 0, 0, 0);

    return result < 0 && result != -ESRCH ? (int)result : has_ended(pid_fd, DEATH_MS);
}

static struct {
    int32_t pid; /* 0: nobody */
    char before[7]; /* "-1000\n" at most */
    long size;
} offered;

/* Not where /proc is another PID namespace's, with other numbers. */
CPR_IN_CHILD static long open_score(int32_t pid)
{
    if (!cpr_guard_knows_proc()) {
        return -ESRCH;
    }
    return cpr_guard_open("/proc/%d/oom_score_adj", &pid, O_RDWR);
}

/* Writes as one without CAP_SYS_RESOURCE: else the process could have no less from then on. */
CPR_IN_CHILD static long write_plainly(long fd, const char *text, long size)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct caps[_LINUX_CAPABILITY_U32S_3], less[_LINUX_CAPABILITY_U32S_3];
    long done;

    cpr_syscall3(SYS_capget, &header, caps, 0);
    for (unsigned i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
        less[i] = caps[i];
    }
    less[CAP_TO_INDEX(CAP_SYS_RESOURCE)].effective &= ~CAP_TO_MASK(CAP_SYS_RESOURCE);
    cpr_syscall3(SYS_capset, &header, less, 0);
    done = cpr_syscall3(SYS_write, fd, text, size);
    cpr_syscall3(SYS_capset, &header, caps, 0);
    return done;
}

CPR_IN_CHILD void cpr_guard_offer(int32_t pid, char before[8])
{
    long fd = pid == INIT ? -EPERM : open_score(pid);

    offered.pid = 0;
    if (fd < 0) {
        return;
    }
    offered.size = cpr_syscall3(SYS_read, fd, offered.before, sizeof(offered.before));
    if (offered.size > 0 && write_plainly(fd, FIRST_KILLED, sizeof(FIRST_KILLED) - 1) > 0) {
        offered.pid = pid;
        for (long i = 0; i < offered.size; i++) {
            before[i] = offered.before[i];
        }
    }
    cpr_syscall1(SYS_close, fd);
}

CPR_IN_CHILD void cpr_guard_withdraw(void)
{
    long fd = offered.pid ? open_score(offered.pid) : -ESRCH;

    if (fd >= 0) {
        offered.pid = 0;
        cpr_syscall3(SYS_write, fd, offered.before, offered.size);
        cpr_syscall1(SYS_close, fd);
    }
}
