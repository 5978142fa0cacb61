/* The guard: the old image lives on after an exec, in a process that shares its address space.

   clone(CLONE_VM) makes the guard on a stack of its own, where it makes raw system calls only, for
   the caller's thread-local storage is its own too. The caller execs; from then on nobody but the
   guard has this memory, and it goes back to the place where the caller stood, on the caller's
   stack: the old image, whole, in another process. */
#include "guard.h"

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guard_death.h"
#include "guard_proc.h"
#include "raw_syscall.h"
#include "tid_address.h"

#define STACK_SIZE 65536
#define PROTECTED 4096                /* below the stack */
#define PIECE ((uint64_t)64 << 20)    /* in which mappings are undone */
#define KERNEL_SIGSET_SIZE 8          /* sizeof(sigset_t) of the kernel (rt_sigprocmask(2)) */
#define TICK_MS 50                    /* how often it is looked at what no descriptor tells */
/* For so long a program that has read its CPR state, and knows no token, may still fail to load. */
#define GRACE_NS ((uint64_t)2000000000)
/* For so long a new image may leave a signal that ends it waiting: it starts. */
#define PATIENCE_NS ((uint64_t)1000000000)
#define TIMERS 3                      /* ITIMER_REAL, _VIRTUAL, _PROF */
#define SIGNALS 64
#define NOTIFY_MS 1000 /* for so long a manager that reads nothing is waited for, */
#define STOPPED_MS 10  /* and for so long where what is updated stands still */
#define NOTIFY_SIZE 64
#define LOWEST 19 /* nice value (setpriority(2)) */

/* What the clone and the exec take away from the thread that goes on. */
static struct {
    struct cpr_guard *guard;
    char *stack;
    void *context[5];
    int *tid_address;
    void *robust_list;
    size_t robust_size;
    uint64_t mask;
    stack_t altstack;
    struct itimerval timers[TIMERS];
    int exec_pipe[2];
    int death_signal, subreaper;
    volatile int pid;
    uint32_t alive; /* CLONE_CHILD_CLEARTID */
    uint64_t token; /* what was read by who took it */
    int outcome;
    int lives; /* the new image was killed, and has not ended yet; it will do nothing more */
    char own_pid_text[NOTIFY_SIZE];
} self;

/* ---- in the guard: raw system calls, on its own stack ---- */

CPR_IN_CHILD static int take_token(void)
{
    return cpr_syscall3(SYS_read, self.guard->token_fd, &self.token, sizeof(self.token)) > 0;
}

/* Again as it was before take_token: nobody has it. */
static void put_token_back(void)
{
    cpr_syscall3(SYS_write, self.guard->token_fd, &self.token, sizeof(self.token));
}

CPR_IN_CHILD static void forget(const struct cpr_mapping *mappings, uint32_t count)
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

CPR_IN_CHILD void cpr_guard_end(const struct cpr_mapping *mappings, uint32_t count)
{
    struct sched_param none = {0};

    cpr_guard_withdraw(); /* not at the lowest priority: the kernel has one lock for that */
    cpr_syscall3(SYS_setpriority, PRIO_PROCESS, 0, LOWEST); /* the guest comes before this */
    cpr_syscall3(SYS_close_range, 0, UINT_MAX, 0); /* the new image waits for it */
    cpr_guard_withdraw(); /* there is a descriptor for that now, if there was none */
    cpr_syscall3(SYS_sched_setscheduler, 0, SCHED_IDLE, &none);
    forget(mappings, count);
    cpr_syscall1(SYS_exit_group, 0);
    __builtin_unreachable();
}

CPR_IN_CHILD static void go_back(int outcome)
{
    self.outcome = outcome;
    __builtin_longjmp(self.context, 1); /* on the caller's stack */
}

/* What the service's manager is told (sd_notify(3)). */
CPR_IN_CHILD static void tell(const char *text, int timeout_ms)
{
    struct pollfd manager = {.fd = self.guard->notify_fd, .events = POLLOUT};
    long size = 0;

    if (manager.fd < 0) {
        return;
    }
    while (text[size]) {
        size++;
    }
    cpr_syscall3(SYS_poll, &manager, 1, timeout_ms);
    cpr_syscall3(SYS_write, manager.fd, text, size);
}

CPR_IN_CHILD static void committed(void)
{
    /* Before its end is seen, and where the new program says nothing. */
    tell(self.own_pid_text, NOTIFY_MS);
    cpr_guard_end(self.guard->mappings, self.guard->mapping_count);
}

CPR_IN_CHILD static void kill_new_image(void)
{
    int result;

    cpr_guard_ending_signals(self.guard); /* while it is there */
    result = cpr_guard_kill(self.guard->pid_fd);
    if (result < 0) {
        if (self.guard->state_fd >= 0) {
            committed(); /* one that knows no token may have the guest, or have it soon */
        }
        /* Another user's by now, or a security module's matter: it never gets the token. */
    }
    self.lives = result <= 0;
}

/* Comes back when the exec is done; false where the process has ended before. An exec that takes too
   long is not waited for any more. */
CPR_IN_CHILD static int wait_for_exec(void)
{
    uint64_t timeout_ms = self.guard->timeout_ns / CPR_NS_PER_MS;
    long count;
    struct pollfd ready[2] = {
        {.fd = self.guard->pid_fd, .events = POLLIN},
        {.fd = self.exec_pipe[0], .events = POLLIN},
    };

    cpr_syscall1(SYS_close, self.exec_pipe[1]);
    if (timeout_ms > INT_MAX) {
        timeout_ms = 0;
    }
    while ((count = cpr_syscall3(SYS_poll, ready, 2, timeout_ms ? (long)timeout_ms : -1)) < 0) {
    }
    cpr_syscall1(SYS_close, self.exec_pipe[0]);
    if (count == 0) {
        if (!take_token()) { /* the caller was first: it goes on, and ends this process now */
            cpr_syscall3(SYS_poll, ready, 1, -1);
            cpr_syscall1(SYS_exit_group, 0);
        }
        kill_new_image();
        go_back(CPR_GUARD_KILLED);
    }
    return !(ready[0].revents & POLLIN);
}

/* Waits until the new image has the token, ends, speaks, or is past its deadline. */
CPR_IN_CHILD static int watch(void)
{
    struct cpr_guard *guard = self.guard;
    struct pollfd ready[3] = {
        {.fd = guard->pid_fd, .events = POLLIN},
        {.fd = guard->token_fd, .events = POLLOUT},
        {.fd = guard->socket_fd, .events = POLLIN},
    };
    uint64_t before = cpr_monotonic_ns(), used_ns = 0, taken_ns = 0, signalled_ns = 0;
    int32_t taker = 0;

    for (;;) {
        uint64_t now;

        cpr_syscall3(SYS_poll, ready, 3, TICK_MS);
        now = cpr_monotonic_ns();
        if (ready[1].revents & POLLOUT) {
            committed();
        }
        if (taker && taker != guard->old_pid && !cpr_guard_has_taken(guard, taker)) {
            taker = 0; /* one that a script has started, and that could not load the guest */
        }
        if (ready[0].fd < 0 || ready[0].revents & POLLIN) {
            if (!taker && (taker = cpr_guard_taker(guard))) {
                taken_ns = now;
            }
            if (!taker || taker == guard->old_pid) {
                return CPR_GUARD_DIED;
            }
            ready[0].fd = -1; /* the script has ended, and not the one that has the guest */
        }
        if (ready[2].revents & POLLIN) {
            return CPR_GUARD_MESSAGE;
        }
        if (!__atomic_load_n(&guard->page->hold, __ATOMIC_SEQ_CST)) {
            used_ns += now - before;
        }
        before = now;
        if (!taker && (taker = cpr_guard_taker(guard))) {
            taken_ns = now;
        }
        if (taker) { /* there is no other sign: what lives on has the guest */
            guard->consumed = taker == guard->old_pid;
            if (now - taken_ns > GRACE_NS) {
                if (cpr_guard_has_taken(guard, taker)) {
                    committed();
                }
                taker = 0; /* it was about to close all that it had been given, and lives on */
                guard->consumed = 0;
            }
            continue;
        }
        signalled_ns = !cpr_guard_ending_signals(guard) ? 0 : signalled_ns ? signalled_ns : now;
        if (signalled_ns && now - signalled_ns > PATIENCE_NS) {
            return CPR_GUARD_KILLED;
        }
        if (guard->timeout_ns && used_ns > guard->timeout_ns) {
            if (guard->state_fd >= 0 && cpr_guard_is_closed_to(guard->old_pid)) {
                committed(); /* another user's by now: nobody knows, and it may well have the guest */
            }
            return CPR_GUARD_KILLED;
        }
    }
}

CPR_IN_CHILD static int run_guard(void *argument)
{
    int executed, outcome;

    (void)argument;
    if (self.guard->cpus) { /* what keeps it where it is waits longer, and no more */
        cpr_syscall3(SYS_sched_setaffinity, 0, self.guard->cpus_size, self.guard->cpus);
    }
    executed = wait_for_exec();
    if (executed) {
        cpr_guard_offer(self.guard->old_pid, self.guard->page->oom_score_adj);
    }
    if (self.guard->early) {
        if (executed) {
            go_back(CPR_GUARD_EARLY);
        }
    } else { /* also where a program ended at once: its exec has closed them, as far as one knows */
        for (uint32_t i = 0; i < self.guard->drop_count; i++) {
            cpr_syscall1(SYS_close, self.guard->drop[i]);
        }
        self.guard->dropped = 1;
    }
    outcome = executed ? watch() : CPR_GUARD_DIED;
    if (outcome == CPR_GUARD_MESSAGE) {
        go_back(outcome);
    }
    if (outcome == CPR_GUARD_DIED) {
        cpr_guard_ending_signals(self.guard);
    }
    if (!take_token()) {
        committed();
    }
    if (outcome == CPR_GUARD_KILLED) {
        kill_new_image();
    }
    go_back(outcome);
    return 0;
}

/* ---- in the process that calls ---- */

static void set_cloexec(int on)
{
    for (uint32_t i = 0; i < self.guard->keep_count; i++) {
        fcntl(self.guard->keep[i], F_SETFD, on ? FD_CLOEXEC : 0);
    }
}

static void stop_guard(void)
{
    uint32_t alive;

    kill(self.pid, SIGKILL);
    while ((alive = __atomic_load_n(&self.alive, __ATOMIC_SEQ_CST)) != 0) {
        syscall(SYS_futex, &self.alive, FUTEX_WAIT, alive, NULL, NULL, 0);
    }
    cpr_guard_reap(self.pid);
}

/* One of `unblock` that waits, or comes now, ends the process by its default action, which the guard
   sees: a handler would run in a program that is gone a moment later. */
static void set_default(struct sigaction *old, int on)
{
    struct sigaction none = {.sa_handler = SIG_DFL};

    for (int number = 1; number <= SIGNALS; number++) {
        if (self.guard->unblock >> (number - 1) & 1) {
            sigaction(number, on ? &none : &old[number], on ? &old[number] : NULL);
        }
    }
}

static void take_tid_address(void)
{
    syscall(SYS_set_tid_address, self.tid_address);
    syscall(SYS_set_robust_list, self.robust_list, self.robust_size);
}

/* Makes the guard and execs. Comes back, with -errno, only where there is no exec. */
__attribute__((noinline)) static long attempt(void)
{
    static struct sigaction actions[SIGNALS + 1];
    static int nobodys_tid;
    uint64_t mask = self.guard->mask;
    char guard_pid_text[NOTIFY_SIZE];
    long error;

    self.alive = 1;
    self.pid = clone(run_guard, self.stack + STACK_SIZE,
                     CLONE_VM | CLONE_CHILD_CLEARTID | (self.guard->sibling ? CLONE_PARENT : 0), NULL,
                     NULL, NULL, &self.alive);
    if (self.pid < 0) {
        return -errno;
    }
    self.guard->page->guard_pid = (uint32_t)self.pid;
    snprintf(guard_pid_text, sizeof(guard_pid_text), "MAINPID=%d", self.pid);
    /* The new image may end at once, and is not to end the service. */
    tell(guard_pid_text, self.guard->early ? NOTIFY_MS : STOPPED_MS);
    set_cloexec(0); /* not earlier: nothing else that is started may inherit them */
    set_default(actions, 1);
    cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &mask, 0, KERNEL_SIGSET_SIZE, 0);
    /* It may end in an exec that hangs, when the guard has gone on in this memory for long. */
    syscall(SYS_set_tid_address, &nobodys_tid);
    syscall(SYS_set_robust_list, NULL, self.robust_size);
    execve(self.guard->path, self.guard->argv, self.guard->envp);
    error = -errno;
    take_tid_address();
    cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &self.mask, 0, KERNEL_SIGSET_SIZE, 0);
    set_default(actions, 0);
    if (!take_token()) {
        for (;;) {
            pause(); /* the guard was first: it ends this process, and goes on in its place */
        }
    }
    set_cloexec(1);
    if (self.guard->sibling) {
        /* The main process is not to be seen to end. */
        tell(self.own_pid_text, self.guard->early ? NOTIFY_MS : STOPPED_MS);
    }
    stop_guard();
    put_token_back();
    return error;
}

static int remember(void)
{
    if (self.stack == NULL) {
        char *base =
            mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (base == MAP_FAILED) {
            return -errno;
        }
        mprotect(base, PROTECTED, PROT_NONE);
        self.stack = base;
    }
    self.tid_address = cpr_tid_address();
    if (self.tid_address == NULL) {
        return -errno;
    }
    self.guard->pid_fd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (self.guard->pid_fd < 0) {
        return -errno;
    }
    if (pipe2(self.exec_pipe, O_CLOEXEC) < 0) {
        close(self.guard->pid_fd);
        return -errno;
    }
    self.guard->old_pid = getpid();
    snprintf(self.own_pid_text, sizeof(self.own_pid_text), "MAINPID=%d\nREADY=1", getpid());
    self.guard->consumed = self.guard->dropped = self.lives = 0;
    self.guard->signalled = 0;
    if (self.guard->state_fd >= 0) {
        cpr_guard_note_children();
    }
    sigaltstack(NULL, &self.altstack);
    for (int i = 0; i < TIMERS; i++) {
        getitimer(i, &self.timers[i]);
    }
    prctl(PR_GET_PDEATHSIG, &self.death_signal);
    prctl(PR_GET_CHILD_SUBREAPER, &self.subreaper);
    syscall(SYS_get_robust_list, 0, &self.robust_list, &self.robust_size);
    return 0;
}

void cpr_guard_adopted(void)
{
    prctl(PR_SET_PDEATHSIG, self.death_signal);
}

/* Puts right what clone(CLONE_VM) does not inherit and what the exec has changed in this memory. */
static void mend(void)
{
    *self.tid_address = (int)syscall(SYS_gettid);
    take_tid_address();
    if (__rseq_size) {
        syscall(SYS_rseq, (char *)__builtin_thread_pointer() + __rseq_offset,
                __rseq_size < sizeof(struct rseq) ? sizeof(struct rseq) : __rseq_size, 0, RSEQ_SIG);
    }
    sigaltstack(&self.altstack, NULL);
    for (int i = 0; i < TIMERS; i++) {
        setitimer(i, &self.timers[i], NULL);
    }
    prctl(PR_SET_CHILD_SUBREAPER, self.subreaper);
    if (self.outcome == CPR_GUARD_DIED || (self.outcome == CPR_GUARD_KILLED && !self.lives)) {
        cpr_guard_adopted();
    }
}

/* 0 in the old image that goes on in a new process; -errno where nothing has happened. */
__attribute__((noinline)) static long transact(void)
{
    if (__builtin_setjmp(self.context)) {
        mend();
        return 0;
    }
    return attempt();
}

int cpr_guard_exec(struct cpr_guard *guard)
{
    PyGILState_STATE gil = PyGILState_Ensure(); /* cffi has released it */
    uint64_t all = ~0ull;
    long result;

    self.guard = guard;
    result = remember();
    if (result < 0) {
        PyGILState_Release(gil);
        return (int)result;
    }
    PyOS_BeforeFork();
    cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &all, &self.mask, KERNEL_SIGSET_SIZE, 0);
    result = transact();
    if (result < 0) {
        cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &self.mask, 0, KERNEL_SIGSET_SIZE, 0);
        PyOS_AfterFork_Parent();
        close(self.exec_pipe[0]);
        close(self.exec_pipe[1]);
        close(guard->pid_fd);
    } else {
        result = self.outcome;
        PyOS_AfterFork_Child();
        cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &self.mask, 0, KERNEL_SIGSET_SIZE, 0);
    }
    PyGILState_Release(gil);
    return (int)result;
}

int cpr_guard_reap(int pid)
{
    while (waitpid(pid, NULL, __WALL) < 0) {
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}
