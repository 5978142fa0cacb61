#ifndef CPR_OVERLAP_H
#define CPR_OVERLAP_H

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
    uint32_t stopping;
    uint32_t disconnected;  /* the irqfds are not the VM's now */
    int32_t pid;
    int32_t threads[255];
    int32_t vcpu_fds[255];
    struct kvm_run *runs[255];
    char *stacks;
};

/* Starts the child, which shares this address space and so may run this VM's vCPUs. Each vCPU waits
   until it is handed over by cpr_kvm_run; see `handed` there. The child answers the requests in the
   image; where the process dies before another has the guest, it runs the guest on and starts
   `arguments`. Returns its PID, to be reaped with cpr_mm_holder_reap, or -errno. */
int cpr_overlap_start(struct cpr_overlap *overlap);

/* Makes a request; returns 0 or -errno. */
int cpr_overlap_ask(struct cpr_vm_image *image, uint32_t request);

/* Waits until the child has answered, but at most `timeout_ms`; returns the answer, or
   CPR_ANSWER_NONE where there is none yet. */
uint32_t cpr_overlap_wait(struct cpr_vm_image *image, uint32_t timeout_ms);

/* Tells the child that a held exit has been served. */
void cpr_overlap_serve(struct cpr_vm_image *image, uint32_t vcpu);

#endif
