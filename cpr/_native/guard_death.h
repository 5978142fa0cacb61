#ifndef CPR_GUARD_DEATH_H
#define CPR_GUARD_DEATH_H
#include <stdint.h>

/* Who ends first: the new image, by the guard or where memory runs out. */

/* Kills the new image, and waits for that, but not for ever: in the kernel, at a file system that does
   not answer, it may stay. It never runs its program again. Returns 1 when it has ended,
   0 where it is there still, -errno where it cannot be killed. */
int cpr_guard_kill(int pid_fd);

/* Where memory runs out the kernel ends that process first (proc_pid_oom_score_adj(5)), until
   cpr_guard_withdraw: not the old image, which has most of the memory in use. Where it cannot be,
   nothing happens; and not with the first process of a PID namespace, with which all others end.
   `before` becomes what it had, for those that it starts, which have the same. */
void cpr_guard_offer(int32_t pid, char before[8]);

/* The process that was offered has what it had before. May be called again, where no descriptor was
   left. */
void cpr_guard_withdraw(void);

#endif
