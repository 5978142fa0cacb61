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

/* Installs the empty SIGUSR1 handler that breaks KVM_RUN. Returns 0 or -errno. */
int cpr_kick_install(void);
/* Blocks every signal but SIGUSR1 in the calling thread, and returns its pthread_t. */
uint64_t cpr_vcpu_thread_enter(void);
/* Sends SIGUSR1 to a thread that cpr_vcpu_thread_enter named. */
int cpr_vcpu_thread_kick(uint64_t thread);

/* Sets immediate_exit, the flag with which KVM_RUN completes a pending access and returns. */
void cpr_kvm_set_immediate_exit(struct kvm_run *run, uint8_t value);
/* KVM_RUN until an exit needs userspace: 0 and *out; -EINTR when immediate_exit is set; or another
   -errno. */
int cpr_kvm_run(int vcpu_fd, struct kvm_run *run, struct cpr_exit *out);

#endif
