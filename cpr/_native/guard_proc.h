/* What a guard learns of its new image from /proc; raw system calls, as the guard makes them. */
#ifndef CPR_GUARD_PROC_H
#define CPR_GUARD_PROC_H
#include "guard.h"

/* A close-on-exec descriptor of `path`, in which each %d is one of the numbers in turn, none of them
   negative; or -errno. */
long cpr_guard_open(const char *path, const int32_t *numbers, int flags);

/* Whether the PIDs in /proc are those of the caller's PID namespace. */
int cpr_guard_knows_proc(void);

/* Notes the children of this process, and theirs: before the clone. None of them is started by the new
   program, whatever it has open. */
void cpr_guard_note_children(void);

/* The PID of who has the guest of a program that knows no token, as far as one can see, or 0: it has
   closed the CPR state that its predecessor gave it, and still has `kept_fd`, if there is one. Where
   the program has started others, as a script does, it may be one of those: also when the program
   has ended, of those that it had when it was last looked at. */
int32_t cpr_guard_taker(const struct cpr_guard *guard);

/* Whether that process still has it: also one that the program has left behind. */
int cpr_guard_has_taken(const struct cpr_guard *guard, int32_t pid);

/* Whether what the process has open cannot be seen: it is another user's. */
int cpr_guard_is_closed_to(int32_t pid);

/* The signals, bit n - 1, of `guard->ending` that wait for the new image; those seen last where it has
   ended. */
uint64_t cpr_guard_ending_signals(struct cpr_guard *guard);

#endif
