#ifndef CPR_GUARD_H
#define CPR_GUARD_H
#include <stdint.h>

/* A range of memory that is the old image's own. */
struct cpr_mapping {
    uint64_t address, size;
};

/* Why cpr_guard_exec came back in the old image. */
enum cpr_guard_outcome {
    CPR_GUARD_EARLY = 1, /* the exec is done, and the new image starts: the caller has asked for that */
    CPR_GUARD_DIED,      /* the new image has ended; the token is the caller's */
    CPR_GUARD_KILLED,    /* it hung, and was killed; the token is the caller's */
    CPR_GUARD_MESSAGE,   /* it has sent something on `socket_fd`; nobody has the token yet */
};

/* What both images see besides the token: a page of a memfd. New fields come last. */
struct cpr_live_page {
    uint32_t version;    /* of this layout: CPR_LIVE_VERSION */
    uint32_t hold;       /* not 0: the new image waits for somebody, and the deadline does not run */
    uint32_t guard_pid;  /* the child of the new image that it reaps */
    uint32_t ended;      /* not 0: what is updated ends with the new image, before a commit */
    uint64_t began_ns;   /* CLOCK_MONOTONIC: the update was asked for, */
    uint64_t stopped_ns; /* what is updated stood still (0: it has not yet), */
    uint64_t exec_ns;    /* the exec began */
    /* What /proc/PID/oom_score_adj of the new image's process said before it was offered
       (guard_death.h), for a child of it that has taken over; empty: it was not. */
    char oom_score_adj[8];
};

/* The size of the page of release 0.1.0, of which all later ones can make use. */
enum { CPR_LIVE_VERSION = 1, CPR_LIVE_PAGE_FIRST = 40 };

/* One exec and its guard. All pointers and descriptors stay the caller's. */
struct cpr_guard {
    const char *path;
    void *argv, *envp;        /* as execve takes them */
    const int32_t *keep;      /* descriptors that go over the exec; close-on-exec but for that moment */
    uint32_t keep_count;
    const int32_t *drop;      /* what a late guard closes when the exec is done, as the exec does */
    uint32_t drop_count;
    int32_t token_fd;         /* an eventfd, non-blocking; its count is 2^64-2 until it is taken */
    int32_t socket_fd;        /* the old image's end of the hand-over's socket, or -1 */
    int32_t notify_fd;        /* a socket to the service's manager, or -1: it is told the main PID */
    int32_t sibling;          /* the guard is a child of this process's parent, that manager */
    int32_t early;            /* come back as soon as the exec is done */
    const void *cpus;         /* on which the guard runs, as sched_setaffinity(2) takes them; or NULL */
    uint64_t cpus_size;
    uint64_t timeout_ns;      /* 0: there is no deadline */
    uint64_t mask;            /* the program's signal mask: bit n - 1 */
    uint64_t unblock;         /* signals that the caller blocks and the program is not to: bit n - 1 */
    /* Signals, bit n - 1, that end what is updated. A new image that has not taken such a one for a
       while hangs, and is killed as at its deadline. */
    uint64_t ending;
    struct cpr_live_page *page; /* while its `hold` is not 0 the deadline does not run */
    /* For a program that does not know of the token: the CPR state, which it closes when it has read
       it, and one of RAM that it keeps (or -1), each with what its link in /proc/PID/fd says. -1
       and NULL otherwise. */
    int32_t state_fd, kept_fd;
    const char *state_text, *kept_text;
    const struct cpr_mapping *mappings; /* what is given back piece by piece after a commit */
    uint32_t mapping_count;
    /* The answer, in the old image. */
    int32_t pid_fd;           /* of the process that the new image is or was in; the caller's */
    int32_t old_pid;          /* its PID */
    int32_t consumed;         /* it had closed the CPR state */
    int32_t dropped;          /* `drop` is closed */
    uint64_t signalled;       /* signals `ending`, bit n - 1, that it had not taken */
};

/* Executes `path` under this PID, with the old image in a guard: a process that shares this address
   space. The caller is the only thread of the process; it holds no lock that a guard may want.

   Returns -errno in the same process, where there is no exec: nothing has changed then. Returns an
   outcome in the guard, where the old image goes on. Does not return where the new image commits:
   the guard then closes all descriptors, frees the mappings and ends. */
int cpr_guard_exec(struct cpr_guard *guard);

/* What the guard does when the new image has committed: never comes back. For a caller that came
   back early. */
void cpr_guard_end(const struct cpr_mapping *mappings, uint32_t count);

/* The new image has ended, which the old one is a child of for so long: the signal that the old one
   gets at its parent's death (PR_SET_PDEATHSIG) is about whose child it is from now on. */
void cpr_guard_adopted(void);

/* Reaps a child that was cloned, and not forked, as a guard is. 0 or -errno. */
int cpr_guard_reap(int pid);

#endif
