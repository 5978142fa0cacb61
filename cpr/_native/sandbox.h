#ifndef CPR_SANDBOX_H
#define CPR_SANDBOX_H
#include <stdint.h>

/* Seccomp filters for all threads, inherited over exec; they cannot be undone. They imply
   no_new_privs. Each returns 0 or -errno. */

/* System calls that no VMM needs kill the process: reboot, swapon, _sysctl and the like. */
int cpr_sandbox_obsolete(void);
/* fork, vfork, clone of a process, execve and execveat answer EPERM. */
int cpr_sandbox_spawn(void);
/* setuid and its relatives answer EPERM. */
int cpr_sandbox_elevate(void);
/* setpriority, sched_set* and the like answer EPERM. */
int cpr_sandbox_resourcecontrol(void);

#endif
