/* A VM whose vCPUs unicorn runs: one engine and one thread for each vCPU, one at a time. */
#ifndef CPR_TCG_VM_H
#define CPR_TCG_VM_H

#include <stdint.h>

#include "cpu.h"

struct cpr_tcg;
struct cpr_tcg_vcpu;

/* Why cpr_tcg_run came back. */
enum {
    CPR_TCG_KICKED,
    CPR_TCG_SHUTDOWN,  /* triple fault */
    CPR_TCG_EVENT,     /* an INIT or a SIPI is requested, and is the caller's to take */
    CPR_TCG_ERROR      /* cpr_tcg_problem() says what */
};

/* What is asked of a vCPU, as bits; each stays until it is served. */
enum {
    CPR_TCG_KICK = 1 << 0,
    CPR_TCG_INTERRUPT = 1 << 1, /* its InterruptSource may have an interrupt */
    CPR_TCG_INIT = 1 << 2,
    CPR_TCG_SIPI = 1 << 3,
    CPR_TCG_CODE = 1 << 4       /* another vCPU may have written code that this one has translated */
};

/* NULL when memory is short.  The vCPUs are freed before the VM. */
struct cpr_tcg *cpr_tcg_new(void);
void cpr_tcg_free(struct cpr_tcg *tcg);

/* Both only while no vCPU runs; -EINVAL for a range that overlaps another or is not of whole pages,
   or is not mapped; -ENOSPC when there are too many. */
int cpr_tcg_map_ram(struct cpr_tcg *tcg, uint64_t address, uint64_t size, uint64_t host,
                    int readonly);
int cpr_tcg_unmap_ram(struct cpr_tcg *tcg, uint64_t address, uint64_t size);

/* Has a guest's write of `size` bytes to `address` write the eventfd, which stays the caller's.
   From any thread.  0, -EEXIST, or -ENOSPC where there are too many; -ENOENT. */
int cpr_tcg_add_notify(struct cpr_tcg *tcg, uint64_t address, uint32_t size, int fd);
int cpr_tcg_remove_notify(struct cpr_tcg *tcg, uint64_t address, uint32_t size, int fd);

/* A device has written `size` bytes of RAM, which is mapped at `place`: the vCPUs forget what they
   have translated of it, before they run the block after the next.  `tcg` is a struct cpr_tcg.
   From any thread, before the guest can know of the writing. */
void cpr_tcg_written(void *tcg, const void *place, uint64_t size);

/* The TSC counts ns from `now_ns` on, and stands still from `now_ns` on; by CLOCK_MONOTONIC.  A new
   VM's stands still. */
void cpr_tcg_start_time(struct cpr_tcg *tcg, uint64_t now_ns);
void cpr_tcg_stop_time(struct cpr_tcg *tcg, uint64_t now_ns);

/* `handle` is passed to the functions below that Python defines.  NULL with *problem, in static
   storage, on failure. */
struct cpr_tcg_vcpu *cpr_tcg_vcpu_new(struct cpr_tcg *tcg, uint32_t index, void *handle,
                                      const char **problem);
void cpr_tcg_vcpu_free(struct cpr_tcg_vcpu *vcpu);

int cpr_tcg_run(struct cpr_tcg_vcpu *vcpu);
const char *cpr_tcg_problem(const struct cpr_tcg_vcpu *vcpu);
/* From any thread. */
void cpr_tcg_request(struct cpr_tcg_vcpu *vcpu, uint32_t requests);
/* Returns and clears those of `requests` that are asked for. */
uint32_t cpr_tcg_take_requests(struct cpr_tcg_vcpu *vcpu, uint32_t requests);

/* The rest only while the vCPU does not run. */
void cpr_tcg_get_state(struct cpr_tcg_vcpu *vcpu, struct cpr_tcg_state *state);
void cpr_tcg_set_state(struct cpr_tcg_vcpu *vcpu, const struct cpr_tcg_state *state);
uint64_t cpr_tcg_read_msr(struct cpr_tcg_vcpu *vcpu, uint32_t index);
void cpr_tcg_write_msr(struct cpr_tcg_vcpu *vcpu, uint32_t index, uint64_t value);

/* accel/tcg/vcpu.py defines these. */
#if 0 /* for cffi only, which does not see this line */
extern "Python+C" {
#endif
uint32_t cpr_tcg_io_read(void *handle, uint32_t port, uint32_t size);
void cpr_tcg_io_write(void *handle, uint32_t port, uint32_t size, uint32_t value);
uint64_t cpr_tcg_mmio_read(void *handle, uint64_t address, uint32_t size);
void cpr_tcg_mmio_write(void *handle, uint64_t address, uint32_t size, uint64_t value);
/* The vector of the interrupt to deliver, or -1. */
int cpr_tcg_take_interrupt(void *handle);
#if 0
}
#endif

#endif
