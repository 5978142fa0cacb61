#ifndef CPR_PIDFD_ABI_H
#define CPR_PIDFD_ABI_H
/* PIDFD_GET_INFO (linux/pidfd.h), for systems whose headers are older than Linux 6.15: the first
 * published size of struct pidfd_info, which every kernel that has the request takes. */
#include <linux/types.h>
#include <stddef.h>
#include <sys/ioctl.h>

struct cpr_pidfd_info {
    __u64 mask, cgroupid;
    __u32 pid, tgid, ppid;
    __u32 ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    __s32 exit_code; /* as wait(2) gives it, where the kernel has set CPR_PIDFD_INFO_EXIT in mask */
};

enum { CPR_PIDFD_INFO_EXIT = 1 << 3 };
#define CPR_PIDFD_GET_INFO _IOWR(0xFF, 11, struct cpr_pidfd_info)

_Static_assert(sizeof(struct cpr_pidfd_info) == 64, "PIDFD_INFO_SIZE_VER0");
#endif
