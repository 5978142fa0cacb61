/* The vCPU run loop: KVM_RUN until an exit needs Python. */
#include "kvm_run.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>

static void on_kick(int signo)
{
    (void)signo;
}

int cpr_kick_install(void)
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    action.sa_handler = on_kick;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGUSR1, &action, NULL) < 0 ? -errno : 0;
}

uint64_t cpr_vcpu_thread_enter(void)
{
    sigset_t blocked;

    sigfillset(&blocked);
    sigdelset(&blocked, SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    return (uint64_t)pthread_self();
}

int cpr_vcpu_thread_kick(uint64_t thread)
{
    return -pthread_kill((pthread_t)thread, SIGUSR1);
}

void cpr_kvm_set_immediate_exit(struct kvm_run *run, uint8_t value)
{
    __atomic_store_n(&run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

static void describe_exit(struct kvm_run *run, struct cpr_exit *out)
{
    *out = (struct cpr_exit){.reason = run->exit_reason};
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        out->is_write = run->io.direction == KVM_EXIT_IO_OUT;
        out->size = run->io.size;
        out->port = run->io.port;
        out->count = run->io.count;
        out->data = (uint8_t *)run + run->io.data_offset;
        break;
    case KVM_EXIT_MMIO:
        out->is_write = run->mmio.is_write;
        out->size = (uint8_t)run->mmio.len;
        out->count = 1;
        out->address = run->mmio.phys_addr;
        out->data = run->mmio.data;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        out->suberror = run->internal.suberror;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        out->hardware = run->fail_entry.hardware_entry_failure_reason;
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        out->suberror = run->system_event.type;
        break;
    default:
        break;
    }
}

int cpr_kvm_run(int vcpu_fd, struct kvm_run *run, struct cpr_exit *out)
{
    for (;;) {
        if (ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR) {
                if (__atomic_load_n(&run->immediate_exit, __ATOMIC_SEQ_CST)) {
                    return -EINTR;
                }
                continue;
            }
            if (errno == EAGAIN) { /* a vCPU that waits for SIPI was woken without one */
                continue;
            }
            return -errno;
        }
        if (run->exit_reason == KVM_EXIT_IRQ_WINDOW_OPEN || run->exit_reason == KVM_EXIT_INTR) {
            continue;
        }
        describe_exit(run, out);
        return 0;
    }
}
