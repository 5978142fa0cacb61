/* The child that runs the guest while the VMM executes its new image. */
#include "overlap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvm_run.h"
#include "raw_syscall.h"
#include "vm_create.h"

#define STACK_SIZE 65536 /* a signal frame with all vector registers takes up to 12 KiB */
#define GUARD_SIZE 4096
#define THREAD_FLAGS                                                                 \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | \
     CLONE_CHILD_CLEARTID)
#define MOST_RETURNS 3
#define KERNEL_SIGSET_SIZE 8

_Static_assert(sizeof(((struct cpr_overlap *)0)->runs) == CPR_VM_VCPUS * sizeof(void *), "vcpus");

/* One vCPU's thread. */
struct vcpu {
    struct cpr_overlap *overlap;
    struct cpr_vm_exit *exit;
    uint32_t index;
};

static struct vcpu vcpus[CPR_VM_VCPUS];

/* SIGUSR1 in a vCPU's thread: KVM_RUN, also one that it has not entered yet, comes back. */
CPR_IN_CHILD static void on_kick(int signo)
{
    long thread = cpr_syscall1(SYS_gettid, 0);

    (void)signo;
    for (uint32_t i = 0; i < CPR_VM_VCPUS && vcpus[i].exit != NULL; i++) {
        if (vcpus[i].exit->thread == thread) {
            struct kvm_run *run = vcpus[i].overlap->runs[i];

            __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        }
    }
}

CPR_IN_CHILD static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

CPR_IN_CHILD static void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

CPR_IN_CHILD static long futex_wait(uint32_t *word, uint32_t value, long timeout_ns)
{
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};

    return cpr_syscall(SYS_futex, (long)word, FUTEX_WAIT, value,
                       timeout_ns < 0 ? 0 : (long)&timeout, 0, 0);
}

CPR_IN_CHILD static void futex_wake(uint32_t *word)
{
    cpr_syscall3(SYS_futex, word, FUTEX_WAKE, INT_MAX);
}

CPR_IN_CHILD static void copy(uint8_t *to, const uint8_t *from, uint64_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

CPR_IN_CHILD static struct cpr_vm_exit *exit_of(struct cpr_vm_image *image, uint32_t vcpu)
{
    return (struct cpr_vm_exit *)((char *)image + image->exits) + vcpu;
}

CPR_IN_CHILD static void progress(struct cpr_vm_image *image)
{
    __atomic_fetch_add(&image->progress, 1, __ATOMIC_SEQ_CST);
    futex_wake(&image->progress);
}

/* What both kinds of the child's threads do. */

/* How many vCPUs are at a place. */
CPR_IN_CHILD static uint32_t count(struct cpr_vm_image *image, uint32_t place)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < image->vcpus; i++) {
        found += load(&exit_of(image, i)->place) == place;
    }
    return found;
}

CPR_IN_CHILD static void answer(struct cpr_vm_image *image, uint32_t value)
{
    store(&image->answer, value);
    futex_wake(&image->answer);
}

/* Takes the irqfds from the VM, so that their eventfds count for the next one, or gives them back.
   Returns 0 or -errno of the first that fails. */
CPR_IN_CHILD static int connect_irqfds(struct cpr_overlap *overlap, int on)
{
    struct cpr_vm_image *image = overlap->image;
    const struct kvm_irqfd *irqfds =
        (const struct kvm_irqfd *)((char *)image + image->irqfds);
    int first = 0;

    for (uint32_t i = 0; i < image->irqfd_count && on == (int)overlap->disconnected; i++) {
        struct kvm_irqfd irqfd = irqfds[i];
        long error;

        irqfd.flags = on ? irqfd.flags : KVM_IRQFD_FLAG_DEASSIGN;
        error = cpr_syscall3(SYS_ioctl, overlap->vm_fd, KVM_IRQFD, &irqfd);
        if (error < 0 && !first) {
            first = (int)error;
        }
    }
    overlap->disconnected = !on;
    return first;
}

CPR_IN_CHILD static void run_on(struct cpr_overlap *overlap)
{
    connect_irqfds(overlap, 1);
    store(&overlap->image->capturing, 0);
    store(&overlap->image->stopping, 0);
    for (uint32_t i = 0; i < overlap->image->vcpus; i++) {
        struct cpr_vm_exit *exit = exit_of(overlap->image, i);

        if (load(&exit->place) == CPR_VCPU_STOPPED && !exit->pending) {
            store(&exit->place, CPR_VCPU_RUNS);
            futex_wake(&exit->place);
        }
    }
}

/* After a vCPU has come to another place: where all stand still, and that is what was asked for,
   the state is read, by whichever thread sees it first. */
CPR_IN_CHILD static void settle(struct cpr_overlap *overlap)
{
    struct cpr_vm_image *image = overlap->image;
    int error;

    if (load(&image->request) != CPR_OVERLAP_CAPTURE || !load(&image->stopping) ||
        count(image, CPR_VCPU_RUNS) ||
        count(image, CPR_VCPU_SERVED)) {
        return;
    }
    if (count(image, CPR_VCPU_HELD)) {
        answer(image, CPR_ANSWER_HELD);
        return;
    }
    if (__atomic_exchange_n(&image->capturing, 1, __ATOMIC_SEQ_CST)) {
        return;
    }
    error = connect_irqfds(overlap, 0);
    if (!error) {
        error = cpr_vm_image_capture(image, overlap->vm_fd, overlap->vcpu_fds);
    }
    image->error = error;
    answer(image, error ? CPR_ANSWER_FAILED : CPR_ANSWER_READY);
}

/* The vCPUs' threads. */

CPR_IN_CHILD static void set_place(struct vcpu *vcpu, uint32_t place)
{
    store(&vcpu->exit->place, place);
    progress(vcpu->overlap->image);
    settle(vcpu->overlap);
}

/* Copies an exit out of kvm_run; true for an access, which a device serves. */
CPR_IN_CHILD static int record(struct vcpu *vcpu, struct kvm_run *run)
{
    struct cpr_vm_exit *exit = vcpu->exit;
    const uint8_t *data;

    exit->reason = run->exit_reason;
    exit->suberror = 0;
    exit->hardware = 0;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        exit->is_write = run->io.direction == KVM_EXIT_IO_OUT;
        exit->size = run->io.size;
        exit->port = run->io.port;
        exit->count = run->io.count;
        data = (uint8_t *)run + run->io.data_offset;
        break;
    case KVM_EXIT_MMIO:
        exit->is_write = run->mmio.is_write;
        exit->size = (uint8_t)run->mmio.len;
        exit->count = 1;
        exit->address = run->mmio.phys_addr;
        data = run->mmio.data;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        exit->suberror = run->internal.suberror;
        return 0;
    case KVM_EXIT_SYSTEM_EVENT:
        exit->suberror = run->system_event.type;
        return 0;
    case KVM_EXIT_FAIL_ENTRY:
        exit->hardware = run->fail_entry.hardware_entry_failure_reason;
        return 0;
    default:
        return 0;
    }
    copy(exit->data, data, (uint64_t)exit->size * exit->count);
    return 1;
}

/* Holds a vCPU at an access until it is served, and puts the answer to a read in place. */
CPR_IN_CHILD static void hold(struct vcpu *vcpu, struct kvm_run *run)
{
    struct cpr_vm_exit *exit = vcpu->exit;

    set_place(vcpu, CPR_VCPU_HELD);
    while (load(&exit->place) == CPR_VCPU_HELD) {
        if (futex_wait(&exit->place, CPR_VCPU_HELD, -1) == -EINTR) {
            settle(vcpu->overlap);
        }
    }
    if (!exit->is_write) {
        uint8_t *to = exit->reason == KVM_EXIT_IO ? (uint8_t *)run + run->io.data_offset
                                                  : run->mmio.data;
        copy(to, exit->data, (uint64_t)exit->size * exit->count);
    }
    /* The access is complete, and the registers tell of it, only after KVM_RUN was entered again. */
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

CPR_IN_CHILD static void run_vcpu(struct vcpu *vcpu)
{
    struct cpr_overlap *overlap = vcpu->overlap;
    struct kvm_run *run = overlap->runs[vcpu->index];
    int fd = overlap->vcpu_fds[vcpu->index];

    for (;;) {
        long error = cpr_syscall3(SYS_ioctl, fd, KVM_RUN, 0);

        if (error == -EINTR || error == -EAGAIN) {
            /* Cleared before the look at `stopping`, which is set before this is set again. */
            __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
            if (load(&overlap->image->stopping)) {
                break;
            }
        } else if (error < 0 || (run->exit_reason != KVM_EXIT_INTR &&
                                 run->exit_reason != KVM_EXIT_IRQ_WINDOW_OPEN)) {
            vcpu->exit->error = (int32_t)error;
            if (error < 0 || !record(vcpu, run)) {
                vcpu->exit->pending = 1;
                break;
            }
            hold(vcpu, run);
        }
    }
    set_place(vcpu, CPR_VCPU_STOPPED);
}

CPR_IN_CHILD static int vcpu_thread(void *argument)
{
    struct vcpu *vcpu = argument;
    uint64_t kick = 1ull << (SIGUSR1 - 1);

    cpr_syscall5(SYS_rt_sigprocmask, SIG_UNBLOCK, &kick, 0, KERNEL_SIGSET_SIZE, 0);
    if (vcpu->overlap->vcpu_cpus != NULL) {
        cpr_syscall3(SYS_sched_setaffinity, 0, sizeof(cpu_set_t), vcpu->overlap->vcpu_cpus);
    }
    for (;;) {
        uint32_t place = load(&vcpu->exit->place);

        if (place == CPR_VCPU_RUNS) {
            run_vcpu(vcpu);
        } else if (place == CPR_VCPU_GONE) {
            cpr_syscall1(SYS_exit, 0);
        } else if (futex_wait(&vcpu->exit->place, place, -1) == -EINTR) {
            settle(vcpu->overlap);
        }
    }
    return 0;
}

/* The child's first thread. */

/* Stops the vCPUs; those that are held stay so. */
CPR_IN_CHILD static void stop(struct cpr_overlap *overlap)
{
    struct cpr_vm_image *image = overlap->image;

    store(&overlap->image->stopping, 1);
    for (uint32_t i = 0; i < image->vcpus; i++) {
        if (load(&exit_of(image, i)->place) == CPR_VCPU_RUNS) {
            cpr_syscall3(SYS_tgkill, overlap->pid, exit_of(image, i)->thread, SIGUSR1);
        }
    }
    for (;;) {
        uint32_t seen = load(&image->progress);

        if (!count(image, CPR_VCPU_RUNS)) {
            return;
        }
        futex_wait(&image->progress, seen, -1);
    }
}

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

/* Gives the guest, which runs on here, a VMM again: the old one, in a new process. */
CPR_IN_CHILD static void go_back(struct cpr_overlap *overlap)
{
    char *stack = overlap->stacks + (overlap->image->vcpus + 2) * STACK_SIZE;
    long pid;

    cpr_syscall1(SYS_close, overlap->process_fd);
    overlap->process_fd = -1; /* which poll passes over */
    if (overlap->image->returns++ >= MOST_RETURNS) {
        say("cpr-vmm: the guest runs on without a VMM: none could take it over\n");
        return;
    }
    store(&overlap->image->request, CPR_OVERLAP_RUN);
    store(&overlap->image->answer, CPR_ANSWER_NONE);
    run_on(overlap);
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
    for (uint32_t i = 0; i < overlap->image->vcpus; i++) {
        struct cpr_vm_exit *exit = exit_of(overlap->image, i);
        uint32_t *thread = (uint32_t *)&overlap->threads[i];
        uint32_t id;

        store(&exit->place, CPR_VCPU_GONE);
        futex_wake(&exit->place);
        while ((id = load(thread)) != 0) {
            futex_wait(thread, id, -1); /* the kernel clears it, and wakes */
        }
    }
    cpr_mm_forget(overlap->mappings, overlap->mapping_count);
    cpr_syscall1(SYS_exit_group, 0);
}

CPR_IN_CHILD static void serve_request(struct cpr_overlap *overlap)
{
    uint64_t times;

    cpr_syscall3(SYS_read, overlap->image->request_fd, &times, sizeof(times));
    switch (load(&overlap->image->request)) {
    case CPR_OVERLAP_RUN:
        run_on(overlap);
        break;
    case CPR_OVERLAP_CANCEL:
        stop(overlap);
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
    for (uint32_t i = 0; i < image->vcpus; i++) {
        vcpus[i] = (struct vcpu){overlap, exit_of(image, i), i};
        overlap->threads[i] = 1; /* cleared when it has ended */
        vcpus[i].exit->thread =
            clone(vcpu_thread, overlap->stacks + (i + 2) * STACK_SIZE, THREAD_FLAGS, &vcpus[i],
                  NULL, NULL, &overlap->threads[i]);
        if (vcpus[i].exit->thread < 0) {
            cpr_syscall1(SYS_exit_group, 1);
        }
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
    struct sigaction kick = {.sa_handler = on_kick}, parents_kick;
    sigset_t all, old;
    int pid, error;

    overlap->stacks = map_stacks(overlap->image->vcpus + 2);
    if (overlap->stacks == NULL) {
        return -errno;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* the child inherits it and hears no signal */
    sigaction(SIGUSR1, &kick, &parents_kick); /* and this; to this process's vCPUs both are alike */
    pid = clone(child, overlap->stacks + STACK_SIZE, CLONE_VM, overlap);
    error = errno;
    sigaction(SIGUSR1, &parents_kick, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return pid < 0 ? -error : pid;
}

int cpr_overlap_ask(struct cpr_vm_image *image, uint32_t request)
{
    uint64_t one = 1;

    store(&image->answer, CPR_ANSWER_NONE);
    store(&image->request, request);
    return write(image->request_fd, &one, sizeof(one)) < 0 ? -errno : 0;
}

void cpr_overlap_capture(struct cpr_vm_image *image)
{
    store(&image->answer, CPR_ANSWER_NONE);
    store(&image->request, CPR_OVERLAP_CAPTURE);
    store(&image->stopping, 1);
    for (uint32_t i = 0; i < image->vcpus; i++) {
        syscall(SYS_tgkill, image->child, exit_of(image, i)->thread, SIGUSR1);
    }
}

void cpr_overlap_take(struct cpr_vm_image *image, const struct cpr_vm *vm, uint32_t *go)
{
    uint32_t outcome;

    while ((outcome = load(&image->answer)) == CPR_ANSWER_NONE || outcome == CPR_ANSWER_HELD) {
        futex_wait(&image->answer, outcome, -1);
    }
    if (outcome == CPR_ANSWER_READY) {
        image->error = cpr_vm_image_restore(image, vm->vm_fd, vm->vcpu_fds);
        outcome = image->error ? CPR_ANSWER_FAILED : CPR_ANSWER_READY;
    }
    if (outcome == CPR_ANSWER_READY) {
        store(&image->request, CPR_OVERLAP_COMMIT); /* from here on the guest is this process's */
        image->resumed_ns = cpr_monotonic_ns();
        for (uint32_t i = 0; i < image->vcpus; i++) {
            store(&go[i], exit_of(image, i)->pending ? CPR_GO_SERVE : CPR_GO_RUN);
            if (i) {
                futex_wake(&go[i]);
            }
        }
    } else {
        store(&go[0], CPR_GO_WAIT);
    }
    store(&image->taken, outcome);
    futex_wake(&image->answer);
}

uint32_t cpr_overlap_wait(struct cpr_vm_image *image, uint32_t timeout_ms)
{
    uint32_t taken = load(&image->taken);
    uint32_t value = load(&image->answer);

    if (taken == CPR_ANSWER_NONE && value != CPR_ANSWER_HELD) {
        futex_wait(&image->answer, value, timeout_ms * 1000000L);
        taken = load(&image->taken);
        value = load(&image->answer);
    }
    return taken != CPR_ANSWER_NONE ? taken : value == CPR_ANSWER_HELD ? value : CPR_ANSWER_NONE;
}

void cpr_overlap_serve(struct cpr_vm_image *image, uint32_t vcpu)
{
    struct cpr_vm_exit *exit = exit_of(image, vcpu);

    store(&image->answer, CPR_ANSWER_NONE);
    store(&exit->place, CPR_VCPU_SERVED);
    futex_wake(&exit->place);
    progress(image);
}
