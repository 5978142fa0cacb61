/* The new image's side of an overlap: it has the child stop, and takes the guest over. */
#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "kvm_run.h"
#include "overlap_child.h"
#include "vm_create.h"

int cpr_overlap_ask(struct cpr_vm_image *image, uint32_t request)
{
    uint64_t one = 1;

    store(&image->answer, CPR_ANSWER_NONE);
    store(&image->request, request);
    return write(image->request_fd, &one, sizeof(one)) < 0 ? -errno : 0;
}

void cpr_overlap_capture(struct cpr_vm_image *image)
{
    store(&image->answer, CPR_ANSWER_NONE);
    store(&image->request, CPR_OVERLAP_CAPTURE);
    store(&image->stopping, 1);
    for (uint32_t i = 0; i < image->vcpus; i++) {
        syscall(SYS_tgkill, image->child, exit_of(image, i)->thread, SIGUSR1);
    }
}

void cpr_overlap_take(struct cpr_vm_image *image, const struct cpr_vm *vm, uint32_t *go)
{
    uint32_t outcome;

    while ((outcome = load(&image->answer)) == CPR_ANSWER_NONE || outcome == CPR_ANSWER_HELD) {
        futex_wait(&image->answer, outcome, -1);
    }
    if (outcome == CPR_ANSWER_READY) {
        image->error = cpr_vm_image_restore(image, vm->vm_fd, vm->vcpu_fds);
        outcome = image->error ? CPR_ANSWER_FAILED : CPR_ANSWER_READY;
    }
    if (outcome == CPR_ANSWER_READY) {
        store(&image->request, CPR_OVERLAP_COMMIT); /* from here on the guest is this process's */
        image->resumed_ns = cpr_monotonic_ns();
        for (uint32_t i = 0; i < image->vcpus; i++) {
            store(&go[i], exit_of(image, i)->pending ? CPR_GO_SERVE : CPR_GO_RUN);
            if (i) {
                futex_wake(&go[i]);
            }
        }
    } else {
        store(&go[0], CPR_GO_WAIT);
    }
    store(&image->taken, outcome);
    futex_wake(&image->answer);
}

uint32_t cpr_overlap_wait(struct cpr_vm_image *image, uint32_t timeout_ms)
{
    uint32_t taken = load(&image->taken);
    uint32_t value = load(&image->answer);

    if (taken == CPR_ANSWER_NONE && value != CPR_ANSWER_HELD) {
        futex_wait(&image->answer, value, timeout_ms * 1000000L);
        taken = load(&image->taken);
        value = load(&image->answer);
    }
    return taken != CPR_ANSWER_NONE ? taken : value == CPR_ANSWER_HELD ? value : CPR_ANSWER_NONE;
}

void cpr_overlap_serve(struct cpr_vm_image *image, uint32_t vcpu)
{
    struct cpr_vm_exit *exit = exit_of(image, vcpu);

    store(&image->answer, CPR_ANSWER_NONE);
    store(&exit->place, CPR_VCPU_SERVED);
    futex_wake(&exit->place);
    progress(image);
}
