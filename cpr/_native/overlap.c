/* The child that runs the guest while the VMM executes its new image. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "overlap_child.h"

#define STACK_SIZE 65536 /* a signal frame with all vector registers takes up to 12 KiB */
#define GUARD_SIZE 4096
#define MOST_RETURNS 3

CPR_IN_CHILD static void say(const char *text)
{
    uint64_t size = 0;

    while (text[size]) {
        size++;
    }
    cpr_syscall3(SYS_write, STDERR_FILENO, text, size);
}

CPR_IN_CHILD static int start_vmm(void *argument)
{
    struct cpr_overlap *overlap = argument;
    uint64_t none = 0;

    for (uint32_t i = 0; i < overlap->inherited_count; i++) {
        cpr_syscall3(SYS_fcntl, overlap->inherited[i], F_SETFD, 0);
    }
    cpr_syscall5(SYS_rt_sigprocmask, SIG_SETMASK, &none, 0, KERNEL_SIGSET_SIZE, 0);
    cpr_syscall3(SYS_execve, overlap->arguments[0], overlap->arguments, overlap->environment);
    cpr_syscall1(SYS_exit_group, 127);
    __builtin_unreachable();
}

CPR_IN_CHILD char *cpr_overlap_stack(const struct cpr_overlap *overlap, uint32_t number)
{
    return overlap->stacks + (number + 1) * STACK_SIZE;
}

/* Gives the guest, which runs on here, a VMM again: the old one, in a new process. */
CPR_IN_CHILD static void go_back(struct cpr_overlap *overlap)
{
    char *stack = cpr_overlap_stack(overlap, overlap->image->vcpus + 1);
    long pid;

    cpr_syscall1(SYS_close, overlap->process_fd);
    overlap->process_fd = -1; /* which poll passes over */
    if (overlap->image->returns++ >= MOST_RETURNS) {
        say("cpr-vmm: the guest runs on without a VMM: none could take it over\n");
        return;
    }
    store(&overlap->image->request, CPR_OVERLAP_RUN);
    store(&overlap->image->answer, CPR_ANSWER_NONE);
    cpr_overlap_run_on(overlap);
    pid = clone(start_vmm, stack, CLONE_VM | CLONE_VFORK, overlap);
    if (pid < 0) {
        say("cpr-vmm: the guest runs on without a VMM: no process could be started\n");
        return;
    }
    overlap->process_fd = (int32_t)cpr_syscall3(SYS_pidfd_open, pid, 0, 0);
}

/* Closes all descriptors but those that are kept. */
CPR_IN_CHILD static void close_others(const struct cpr_overlap *overlap)
{
    int32_t next = 0;

    for (uint32_t i = 0; i < overlap->kept_count; i++) {
        if (overlap->kept[i] > next) {
            cpr_syscall3(SYS_close_range, next, overlap->kept[i] - 1, 0);
        }
        next = overlap->kept[i] + 1;
    }
    cpr_syscall3(SYS_close_range, next, UINT_MAX, 0);
}

/* Ends the child. What it shared is torn down on this thread, behind everything else: not where the
   vCPUs' threads are, whose CPUs the guest has again by now. */
CPR_IN_CHILD static void end(struct cpr_overlap *overlap)
{
    struct sched_param none = {0};

    cpr_syscall3(SYS_sched_setscheduler, 0, SCHED_IDLE, &none);
    cpr_overlap_end_vcpus(overlap);
    cpr_mm_forget(overlap->mappings, overlap->mapping_count);
    cpr_syscall1(SYS_exit_group, 0);
}

CPR_IN_CHILD static void serve_request(struct cpr_overlap *overlap)
{
    uint64_t times;

    cpr_syscall3(SYS_read, overlap->image->request_fd, &times, sizeof(times));
    switch (load(&overlap->image->request)) {
    case CPR_OVERLAP_RUN:
        cpr_overlap_run_on(overlap);
        break;
    case CPR_OVERLAP_CANCEL:
        cpr_overlap_stop_vcpus(overlap);
        cpr_syscall1(SYS_exit_group, 0);
        break;
    case CPR_OVERLAP_COMMIT:
        end(overlap);
    }
}

CPR_IN_CHILD static int child(void *argument)
{
    struct cpr_overlap *overlap = argument;
    struct cpr_vm_image *image = overlap->image;

    close_others(overlap);
    if (overlap->own_cpus != NULL) {
        cpr_syscall3(SYS_sched_setaffinity, 0, sizeof(cpu_set_t), overlap->own_cpus);
    }
    overlap->pid = (int32_t)cpr_syscall1(SYS_getpid, 0);
    if (cpr_overlap_start_vcpus(overlap)) {
        cpr_syscall1(SYS_exit_group, 1);
    }
    for (;;) {
        struct pollfd ready[] = {
            {.fd = image->request_fd, .events = POLLIN},
            {.fd = overlap->process_fd, .events = POLLIN},
        };

        cpr_syscall3(SYS_poll, ready, 2, -1);
        if (ready[0].revents) {
            serve_request(overlap);
        } else if (ready[1].revents && load(&image->request) == CPR_OVERLAP_COMMIT) {
            cpr_syscall1(SYS_exit_group, 0);
        } else if (ready[1].revents) {
            go_back(overlap);
        }
    }
    return 0;
}

/* Stacks of the child, of its vCPUs and of the process that it starts: a guard page below each. */
static char *map_stacks(uint32_t count)
{
    char *stacks = mmap(NULL, count * STACK_SIZE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (stacks == MAP_FAILED) {
        return NULL;
    }
    for (uint32_t i = 0; i < count; i++) {
        mprotect(stacks + i * STACK_SIZE, GUARD_SIZE, PROT_NONE);
    }
    return stacks;
}

int cpr_overlap_start(struct cpr_overlap *overlap)
{
    struct sigaction kick = {.sa_handler = cpr_overlap_on_kick}, parents_kick;
    sigset_t all, old;
    int pid, error;

    overlap->stacks = map_stacks(overlap->image->vcpus + 2);
    if (overlap->stacks == NULL) {
        return -errno;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* the child inherits it and hears no signal */
    sigaction(SIGUSR1, &kick, &parents_kick); /* and this; to this process's vCPUs both are alike */
    pid = clone(child, cpr_overlap_stack(overlap, 0), CLONE_VM, overlap);
    error = errno;
    sigaction(SIGUSR1, &parents_kick, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return pid < 0 ? -error : pid;
}
