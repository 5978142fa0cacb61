#ifndef CPR_MM_HOLDER_H
#define CPR_MM_HOLDER_H

/* Starts a child that shares this process's address space and nothing else, so that a later exec
   does not tear it down: the child does that when it ends, beside the new image. It ends when the
   exec, or the caller, closes *release_fd (close-on-exec, the caller's). It keeps no other
   descriptor. Returns its PID, to be reaped with cpr_mm_holder_reap, or -errno. */
int cpr_mm_holder_start(int *release_fd);

/* Waits for a holder to end and reaps it; also one that the image before the exec started.
   Returns 0, or -ECHILD where there is no such child. */
int cpr_mm_holder_reap(int pid);

#endif
