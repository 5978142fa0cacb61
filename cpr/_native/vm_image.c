/* The state of a VM in KVM, read and written by a table of ioctls. */
#include "vm_image.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>

#include "raw_syscall.h"

/* The header's arrays have their lengths as numbers, for cffi. */
_Static_assert(sizeof(((struct cpr_vm_exit *)0)->data) == CPR_VM_EXIT_DATA, "exit data");
_Static_assert(sizeof(((struct cpr_vm_image *)0)->refusal) == CPR_VM_TEXT, "text");
_Static_assert(sizeof(((struct cpr_vm_image *)0)->blocks) ==
                   CPR_VM_BLOCKS * sizeof(struct cpr_vm_block),
               "blocks");
_Static_assert(sizeof(((struct cpr_vm_image *)0)->sections) ==
                   CPR_VM_SECTIONS * sizeof(struct cpr_vm_section),
               "sections");

CPR_IN_CHILD static long kvm_ioctl(int fd, uint64_t request, void *argument)
{
    return cpr_syscall3(SYS_ioctl, fd, request, argument);
}

/* KVM stops at an MSR that it refuses; those behind it are done by further calls, whose header
   takes the place of the refused entry's second half. */
CPR_IN_CHILD static long all_msrs(int fd, uint64_t request, struct kvm_msrs *msrs)
{
    uint32_t total = msrs->nmsrs;
    uint32_t done = 0;

    while (done < total) {
        struct kvm_msrs *part =
            (struct kvm_msrs *)((char *)&msrs->entries[done] - sizeof(struct kvm_msrs));
        struct kvm_msrs kept = {part->nmsrs, part->pad};
        long count;

        part->nmsrs = total - done;
        part->pad = 0;
        count = kvm_ioctl(fd, request, part);
        part->nmsrs = kept.nmsrs;
        part->pad = kept.pad;
        if (count < 0) {
            return count;
        }
        done += (uint32_t)count + 1;
    }
    return 0;
}

CPR_IN_CHILD static long one_step(struct cpr_vm_image *image, const struct cpr_vm_step *step,
                                  int fd, uint64_t request)
{
    char *at = (char *)image + step->offset;
    struct kvm_device_attr attr = {0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, (uint64_t)at};

    switch (step->kind) {
    case CPR_STEP_MSRS:
    case CPR_STEP_TSC:
        return all_msrs(fd, request, (struct kvm_msrs *)at);
    case CPR_STEP_TSC_OFFSET:
        return kvm_ioctl(fd, request, &attr);
    default:
        return kvm_ioctl(fd, request, at);
    }
}

CPR_IN_CHILD int cpr_vm_image_capture(struct cpr_vm_image *image, int vm_fd,
                                      const int32_t *vcpu_fds)
{
    const struct cpr_vm_step *steps =
        (const struct cpr_vm_step *)((char *)image + image->steps);

    image->failed_step = -1;
    for (uint32_t i = 0; i < image->step_count; i++) {
        int fd = steps[i].vcpu < 0 ? vm_fd : vcpu_fds[steps[i].vcpu];
        long error = steps[i].get ? one_step(image, &steps[i], fd, steps[i].get) : 0;

        if (error < 0) {
            image->failed_step = (int32_t)i;
            return (int)error;
        }
    }
    image->captured_ns = cpr_monotonic_ns();
    return 0;
}

/* Makes a struct that was read into one that can be written. */
static void prepare(struct cpr_vm_image *image, const struct cpr_vm_step *step)
{
    char *at = (char *)image + step->offset;

    if (step->kind == CPR_STEP_EVENTS) {
        ((struct kvm_vcpu_events *)at)->flags |=
            KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    } else if (step->kind == CPR_STEP_CLOCK) {
        struct kvm_clock_data *clock = (struct kvm_clock_data *)at;

        clock->flags = 0;
        if (image->mode == CPR_VM_OVERLAP) {
            clock->clock += cpr_monotonic_ns() - image->captured_ns;
        }
    } else if (step->kind == CPR_STEP_PIT && image->mode == CPR_VM_STOPPED) {
        struct kvm_pit_state2 *pit = (struct kvm_pit_state2 *)at;

        for (uint32_t i = 0; i < sizeof(pit->channels) / sizeof(pit->channels[0]); i++) {
            pit->channels[i].count_load_time += (int64_t)(cpr_monotonic_ns() - image->captured_ns);
        }
    }
}

int cpr_vm_image_restore(struct cpr_vm_image *image, int vm_fd, const int32_t *vcpu_fds)
{
    const struct cpr_vm_step *steps =
        (const struct cpr_vm_step *)((char *)image + image->steps);

    image->failed_step = -1;
    for (uint32_t i = 0; i < image->step_count; i++) {
        const struct cpr_vm_step *step = &steps[i];
        int fd = step->vcpu < 0 ? vm_fd : vcpu_fds[step->vcpu];
        uint32_t unused_tsc =
            image->mode == CPR_VM_OVERLAP ? CPR_STEP_TSC : CPR_STEP_TSC_OFFSET;
        long error;

        if (!step->set || step->kind == unused_tsc) {
            continue;
        }
        prepare(image, step);
        error = one_step(image, step, fd, step->set);
        if (error < 0) {
            image->failed_step = (int32_t)i;
            return (int)error;
        }
    }
    return 0;
}
