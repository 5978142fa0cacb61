#ifndef CPR_KVM_STATE_H
#define CPR_KVM_STATE_H
#include <linux/kvm.h>
#include <stdint.h>

/* One ioctl of a list; result is what it returned, or -errno. */
struct cpr_ioctl {
    int fd;
    int result;
    unsigned long request;
    void *argument;
};

/* A vCPU's state as KVM gives and takes it, but for its MSRs, which come after it. */
struct cpr_kvm_vcpu {
    uint64_t tsc;
    uint64_t tsc_khz;
    struct kvm_mp_state mp_state;
    struct kvm_vcpu_events events;
    struct kvm_lapic_state lapic;
    struct kvm_debugregs debug;
    struct kvm_xcrs xcr0;
    struct kvm_sregs2 sregs;
    struct kvm_regs regs;
    struct kvm_xsave xsave;
};

/* What all the vCPUs share: the paravirtual clock in ns, and the chips.  The times of the PIT are
   relative to when the VM was stopped. */
struct cpr_kvm_vm {
    uint64_t clock;
    struct kvm_pit_state2 pit;
    struct kvm_irqchip chips[3];
};

/* Calls them in their order, up to the first that fails; returns how many have gone well. */
unsigned cpr_ioctls(struct cpr_ioctl *calls, unsigned count);
/* Copies those of `count` entries whose data is not that of known[] to changed[], and sets its nmsrs.
   Returns 0, or -EINVAL where known[] has other indices. */
int cpr_changed_msrs(const struct kvm_msrs *msrs, const struct kvm_msrs *known, unsigned count,
                     struct kvm_msrs *changed);

#endif
