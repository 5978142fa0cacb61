#ifndef CPR_OVERLAP_H
#define CPR_OVERLAP_H

#include "mm_holder.h"
#include "vm_image.h"

struct kvm_run;

/* What the child of an overlap works with. It lies in the old image's memory, which the child
   shares, and stays as it is until the child has ended. */
struct cpr_overlap {
    struct cpr_vm_image *image;
    int32_t vm_fd;
    int32_t process_fd;     /* a pidfd of the process that is to take the guest over */
    const int32_t *kept;    /* the descriptors that the child keeps, ascending */
    uint32_t kept_count;
    uint32_t inherited_count;
    const int32_t *inherited; /* those of them that a VMM started by the child gets */
    char *const *arguments; /* that VMM's, the first being its path */
    char *const *environment;
    const struct cpr_mapping *mappings; /* of guest RAM */
    uint32_t mapping_count;
    const void *own_cpus;   /* a cpu_set_t for the child, or NULL for any */
    const void *vcpu_cpus;  /* the same for the vCPUs' threads */
    uint32_t disconnected;  /* the irqfds are not the VM's now */
    int32_t pid;
    int32_t threads[255];   /* futexes, 0 when the thread of that vCPU has ended */
    int32_t vcpu_fds[255];
    struct kvm_run *runs[255];
    char *stacks;
};

/* Starts the child, which shares this address space and so may run this VM's vCPUs. Each vCPU waits
   until it is handed over by cpr_kvm_run; see cpr_kvm_hand_over. The child answers the requests in the
   image; where the process dies before another has the guest, it runs the guest on and starts
   `arguments`. Returns its PID, to be reaped with cpr_mm_holder_reap, or -errno. */
int cpr_overlap_start(struct cpr_overlap *overlap);

/* Makes a request; returns 0 or -errno. */
int cpr_overlap_ask(struct cpr_vm_image *image, uint32_t request);

/* Has the child stop the guest and read its state. */
void cpr_overlap_capture(struct cpr_vm_image *image);

/* Waits until the child has done that, writes the state to the VM, and sets the word of each vCPU in
   `go` to what it is to do. For the thread of vCPU 0: it goes on at once, on the CPU that the child's
   vCPU has just left. image->taken tells how it went: READY, or FAILED with image->error, and then
   the guest may run on in the child. */
struct cpr_vm;
void cpr_overlap_take(struct cpr_vm_image *image, const struct cpr_vm *vm, uint32_t *go);

/* Waits until vCPUs are held, or the guest has been taken over or not, but at most `timeout_ms`;
   returns HELD, READY or FAILED, or CPR_ANSWER_NONE where there is none of them yet. */
uint32_t cpr_overlap_wait(struct cpr_vm_image *image, uint32_t timeout_ms);

/* Tells the child that a held exit has been served. */
void cpr_overlap_serve(struct cpr_vm_image *image, uint32_t vcpu);

#endif
