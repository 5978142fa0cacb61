#ifndef CPR_MM_HOLDER_H
#define CPR_MM_HOLDER_H

#include <stdint.h>

/* A mapping of the old image. */
struct cpr_mapping {
    uint64_t address;
    uint64_t size; /* bytes */
};

/* Unmaps what only the calling child still has, a piece at a time: where all of it goes at once, at
   the child's end, the kernel frees the page tables of all of it without a pause for others on that
   CPU, for 0.15 ms per GiB. Makes system calls only. */
void cpr_mm_forget(const struct cpr_mapping *mappings, uint32_t count);

/* Starts a child that shares this process's address space and nothing else, so that a later exec
   does not tear it down: the child does that when it ends, behind the new image's start. It ends a
   little after the exec has closed *release_fd (close-on-exec, the caller's), or by
   cpr_mm_holder_release. It keeps no other descriptor. `mappings`, of guest RAM, are the caller's and
   stay as they are until the child has ended. Returns its PID, or -errno. */
int cpr_mm_holder_start(const struct cpr_mapping *mappings, uint32_t count, int *release_fd);

/* Ends a holder for whom there is no exec, closes its release_fd, and reaps it. Returns 0 or -errno. */
int cpr_mm_holder_release(int pid, int release_fd);

/* Waits for a holder to end and reaps it; also one that the image before the exec started.
   Returns 0, or -ECHILD where there is no such child. */
int cpr_mm_holder_reap(int pid);

#endif
