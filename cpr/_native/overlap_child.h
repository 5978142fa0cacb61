#ifndef CPR_OVERLAP_CHILD_H
#define CPR_OVERLAP_CHILD_H

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>

#include "overlap.h"
#include "raw_syscall.h"

#define KERNEL_SIGSET_SIZE 8 /* _NSIG / 8: what system calls take for a sigset_t */

/* What the files of the overlap share; not for cffi. The words of an image are futexes of processes
   and threads that map it, and all go through these. */

CPR_IN_CHILD static inline uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

CPR_IN_CHILD static inline void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

CPR_IN_CHILD static inline long futex_wait(uint32_t *word, uint32_t value, long timeout_ns)
{
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};

    return cpr_syscall(SYS_futex, (long)word, FUTEX_WAIT, value,
                       timeout_ns < 0 ? 0 : (long)&timeout, 0, 0);
}

CPR_IN_CHILD static inline void futex_wake(uint32_t *word)
{
    cpr_syscall3(SYS_futex, word, FUTEX_WAKE, INT_MAX);
}

CPR_IN_CHILD static inline struct cpr_vm_exit *exit_of(struct cpr_vm_image *image, uint32_t vcpu)
{
    return (struct cpr_vm_exit *)((char *)image + image->exits) + vcpu;
}

CPR_IN_CHILD static inline void progress(struct cpr_vm_image *image)
{
    __atomic_fetch_add(&image->progress, 1, __ATOMIC_SEQ_CST);
    futex_wake(&image->progress);
}

/* The vCPUs' threads, which are in overlap_vcpu.c. */

/* Starts one for each vCPU, which waits until it is handed its vCPU. Returns 0 or -EAGAIN. */
int cpr_overlap_start_vcpus(struct cpr_overlap *overlap);

/* Stops the vCPUs; those that are held stay so. */
void cpr_overlap_stop_vcpus(struct cpr_overlap *overlap);

/* Lets the vCPUs that have stopped run on. */
void cpr_overlap_run_on(struct cpr_overlap *overlap);

/* Ends the threads, and waits for that; the vCPUs have stopped. */
void cpr_overlap_end_vcpus(struct cpr_overlap *overlap);

/* Breaks KVM_RUN; the handler of SIGUSR1. */
void cpr_overlap_on_kick(int signo);

/* The stack of the child (0), of one of its vCPUs' threads (1, 2, ...), or of the process that it
   starts (vCPUs + 1); the address of its end. */
char *cpr_overlap_stack(const struct cpr_overlap *overlap, uint32_t number);

#endif
