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
from cpr.accel.vm_image import CPU_SET_SIZE, NAME, REQUEST, STREAM, VmImage
from cpr.errors import CprError, KernelError, MigrationError
from cpr.phases import mark

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
        self.image.header.request_fd = self._request_fd
        fds.save(NAME, REQUEST, self._request_fd)
        fds.save(NAME, STREAM, self._stream_fd)

    def start(self, environment: dict[str, str]) -> None:
        """Starts the child; the vCPUs are still here.  Raises KernelError.

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
            *(strings := [ffi.new("char[]", text) for text in (*words, *variables)]),
            ffi.new("char *[]", [*strings[: len(words)], ffi.NULL]),
            ffi.new("char *[]", [*strings[len(words) :], ffi.NULL]),
        ]
        struct.kept, struct.kept_count = self._memory[1], len(kept)
        struct.inherited, struct.inherited_count = self._memory[2], len(inherited)
        struct.arguments, struct.environment = self._memory[-2], self._memory[-1]
        pid = lib.cpr_overlap_start(struct)
        if pid < 0:
            raise KernelError("clone of the overlap's child", -pid)
        self._pid = pid
        self.image.header.child = pid

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
        os.pwrite(self._stream_fd, data, 0)

    def avoid_vcpus(self) -> None:
        """Leaves the CPUs that the vCPUs are on to them; the new image undoes that."""
        allowed = os.sched_getaffinity(0)
        rest = allowed - _cpus_of(self._pid)
        if rest and len(rest) < len(allowed):
            os.sched_setaffinity(0, {max(rest)})

    def cancel(self) -> None:
        """Takes the vCPUs back, and ends the child."""
        if self._pid:
            self.disarm()
            lib.cpr_overlap_ask(self.image.header, lib.CPR_OVERLAP_CANCEL)
            lib.cpr_mm_holder_reap(self._pid)
            for vcpu in self._accel.vcpus:
                exit = self.image.exit(vcpu.index)
                vcpu.held = bool(exit.place == lib.CPR_VCPU_HELD or exit.pending)
            os.sched_setaffinity(0, _affinity(self.image.header))
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
        restore_affinity(image)
        mark("stop")
        _capture(accel, image, child, bus)
        error = resumed.restore()
        if error:
            lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_RUN)
            raise KernelError(f"step {image.failed_step} of writing the VM's state", -error)
        what = []
        exits = ffi.cast("struct cpr_vm_exit *", ffi.cast("char *", image) + image.exits)
        for vcpu in resumed.vcpus:
            exit = exits[vcpu.index]
            what.append(lib.CPR_GO_SERVE if exit.pending else lib.CPR_GO_RUN)
            if exit.pending:
                vcpu.exit.reason, vcpu.exit.suberror = exit.reason, exit.suberror
                vcpu.exit.hardware, vcpu.pending_error = exit.hardware, exit.error
        lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_COMMIT)
        resumed.overlap = False
        accel.do_what_waits()
        resumed.run(what)
        accel.pit_loaded_ns = _pit_loaded_ns(image)
    finally:
        os.close(child)


def _capture(accel: KvmAccelerator, image: Any, child: int, bus: Bus) -> None:
    """Has the child stop the guest and read its state; serves what its vCPUs are held at."""
    lib.cpr_overlap_ask(image, lib.CPR_OVERLAP_CAPTURE)
    while True:
        answer = lib.cpr_overlap_wait(image, LOOK_MS)
        if answer == lib.CPR_ANSWER_READY:
            return
        if answer == lib.CPR_ANSWER_FAILED:
            raise KernelError(f"step {image.failed_step} of reading the VM's state", -image.error)
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


def restore_affinity(image: Any) -> None:
    """Lets all threads of this process run where they could before the update."""
    cpus = _affinity(image)
    for name in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(name), cpus)


def _affinity(image: Any) -> set[int]:
    data = ffi.buffer(ffi.cast("char *", image) + image.affinity, CPU_SET_SIZE)[:]
    bits = int.from_bytes(data, "little")
    return {cpu for cpu in range(8 * CPU_SET_SIZE) if bits >> cpu & 1}


def _cpus_of(pid: int) -> set[int]:
    """The CPUs that the threads of a process were on last (proc_pid_stat(5), field 39)."""
    cpus = set()
    for name in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{name}/stat") as file:
            cpus.add(int(file.read().rpartition(")")[2].split()[36]))
    return cpus
