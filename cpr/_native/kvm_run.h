#ifndef CPR_KVM_RUN_H
#define CPR_KVM_RUN_H
#include <stdint.h>

struct kvm_run;

/* One exit that userspace has to serve, copied out of the union in struct kvm_run. */
struct cpr_exit {
    uint32_t reason;    /* KVM_EXIT_* */
    uint32_t suberror;  /* KVM_EXIT_INTERNAL_ERROR: suberror; KVM_EXIT_SYSTEM_EVENT: type */
    uint64_t hardware;  /* KVM_EXIT_FAIL_ENTRY: hardware_entry_failure_reason */
    uint8_t is_write;
    uint8_t size;       /* bytes of one access */
    uint16_t port;
    uint32_t count;     /* accesses of a string instruction */
    uint64_t address;   /* guest-physical, for KVM_EXIT_MMIO */
    uint8_t *data;      /* count * size bytes inside kvm_run: read for a write, filled for a read */
};

/* Where a running vCPU is handed to when it is kicked: the place of it in an image (overlap.h), set
   by any thread; NULL for nowhere. */
struct cpr_vcpu_control {
    uint32_t *place;
};

/* Installs the empty SIGUSR1 handler that breaks KVM_RUN. Returns 0 or -errno. */
int cpr_kick_install(void);
/* Blocks every signal but SIGUSR1 in the calling thread, and returns its pthread_t. */
uint64_t cpr_vcpu_thread_enter(void);
/* Sends SIGUSR1 to a thread that cpr_vcpu_thread_enter named. */
int cpr_vcpu_thread_kick(uint64_t thread);

/* Sets immediate_exit, the flag with which KVM_RUN completes a pending access and returns. */
void cpr_kvm_set_immediate_exit(struct kvm_run *run, uint8_t value);
/* Copies the exit in kvm_run to *out; also in a child that shares this memory. */
void cpr_kvm_describe_exit(struct kvm_run *run, struct cpr_exit *out);

/* Arms the hand-over of a vCPU to `place`, or, with NULL, disarms it. */
void cpr_kvm_hand_over(struct cpr_vcpu_control *control, uint32_t *place);

/* When a vCPU of a VM that was just made begins to run; the word `go` is a futex. */
enum cpr_vcpu_go {
    CPR_GO_WAIT,
    CPR_GO_RUN,
    CPR_GO_SERVE, /* it does not run: *out is an exit that has to be served first */
    CPR_GO_TAKE,  /* it takes the guest over from an overlap's child, and then does what that says */
};

/* Waits until go[vcpu] is no longer CPR_GO_WAIT, and then does what it says, as cpr_kvm_run. */
struct cpr_vm_image;
struct cpr_vm;
int cpr_kvm_run_after(uint32_t *go, uint32_t vcpu, struct cpr_vm_image *image,
                      const struct cpr_vm *vm, struct cpr_exit *out,
                      struct cpr_vcpu_control *control);

/* Sets the words of `count` vCPUs to what each is to do, and wakes them. */
void cpr_kvm_go(uint32_t *go, const uint32_t *what, uint32_t count);

/* KVM_RUN until an exit needs userspace: 0 and *out; -EINTR when immediate_exit is set;
   -ECANCELED when the vCPU has been handed over, and is not to be touched; or another -errno. */
int cpr_kvm_run(int vcpu_fd, struct kvm_run *run, struct cpr_exit *out,
                struct cpr_vcpu_control *control);

#endif
