/* A VM's state in one go: a list of ioctls costs one call from Python. */
#include "kvm_state.h"

#include <errno.h>
#include <sys/ioctl.h>

unsigned cpr_ioctls(struct cpr_ioctl *calls, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct cpr_ioctl *call = &calls[i];

        call->result = ioctl(call->fd, call->request, call->argument);
        if (call->result < 0) {
            call->result = -errno;
            return i;
        }
    }
    return count;
}

int cpr_changed_msrs(const struct kvm_msrs *msrs, const struct kvm_msrs *known, unsigned count,
                     struct kvm_msrs *changed)
{
    changed->nmsrs = 0;
    for (unsigned i = 0; i < count; i++) {
        if (msrs->entries[i].index != known->entries[i].index)
            return -EINVAL;
        if (msrs->entries[i].data != known->entries[i].data)
            changed->entries[changed->nmsrs++] = msrs->entries[i];
    }
    return 0;
}
