/* The threads of an overlap's child that run the vCPUs, and the reading of their state. */
#include <errno.h>
#include <linux/kvm.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>

#include "kvm_run.h"
#include "overlap_child.h"

#define THREAD_FLAGS                                                                 \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | \
     CLONE_CHILD_CLEARTID)

_Static_assert(sizeof(((struct cpr_overlap *)0)->runs) == CPR_VM_VCPUS * sizeof(void *), "vcpus");

/* One vCPU's thread. */
struct vcpu {
    struct cpr_overlap *overlap;
    struct cpr_vm_exit *exit;
    uint32_t index;
    uint8_t *data; /* of the access that it is held at, in kvm_run */
};

static struct vcpu vcpus[CPR_VM_VCPUS];

/* SIGUSR1 in a vCPU's thread: KVM_RUN, also one that it has not entered yet, comes back. */
CPR_IN_CHILD void cpr_overlap_on_kick(int signo)
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

CPR_IN_CHILD static void copy(uint8_t *to, const uint8_t *from, uint64_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

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

CPR_IN_CHILD void cpr_overlap_run_on(struct cpr_overlap *overlap)
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

CPR_IN_CHILD static void set_place(struct vcpu *vcpu, uint32_t place)
{
    store(&vcpu->exit->place, place);
    progress(vcpu->overlap->image);
    settle(vcpu->overlap);
}

/* Puts an exit into the image; true for an access, which a device serves. */
CPR_IN_CHILD static int record(struct vcpu *vcpu, struct kvm_run *run)
{
    struct cpr_vm_exit *exit = vcpu->exit;
    struct cpr_exit found;

    cpr_kvm_describe_exit(run, &found);
    exit->reason = found.reason;
    exit->suberror = found.suberror;
    exit->hardware = found.hardware;
    exit->is_write = found.is_write;
    exit->size = found.size;
    exit->port = found.port;
    exit->count = found.count;
    exit->address = found.address;
    vcpu->data = found.data;
    if (found.data == NULL) {
        return 0;
    }
    copy(exit->data, found.data, (uint64_t)found.size * found.count);
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
        copy(vcpu->data, exit->data, (uint64_t)exit->size * exit->count);
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

CPR_IN_CHILD void cpr_overlap_stop_vcpus(struct cpr_overlap *overlap)
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

CPR_IN_CHILD int cpr_overlap_start_vcpus(struct cpr_overlap *overlap)
{
    for (uint32_t i = 0; i < overlap->image->vcpus; i++) {
        struct cpr_vm_exit *exit = exit_of(overlap->image, i);

        vcpus[i] = (struct vcpu){.overlap = overlap, .exit = exit, .index = i};
        overlap->threads[i] = 1; /* cleared when it has ended */
        exit->thread = clone(vcpu_thread, cpr_overlap_stack(overlap, i + 1), THREAD_FLAGS,
                             &vcpus[i], NULL, NULL, &overlap->threads[i]);
        if (exit->thread < 0) {
            return -EAGAIN;
        }
    }
    return 0;
}

CPR_IN_CHILD void cpr_overlap_end_vcpus(struct cpr_overlap *overlap)
{
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
}
