/* A KVM VM from its image, in one go: what a new image does before anything else. */
#include "vm_create.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "page_map.h"

_Static_assert(sizeof(((struct cpr_vm *)0)->hosts) == CPR_VM_BLOCKS * sizeof(uint64_t), "hosts");
_Static_assert(sizeof(((struct cpr_vm *)0)->vcpu_fds) == CPR_VM_VCPUS * sizeof(int32_t), "vcpus");

static int fail(struct cpr_vm *vm, const char *call)
{
    int error = errno;

    vm->failed = call;
    cpr_vm_destroy(vm);
    return -error;
}

static int create_vcpu(const struct cpr_vm_image *image, struct cpr_vm *vm, uint32_t index)
{
    char *cpuid = (char *)image + image->cpuid + index * image->cpuid_size;
    int fd = ioctl(vm->vm_fd, KVM_CREATE_VCPU, (unsigned long)index);
    void *run;

    if (fd < 0) {
        return fail(vm, "KVM_CREATE_VCPU");
    }
    vm->vcpu_fds[vm->vcpus++] = fd;
    run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (run == MAP_FAILED) {
        return fail(vm, "mmap of kvm_run");
    }
    vm->runs[index] = run;
    if (ioctl(fd, KVM_SET_CPUID2, cpuid) < 0) {
        return fail(vm, "KVM_SET_CPUID2");
    }
    return 0;
}

/* The VM up to its memslots, which must be set before the irqchip and the PIT: afterwards each waits
   for a grace period. */
static int create_vm(const struct cpr_vm_image *image, struct cpr_vm *vm)
{
    uint64_t identity = image->identity_address;
    int size;

    vm->device_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->device_fd < 0) {
        return fail(vm, "open of /dev/kvm");
    }
    vm->vm_fd = ioctl(vm->device_fd, KVM_CREATE_VM, 0ul);
    if (vm->vm_fd < 0) {
        return fail(vm, "KVM_CREATE_VM");
    }
    size = ioctl(vm->device_fd, KVM_GET_VCPU_MMAP_SIZE, 0ul);
    if (size < 0) {
        return fail(vm, "KVM_GET_VCPU_MMAP_SIZE");
    }
    vm->run_size = (uint64_t)size;
    if (ioctl(vm->vm_fd, KVM_SET_TSS_ADDR, (unsigned long)image->tss_address) < 0) {
        return fail(vm, "KVM_SET_TSS_ADDR");
    }
    if (ioctl(vm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0) {
        return fail(vm, "KVM_SET_IDENTITY_MAP_ADDR");
    }
    for (uint32_t i = 0, slot = 0; i < image->section_count; i++) {
        const struct cpr_vm_section *section = &image->sections[i];
        uint64_t most = image->slot_size ? image->slot_size : section->size;

        for (uint64_t done = 0; done < section->size; done += most) {
            uint64_t left = section->size - done;
            struct kvm_userspace_memory_region region = {
                .slot = slot++,
                .flags = section->flags,
                .guest_phys_addr = section->address + done,
                .memory_size = left < most ? left : most,
                .userspace_addr = vm->hosts[section->block] + section->offset + done,
            };

            if (ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
                return fail(vm, "KVM_SET_USER_MEMORY_REGION");
            }
        }
    }
    return 0;
}

int cpr_vm_create(const struct cpr_vm_image *image, struct cpr_vm *vm)
{
    struct kvm_pit_config pit = {.flags = image->pit_flags};
    int error;

    *vm = (struct cpr_vm){.device_fd = -1, .vm_fd = -1};
    for (uint32_t i = 0; i < image->block_count; i++) {
        const struct cpr_vm_block *block = &image->blocks[i];
        void *host = cpr_map_aligned(block->fd, 0, block->size, block->alignment, MAP_SHARED);

        if (host == MAP_FAILED) {
            return fail(vm, "mmap of guest RAM");
        }
        vm->hosts[i] = (uint64_t)host;
        vm->sizes[vm->blocks++] = block->size;
    }
    error = create_vm(image, vm);
    if (error) {
        return error;
    }
    if (ioctl(vm->vm_fd, KVM_CREATE_IRQCHIP, 0ul) < 0) {
        return fail(vm, "KVM_CREATE_IRQCHIP");
    }
    if (ioctl(vm->vm_fd, KVM_CREATE_PIT2, &pit) < 0) {
        return fail(vm, "KVM_CREATE_PIT2");
    }
    for (uint32_t i = 0; i < image->vcpus && !error; i++) {
        error = create_vcpu(image, vm, i);
    }
    return error;
}

void cpr_vm_destroy(struct cpr_vm *vm)
{
    for (uint32_t i = 0; i < vm->vcpus; i++) {
        if (vm->runs[i] != NULL) {
            munmap(vm->runs[i], vm->run_size);
        }
        close(vm->vcpu_fds[i]);
    }
    if (vm->vm_fd >= 0) {
        close(vm->vm_fd);
    }
    if (vm->device_fd >= 0) {
        close(vm->device_fd);
    }
    for (uint32_t i = 0; i < vm->blocks; i++) {
        munmap((void *)vm->hosts[i], vm->sizes[i]);
    }
    vm->vcpus = vm->blocks = 0;
    vm->vm_fd = vm->device_fd = -1;
}
