#ifndef CPR_VM_IMAGE_H
#define CPR_VM_IMAGE_H
#include <stdint.h>

/* A VM in a memfd, for the next image of the VMM: how it is laid out (blocks of RAM, memslots,
   vCPUs and their CPUID), and its state in KVM, as the kernel's own structs. All places are offsets
   from the beginning. An image with another `abi` is not read. */

enum {
    CPR_VM_ABI = 1,
    CPR_VM_BLOCKS = 16,
    CPR_VM_SECTIONS = 32,
    CPR_VM_VCPUS = 255,
    CPR_VM_IRQFDS = 2048,
    CPR_VM_EXIT_DATA = 4096,  /* a string instruction's data fills at most one page of kvm_run */
    CPR_VM_TEXT = 512,
};

/* What becomes of the guest between two images. */
enum cpr_vm_mode {
    CPR_VM_NONE,    /* nothing of it is here: the migration stream has all */
    CPR_VM_STOPPED, /* it stands still, and its state is here */
    CPR_VM_OVERLAP, /* it runs on in a child of the old image */
};

/* How a step's struct is read and written. */
enum cpr_vm_kind {
    CPR_STEP_PLAIN,
    CPR_STEP_MSRS,       /* a struct kvm_msrs; what KVM refuses is passed over */
    CPR_STEP_EVENTS,     /* a struct kvm_vcpu_events; all of it is meant when it is written */
    CPR_STEP_CLOCK,      /* a struct kvm_clock_data; in an overlap it has gone on since */
    CPR_STEP_PIT,        /* a struct kvm_pit_state2; its times go on where the guest stood still */
    CPR_STEP_TSC_OFFSET, /* a u64, the device attribute KVM_VCPU_TSC_OFFSET; only in an overlap */
    CPR_STEP_TSC,        /* a struct kvm_msrs of the TSC alone; only of a guest that stood still */
};

struct cpr_vm_block {
    int32_t fd; /* of the file that is mapped, shared, from its beginning */
    uint32_t unused;
    uint64_t size;
    uint64_t alignment; /* of the mapping */
};

struct cpr_vm_section {
    uint64_t address; /* guest-physical */
    uint64_t size;
    uint64_t offset; /* in the block */
    uint32_t block;
    uint32_t flags; /* KVM_MEM_* */
};

/* One struct of the kernel's: read by `get` and written by `set`, each 0 for not at all. Steps are
   done in their order, the first of a vCPU's being the one that takes in a pending INIT. */
struct cpr_vm_step {
    uint64_t get;
    uint64_t set;
    uint64_t offset;
    int32_t vcpu; /* -1: the VM itself */
    uint32_t kind;
};

/* Where a vCPU is; a futex. */
enum cpr_vcpu_place {
    CPR_VCPU_OUTSIDE,  /* not with the child, or not yet */
    CPR_VCPU_RUNS,     /* in the child */
    CPR_VCPU_HELD,     /* an exit needs a device: `exit` says what it is, and nobody has served it */
    CPR_VCPU_SERVED,   /* it has been served: the child completes the access */
    CPR_VCPU_STOPPED,  /* its state can be read */
    CPR_VCPU_GONE,     /* its thread is to end */
};

/* Where a vCPU is, and the exit that it is HELD at, or, where it STOPPED, one that is `pending`: it
   is for the new image to handle as if its own KVM_RUN had returned it. */
struct cpr_vm_exit {
    uint32_t place; /* enum cpr_vcpu_place, a futex */
    int32_t thread; /* that runs it in the child */
    uint32_t pending;
    int32_t error; /* what KVM_RUN returned: 0 or -errno */
    uint32_t reason;
    uint32_t suberror;
    uint64_t hardware;
    uint64_t address;
    uint32_t count;
    uint16_t port;
    uint8_t is_write;
    uint8_t size;
    uint8_t data[4096];
};

/* What the child is asked for, through `request`. */
enum cpr_overlap_request {
    CPR_OVERLAP_RUN,     /* let the guest run on */
    CPR_OVERLAP_CAPTURE, /* the vCPUs' threads are kicked: stop, and put the state here */
    CPR_OVERLAP_COMMIT,  /* another process has it: end */
    CPR_OVERLAP_CANCEL,  /* stop it where it is and end: the old image goes on with it */
};

/* How far the child is; a futex. */
enum cpr_overlap_answer {
    CPR_ANSWER_NONE,
    CPR_ANSWER_HELD,   /* some vCPUs are held: serve them and make them SERVED */
    CPR_ANSWER_READY,  /* the state is here */
    CPR_ANSWER_FAILED, /* it could not be read: `error`; the guest runs on */
};

struct cpr_vm_image {
    uint32_t abi;
    uint32_t mode;
    uint64_t size;          /* bytes of the image */
    uint64_t captured_ns;   /* CLOCK_MONOTONIC when the state was read */
    uint64_t stopped_ns;    /* when the devices' clock was read */
    uint64_t resumed_ns;    /* when the guest ran again; set by the new image */
    uint64_t slot_size;     /* the most that a memslot has, or 0 for no limit */
    uint64_t tss_address;
    uint64_t identity_address;
    uint64_t cpuid;         /* offset of vcpus * cpuid_size bytes, a struct kvm_cpuid2 each */
    uint64_t cpuid_size;
    uint64_t steps;         /* offset */
    uint64_t irqfds;        /* offset of struct kvm_irqfd, at most CPR_VM_IRQFDS */
    uint64_t exits;         /* offset of vcpus * struct cpr_vm_exit */
    uint64_t command;       /* offset and bytes of the words, each with its NUL, that go back */
    uint64_t command_size;
    uint64_t affinity;      /* offset of the CPUs that the VMM may use, a cpu_set_t */
    uint32_t step_count;
    uint32_t irqfd_count;
    uint32_t vcpus;
    uint32_t pit_flags;
    uint32_t block_count;
    uint32_t section_count;
    int32_t failed_step;    /* the step that failed last, or -1 */
    /* Overlap. */
    uint32_t request;       /* enum cpr_overlap_request */
    uint32_t answer;        /* enum cpr_overlap_answer, a futex */
    uint32_t taken;         /* the same, when the new image has done its part; a futex of it */
    uint32_t stopping;      /* vCPUs that leave KVM_RUN are to stop */
    uint32_t capturing;     /* one of the vCPUs' threads reads the state */
    uint32_t progress;      /* counts what vCPUs do; a futex of the child's */
    int32_t error;
    int32_t child;          /* its PID */
    int32_t request_fd;     /* an eventfd that wakes it */
    uint32_t returns;       /* how often the guest has gone back to the command */
    char refusal[512];      /* why the last new image gave up */
    char notice[512];       /* what the old image could not do as it was asked to */
    char directory[512];    /* the private directory of the update's stream, if there is one */
    struct cpr_vm_block blocks[16];
    struct cpr_vm_section sections[32];
};

/* Reads the state by all the steps. The vCPUs are not running. Makes system calls only. Returns 0,
   or -errno of image->failed_step. */
int cpr_vm_image_capture(struct cpr_vm_image *image, int vm_fd, const int32_t *vcpu_fds);

/* Writes it to a VM that has never run. Returns 0, or -errno of image->failed_step. */
int cpr_vm_image_restore(struct cpr_vm_image *image, int vm_fd, const int32_t *vcpu_fds);

#endif
