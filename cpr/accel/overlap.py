"""Overlap: a child of this process runs the guest while the process executes its new image.

Old image: `Overlap` starts the child, and the vCPUs are handed over one by one as they leave
KVM_RUN.  The inverse is `cancel`: the child stops them where they are, and they go on here.
New image: `take_over` has the child stop and read its state, and runs the guest from there.
"""

from __future__ import annotations

import os
import select
import time

from cpr._native._cpr import ffi, lib
from cpr.accel.kvm_exit import serve
from cpr.accel.kvm_resume import affinity, set_affinity
from cpr.accel.vm_image import NAME, REQUEST, STREAM, VmImage, cpu_set
from cpr.errors import CprError, KernelError, MigrationError
from cpr.phases import mark
from cpr.state.fds import write_memfd
from cpr.uapi.mm_holder import mapping_array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.accel.base import Bus
    from cpr.accel.kvm import KvmAccelerator
    from cpr.memory import GuestMemory
    from cpr.state.fds import PreservedFds

STREAM_NAME = "x-cpr-vm-stream"
STANDARD_FDS = (0, 1, 2)
SLOT_SIZE = 256 << 20
"""The most that a memslot of the new VM has: while one is set, all vCPUs of this host may stand
still, for 0.4 ms per GiB where KVM has shadow page tables."""
LOOK_MS = 100  # how often a wait looks whether the child is still there
GONE = "the child that ran the guest during the update has ended, and the guest with it"


class Overlap:
    """The old image's side.  Owns the child, until the exec or `cancel`."""

    def __init__(
        self,
        accel: KvmAccelerator,
        memory: GuestMemory,
        fds: PreservedFds,
        way_back: Callable[[str], list[str]],
    ) -> None:
        """Makes what goes over the exec, and saves it in `fds`.

        `way_back(uri)` is the command of this VMM, with its migration stream at `uri`; its first
        word is a path.  Raises MigrationError or KernelError; then nothing is left.
        """
        self._accel = accel
        self._fds = fds
        self._pid = 0
        self._lent = False
        self._kept: list[int] = []
        self._mappings = [(block.host, block.max_length) for block in memory.blocks]
        self._stream_fd = os.memfd_create(STREAM_NAME)
        self._command = way_back(f"file:/proc/self/fd/{self._stream_fd}")
        try:
            self.image = VmImage(accel, memory, self._command)
        except CprError:
            os.close(self._stream_fd)
            raise
        self._request_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._process_fd = os.pidfd_open(os.getpid())
        self.image.header.mode = lib.CPR_VM_OVERLAP
        self.image.header.slot_size = SLOT_SIZE
        self.image.header.request_fd = self._request_fd
        fds.save(NAME, REQUEST, self._request_fd)
        fds.save(NAME, STREAM, self._stream_fd)

    def start(self, environment: dict[str, str], vcpu_threads: list[int]) -> None:
        """Starts the child; the vCPUs are still here, on `vcpu_threads`.  Raises KernelError.

        Where the new image dies the child starts the command of the way back in `environment`.
        """
        vcpus = self._accel.vcpus
        struct: Any = ffi.new("struct cpr_overlap *")
        struct.image = self.image.header
        struct.vm_fd = self._accel.vm.number
        struct.process_fd = self._process_fd
        for i, vcpu in enumerate(vcpus):
            struct.vcpu_fds[i], struct.runs[i] = vcpu.fd.number, vcpu.run_area
        inherited = [fd for _, _, fd in self._fds.entries()] + [self._fds.state_fd]
        own = [struct.vm_fd, self._process_fd, *(vcpu.fd.number for vcpu in vcpus)]
        self._kept = kept = sorted({*STANDARD_FDS, *inherited, *own})
        words = [os.fsencode(word) for word in self._command]
        variables = [os.fsencode(f"{k}={v}") for k, v in environment.items()]
        self._memory = [  # the child reads it as long as it lives
            struct,
            ffi.new("int32_t[]", kept),
            ffi.new("int32_t[]", inherited),
            mapping_array(self._mappings),
            *(strings := [ffi.new("char[]", text) for text in (*words, *variables)]),
            ffi.new("char *[]", [*strings[: len(words)], ffi.NULL]),
            ffi.new("char *[]", [*strings[len(words) :], ffi.NULL]),
        ]
        struct.kept, struct.kept_count = self._memory[1], len(kept)
        struct.inherited, struct.inherited_count = self._memory[2], len(inherited)
        struct.mappings, struct.mapping_count = self._memory[3], len(self._mappings)
        struct.arguments, struct.environment = self._memory[-2], self._memory[-1]
        own_cpus, vcpu_cpus = self._share_cpus(vcpu_threads)
        if own_cpus:
            self._memory += [ffi.new("char[]", cpu_set(cpus)) for cpus in (own_cpus, vcpu_cpus)]
            struct.own_cpus, struct.vcpu_cpus = self._memory[-2:]
        pid = lib.cpr_overlap_start(struct)
        if pid < 0:
            raise KernelError("clone of the overlap's child", -pid)
        self._pid = pid
        self.image.header.child = pid
        if own_cpus:
            set_affinity(own_cpus, vcpu_threads)

    def arm(self) -> None:
        """Lets each vCPU go to the child as it is kicked; `disarm` is the inverse."""
        for vcpu in self._accel.vcpus:
            lib.cpr_kvm_hand_over(vcpu.control, ffi.addressof(self.image.exit(vcpu.index), "place"))

    def disarm(self) -> None:
        for vcpu in self._accel.vcpus:
            lib.cpr_kvm_hand_over(vcpu.control, ffi.NULL)

    def complete(self) -> bool:
        """Whether all the vCPUs have gone to the child, and it knows all that the VM listens to.

        The clock is read at that moment.
        """
        self.image.header.stopped_ns = time.monotonic_ns()
        self._lent = True
        places = [self.image.exit(vcpu.index).place for vcpu in self._accel.vcpus]
        known = all(irqfd.eventfd in self._kept for irqfd in self._accel.irqfds)
        complete = lib.CPR_VCPU_OUTSIDE not in places and known and self.image.list_irqfds()
        self._accel.lend(complete)
        return complete

    def keep_stream(self, data: bytes) -> None:
        """Keeps the migration stream for a VMM that goes back."""
        write_memfd(self._stream_fd, data)

    def _share_cpus(self, vcpu_threads: list[int]) -> tuple[set[int], set[int]]:
        """The CPUs of the VMM, and of the vCPUs, during the overlap: none in common, if possible.

        A vCPU that has to share its CPU with the new image's start stands still for a whole time
        slice.  Where there are not enough CPUs both are empty: for as the scheduler likes.
        """
        allowed = os.sched_getaffinity(0)
        free = allowed - {_cpu_of(thread) for thread in vcpu_threads}
        if not free or len(allowed) <= len(vcpu_threads):
            return set(), set()
        return {max(free)}, allowed - {max(free)}

    def cancel(self) -> None:
        """Takes the vCPUs back, and ends the child."""
        if self._pid:
            self.disarm()
            lib.cpr_overlap_ask(self.image.header, lib.CPR_OVERLAP_CANCEL)
            lib.cpr_mm_holder_reap(self._pid)
            for vcpu in self._accel.vcpus:
                exit = self.image.exit(vcpu.index)
                vcpu.held = bool(exit.place == lib.CPR_VCPU_HELD or exit.pending)
            set_affinity(affinity(self.image.header))
            if self._lent:  # time went on, and so did what the devices keep in the kernel
                self._accel.has_state = True
                self._accel.running_since = self.image.header.stopped_ns
        self._fds.delete(NAME, REQUEST)
        self._fds.delete(NAME, STREAM)
        for fd in (self._stream_fd, self._request_fd, self._process_fd):
            os.close(fd)


def take_over(accel: KvmAccelerator, bus: Bus) -> None:
    """Takes the guest of an overlap over from its child, and runs it.

    Raises MigrationError or KernelError; the guest then runs on in the child.
    """
    assert accel.resumed is not None
    resumed, image = accel.resumed, accel.resumed.image
    child = _open_child(image.child)
    try:
        mark("stop")
        lib.cpr_overlap_capture(image)
        _wait(image, child, bus)
        mark("run")
        lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_COMMIT)
        exits = ffi.cast("struct cpr_vm_exit *", ffi.cast("char *", image) + image.exits)
        for vcpu in resumed.vcpus:
            exit = exits[vcpu.index]
            if exit.pending:
                vcpu.exit.reason, vcpu.exit.suberror = exit.reason, exit.suberror
                vcpu.exit.hardware, vcpu.pending_error = exit.hardware, exit.error
        resumed.overlap = False
        accel.do_what_waits()
        accel.pit_loaded_ns = _pit_loaded_ns(image)
    finally:
        os.close(child)


def _wait(image: Any, child: int, bus: Bus) -> None:
    """Serves what the vCPUs are held at, until the thread of vCPU 0 has taken the guest over."""
    while True:
        answer = lib.cpr_overlap_wait(image, LOOK_MS)
        if answer == lib.CPR_ANSWER_READY:
            return
        if answer == lib.CPR_ANSWER_FAILED:
            lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_RUN)
            step = f"step {image.failed_step} of moving the VM's state"
            raise KernelError(step, -image.error)
        if answer == lib.CPR_ANSWER_HELD:
            exits = ffi.cast("struct cpr_vm_exit *", ffi.cast("char *", image) + image.exits)
            for index in range(image.vcpus):
                if exits[index].place == lib.CPR_VCPU_HELD:
                    serve(exits[index], bus)
                    lib.cpr_overlap_serve(image, index)
        elif _has_ended(child):
            raise MigrationError(GONE)


def _pit_loaded_ns(image: Any) -> int:
    steps = ffi.cast("struct cpr_vm_step *", ffi.cast("char *", image) + image.steps)
    offsets = [s.offset for s in steps[0 : image.step_count] if s.kind == lib.CPR_STEP_PIT]
    pit = ffi.cast("struct kvm_pit_state2 *", ffi.cast("char *", image) + offsets[0])
    return int(pit.channels[0].count_load_time)


def _open_child(pid: int) -> int:
    """A pidfd of the child.  Raises MigrationError where it is gone, and the guest with it."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        raise MigrationError(GONE) from None


def _has_ended(child: int) -> bool:
    return bool(select.select([child], [], [], 0)[0])


def _cpu_of(thread: int) -> int:
    """The CPU that a thread of this process was on last (proc_pid_stat(5), field 39)."""
    with open(f"/proc/self/task/{thread}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[36])
