/* What a guard learns of its new image from /proc; raw system calls, as the guard makes them. */
#ifndef CPR_GUARD_PROC_H
#define CPR_GUARD_PROC_H
#include "guard.h"

/* Whether a program that knows no token has the guest, as far as one can see: it has closed the CPR
   state that its predecessor gave it. Where it has started others, as a shell does, one of those may
   have done so that still has `kept_fd`. */
int cpr_guard_has_consumed(const struct cpr_guard *guard);

/* Whether one of the signals `guard->ending` waits for the new image. */
int cpr_guard_has_ending_signal(const struct cpr_guard *guard);

#endif
