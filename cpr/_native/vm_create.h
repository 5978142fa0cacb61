#ifndef CPR_VM_CREATE_H
#define CPR_VM_CREATE_H

#include "vm_image.h"

struct kvm_run;

/* A VM that was made from an image: all descriptors and mappings are the caller's. */
struct cpr_vm {
    int32_t device_fd;
    int32_t vm_fd;
    uint32_t vcpus;
    uint32_t blocks;
    uint64_t run_size;       /* bytes of each kvm_run area */
    const char *failed;      /* the call that failed */
    uint64_t hosts[16];      /* where each block is mapped */
    uint64_t sizes[16];
    int32_t vcpu_fds[255];
    struct kvm_run *runs[255];
};

/* Maps the image's RAM and makes its VM: memslots, irqchip, PIT, vCPUs. Descriptors are
   close-on-exec. Returns 0, or -errno of vm->failed; then nothing is left. */
int cpr_vm_create(const struct cpr_vm_image *image, struct cpr_vm *vm);

/* The inverse. */
void cpr_vm_destroy(struct cpr_vm *vm);

#endif
