"""The first thing that a new image does: makes its VM from the image of the old one.

A guest that stood still for the exec runs on as soon as that is done, before the rest of the VMM is
imported; an exit that a device must serve waits until there are devices.  The guest of an overlap
stays with its child until the new VMM is complete; see `overlap`.

The machine that is built afterwards takes everything over: RAM through PreservedFds.mappings, the
VM and its vCPUs through KvmAccelerator, the vCPUs' threads through VCpuThread.
"""

from __future__ import annotations

import posix
import time
from _thread import allocate_lock, get_native_id, start_new_thread

from cpr import fd_list
from cpr._native._cpr import ffi, lib
from cpr.phases import mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.state.fds import PreservedFds

NAME = b"x-cpr-vm"
CPU_SET_SIZE = 128  # sizeof(cpu_set_t)


class ResumedVCpu:
    """A vCPU and the thread that runs it, or waits to.

    `main` is set by the VCpuThread that takes the thread over, before it opens `gate`.  `error` is
    what KVM_RUN came back with, `pending_error` what it came back with elsewhere: 0 or -errno.
    """

    def __init__(self, vm: ResumedVm, index: int) -> None:
        self.index = index
        self.fd: int = vm.struct.vcpu_fds[index]
        self.run = vm.struct.runs[index]
        self.exit = ffi.new("struct cpr_exit *")
        self.control = ffi.new("struct cpr_vcpu_control *")
        self.error = 0
        self.pending_error = 0
        self.thread = 0
        self.thread_id = 0
        self.gate = allocate_lock()
        self.gate.acquire()
        self.main: Callable[[], None] = lambda: None
        self._vm = vm
        self._started = allocate_lock()
        self._started.acquire()
        self.ident = start_new_thread(self._run, ())
        self._started.acquire()  # gives the interpreter's lock to the thread

    def _run(self) -> None:
        self.thread = lib.cpr_vcpu_thread_enter()
        self.thread_id = get_native_id()
        if self._vm.vcpu_cpus:
            posix.sched_setaffinity(0, self._vm.vcpu_cpus)
        self._started.release()
        vm = self._vm
        error = lib.cpr_kvm_run_after(
            vm.go, self.index, vm.image, vm.struct, self.exit, self.control
        )
        self.error = self.pending_error or error
        self.gate.acquire()
        self.main()


class ResumedVm:
    """The VM of this process, made from an image.  Owns everything until it is taken over.

    `overlap` is true while the guest still runs in the child of the old image.
    """

    def __init__(self, image: Any) -> None:
        """Makes the VM, and lets a guest that stood still run.  Raises OSError; nothing is left."""
        self.image = image
        self.overlap = image.mode == lib.CPR_VM_OVERLAP
        self.struct = ffi.new("struct cpr_vm *")
        mark("map")
        error = lib.cpr_vm_create(image, self.struct)
        if error:
            raise OSError(-error, ffi.string(self.struct.failed).decode())
        count = image.vcpus
        self.go = ffi.new("uint32_t[]", count)
        self.vcpu_cpus: set[int] = set()
        if self.overlap:
            self.go[0] = lib.CPR_GO_TAKE
            self.vcpu_cpus = affinity(image) - posix.sched_getaffinity(0)
        mark("vcpu")
        lib.cpr_kick_install()
        self.vcpus = [ResumedVCpu(self, index) for index in range(count)]
        self.sections = {
            (section.address, section.size, section.flags): self.struct.hosts[section.block]
            + section.offset
            for section in image.sections[0 : image.section_count]
        }
        if not self.overlap:
            error = self.restore()
            if error:
                self._close()
                raise OSError(-error, f"step {image.failed_step} of writing the VM's state")
            self.run([lib.CPR_GO_RUN] * count)

    def _close(self) -> None:
        self.run([lib.CPR_GO_SERVE] * len(self.vcpus))  # that is to say: nothing at all
        for vcpu in self.vcpus:
            vcpu.gate.release()
        lib.cpr_vm_destroy(self.struct)

    def restore(self) -> int:
        """Writes the image's state to the VM; returns 0 or -errno of image.failed_step."""
        vm = self.struct
        mark("load")
        error: int = lib.cpr_vm_image_restore(self.image, vm.vm_fd, vm.vcpu_fds)
        return error

    def run(self, what: list[int]) -> None:
        """Lets each vCPU do what it is to do, an enum cpr_vcpu_go."""
        self.image.resumed_ns = time.monotonic_ns()
        mark("resume")
        lib.cpr_kvm_go(self.go, what, len(what))
        mark("run")

    def readable_msrs(self) -> tuple[list[int], bool]:
        """The MSRs that the old image has found to be readable; whether the TSC's offset is."""
        base = ffi.cast("char *", self.image)
        steps = ffi.cast("struct cpr_vm_step *", base + self.image.steps)
        indices = []
        kinds = set()
        for step in steps[0 : self.image.step_count]:
            kinds.add(step.kind)
            if step.kind == lib.CPR_STEP_MSRS and not step.vcpu:
                msrs = ffi.cast("struct kvm_msrs *", base + step.offset)
                indices += [msrs.entries[i].index for i in range(msrs.nmsrs)]
        return indices, lib.CPR_STEP_TSC_OFFSET in kinds

    def mappings(self) -> dict[int, int]:
        """Where each preserved descriptor is mapped."""
        blocks = self.image.blocks
        return {blocks[i].fd: self.struct.hosts[i] for i in range(self.struct.blocks)}


def affinity(image: Any) -> set[int]:
    """The CPUs that the VMM may use when there is no overlap."""
    data = ffi.buffer(ffi.cast("char *", image) + image.affinity, CPU_SET_SIZE)[:]
    bits = int.from_bytes(data, "little")
    return {cpu for cpu in range(8 * CPU_SET_SIZE) if bits >> cpu & 1}


resumed: ResumedVm | None = None
"""The VM that `resume` made, until the machine takes it over."""

image: Any = None
"""The struct cpr_vm_image of an overlap, while its guest is not here yet, or None."""

_cpus: set[int] = set()

state = b""
"""The CPR state with which this process began."""

copies: dict[int, int] = {}
"""A copy of each preserved descriptor of an overlap, by its number."""


def resume() -> None:
    """Makes the VM where the CPR state has an image of one; else, or if it fails, does nothing.

    The rest of the VMM then finds the guest's state in the migration stream.  Raises OSError for
    an overlap, whose guest has its state in the child alone.
    """
    global resumed, image, state, copies, _cpus
    state = fd_list.read()
    entries = fd_list.entries(state)
    fd = next((fd for name, id, fd in entries if (name, id) == (NAME, 0)), -1)
    if fd < 0:
        return
    prot = lib.PROT_READ | lib.PROT_WRITE
    flags = lib.MAP_SHARED | lib.MAP_POPULATE
    address = lib.mmap(ffi.NULL, posix.fstat(fd).st_size, prot, flags, fd, 0)
    if address == ffi.cast("void *", -1):
        return
    found = ffi.cast("struct cpr_vm_image *", address)
    if found.abi != lib.CPR_VM_ABI or found.mode == lib.CPR_VM_NONE:
        return
    if found.mode == lib.CPR_VM_OVERLAP:
        image = found
        _cpus = affinity(found)
        copies = {fd: posix.dup(fd) for _, _, fd in entries}
    try:
        resumed = ResumedVm(found)
    except OSError:
        if image is not None:
            raise


def restore_affinity() -> None:
    """Lets all threads of this process run where they could before the update with overlap."""
    global _cpus
    cpus, _cpus = _cpus, set()
    if cpus:
        set_affinity(cpus)


def set_affinity(cpus: set[int], but: list[int] | None = None) -> None:
    """Lets all threads of this process, `but` these, run on these CPUs."""
    for name in posix.listdir("/proc/self/task"):
        if but is None or int(name) not in but:
            try:
                posix.sched_setaffinity(int(name), cpus)
            except ProcessLookupError:  # it has ended meanwhile
                pass


def command() -> list[str]:
    """The command that goes back to the old VMM."""
    data = ffi.buffer(ffi.cast("char *", image) + image.command, image.command_size)[:]
    return [word.decode(errors="surrogateescape") for word in data.split(b"\0")[:-1]]


def text(field: str) -> str:
    """A text of the resumed VM's image."""
    assert resumed is not None
    value: bytes = ffi.string(getattr(resumed.image, field))
    return value.decode(errors="surrogateescape")


def set_text(image: Any, field: str, value: str) -> None:
    """Sets a text of a struct cpr_vm_image, cut to what there is room for."""
    data = value.encode(errors="surrogateescape")[: lib.CPR_VM_TEXT - 1]
    ffi.memmove(getattr(image, field), data + b"\0", len(data) + 1)


def end_guest() -> None:
    """Ends the overlap's child, and the guest with it."""
    lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_CANCEL)


def close(fds: PreservedFds) -> None:
    """Gives up the image, and what was kept for the way back: the guest is here."""
    global resumed, image, state, copies
    assert resumed is not None
    lib.munmap(resumed.image, resumed.image.size)
    for name, id, fd in fds.entries():
        if name == NAME.decode():
            fds.delete(name, id)
            posix.close(fd)
    for fd in copies.values():
        posix.close(fd)
    resumed, image, state, copies = None, None, b"", {}
