"""The interface of an accelerator: what the machine asks of KVM or of TCG.

An accelerator owns its VM and vCPU resources; guest RAM stays the RAMBlocks', devices stay the
machine's.  vCPU state crosses this interface as one dict with the fields of `x86.VMSTATE_CPU`,
the same for every accelerator.
"""

from __future__ import annotations

import errno

from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from cpr.memory import GuestMemory

    class Bus(Protocol):
        """Where a vCPU's port and memory-mapped accesses go; it does its own locking.

        Sizes are 1, 2, 4 or 8 bytes; values are unsigned and little-endian.
        """

        def io_read(self, port: int, size: int) -> int: ...
        def io_write(self, port: int, size: int, value: int) -> None: ...
        def mmio_read(self, address: int, size: int) -> int: ...
        def mmio_write(self, address: int, size: int, value: int) -> None: ...

    class InterruptSource(Protocol):
        """What a vCPU without an in-kernel irqchip asks for external interrupts.

        Called on the vCPU's own thread.
        """

        def pending(self) -> bool: ...
        def acknowledge(self) -> int:
            """Returns the vector (0..255) and takes the interrupt, or -1 if it has gone."""
            ...


# Why VCpu.run came back.
KICKED = "kicked"  # somebody called kick(); state may be read now
SHUTDOWN = "shutdown"  # triple fault
RESET = "reset"  # the guest asked for a reset by way of the CPU


class VCpu:
    """One virtual CPU.  All but `kick` is for the thread that runs it, or while none does."""

    index: int
    interrupt_source: InterruptSource | None = None
    """Where external interrupts come from without an in-kernel irqchip; None has none."""

    def run(self, bus: Bus) -> str:
        """Runs guest code until kicked or shut down; I/O goes to `bus`.  GIL released in between.

        Returns KICKED, SHUTDOWN or RESET.  After it returned, no access is half done: get_state
        is complete.  Raises KernelError where the accelerator cannot go on.
        """
        raise NotImplementedError

    def kick(self) -> None:
        """Makes `run` return KICKED soon, also if it starts only later; from any thread."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Tells a vCPU without in-kernel irqchip that its InterruptSource may have one now.

        From any thread; a kernel irqchip needs no telling.
        """

    def forget_code(self) -> None:
        """Another vCPU is about to interrupt this one, and may have written code before.

        From any thread; a processor needs no telling.
        """

    def on_new_thread(self, waited_ns: int, memory: GuestMemory) -> None:
        """Its thread has ended, which had waited so long for a CPU, and there is a new one."""

    def get_state(self) -> dict:
        """The state by `x86.VMSTATE_CPU`."""
        raise NotImplementedError

    def check_state(self, state: dict) -> None:
        """Raises ConfigError where this vCPU cannot take over `state`; it is not changed."""

    def set_state(self, state: dict) -> None:
        """Takes over a whole state; in force with `Accelerator.apply_state`, see there."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Accelerator:
    """One VM.  Construct, map RAM, create the irqchip, create the vCPUs: in that order."""

    name: str
    kernel_irqchip: bool
    """True: PIC, IOAPIC, PIT and local APICs are the accelerator's; False: the machine emulates."""
    saves_cpu_model = True
    """Whether a vCPU's state says what it can do; not where the receiver has been told before."""
    saves_native = False
    """Whether what is saved next is for one that has the same `native_layout`."""
    dirty_log = False
    """Whether it can tell what the guest writes to its RAM while it runs."""

    def map_ram(self, address: int, size: int, host_address: int, readonly: bool = False) -> None:
        """Makes `size` bytes at `host_address` the guest's RAM at guest-physical `address`."""
        raise NotImplementedError

    def unmap_ram(self, address: int, size: int) -> None:
        """The inverse of `map_ram`, with the same range."""
        raise NotImplementedError

    def write_listener(self) -> tuple[int, int] | None:
        """Whom threads in C tell of each write of theirs to RAM; None for nobody.

        The address of a function void (void *of, const void *place, uint64_t size), and its `of`.
        """
        return None

    def start_dirty_log(self) -> None:
        """Begins to log the guest's writes to all RAM that is mapped and not read-only.

        From any thread, while the guest runs.  Raises KernelError; then nothing is logged.
        """
        raise NotImplementedError

    def stop_dirty_log(self) -> None:
        """The inverse of `start_dirty_log`; what was logged and not taken is forgotten."""
        raise NotImplementedError

    def take_dirty_log(self, address: int, size: int) -> bytearray:
        """A bitmap of the pages written since the last call, for a range that was mapped so.

        Page n of the range is bit n % 64 of the little-endian word n // 64.  A write that is not
        in it is in the next one.  Writes by the VMM's own code are in none of them.
        """
        raise NotImplementedError

    def create_irqchip(self) -> None:
        """Creates the in-kernel irqchip and PIT, if it has them."""

    def create_vcpu(self, index: int) -> VCpu:
        raise NotImplementedError

    def set_irq(self, gsi: int, level: bool) -> None:
        """Sets an input of the in-kernel irqchip."""
        raise NotImplementedError

    # State.  An accelerator's parts depend on each other, so that they are given one by one, in any
    # order, and come into force together.

    def get_irqchip(self, chip: str) -> dict:
        """The state of 'i8259-0', 'i8259-1', 'ioapic' or 'i8254', by the device's vmstate.

        Only where `kernel_irqchip` is true, as all up to `set_clock`.  Times are in ns from now;
        while the VM is stopped, from when it was stopped.
        """
        raise NotImplementedError

    def set_irqchip(self, chip: str, state: dict) -> None:
        """The inverse of `get_irqchip`."""
        raise NotImplementedError

    def get_apic(self, vcpu: VCpu) -> bytes:
        """The 1024 bytes of registers of a vCPU's local APIC (layout: the xAPIC page)."""
        raise NotImplementedError

    def set_apic(self, vcpu: VCpu, registers: bytes) -> None:
        """The inverse of `get_apic`."""
        raise NotImplementedError

    def get_clock(self) -> int:
        """ns that the accelerator's paravirtual clock shows its guest."""
        raise NotImplementedError

    def set_clock(self, ns: int) -> None:
        """The inverse of `get_clock`, while the VM is stopped."""
        raise NotImplementedError

    # All of that at once, as the kernel has it: part 0 is that of vCPU 0 and so on, the last one
    # that of what all vCPUs share.

    def native_layout(self) -> Any:
        """Equal, as plain data, for two accelerators that take each other's parts.

        None where there is no such thing; where there is, the first call makes what it needs.
        """
        return None

    def native_size(self, part: int) -> int:
        """The bytes of a part."""
        raise NotImplementedError

    def get_native(self, part: int) -> bytes:
        """Reads a part while the VM is stopped.  Raises KernelError."""
        raise NotImplementedError

    def set_native(self, part: int, data: bytes) -> None:
        """The inverse of `get_native`, in force with `apply_state`."""
        raise NotImplementedError

    def apply_state(self) -> None:
        """Puts what the set_ methods were given into force; while the VM is stopped.

        Called when all has been given: after a load, and after a reset.  An accelerator may have
        done it before.  Raises CprError where the state cannot be this VM's.
        """

    def stop_time(self, now_ns: int) -> None:
        """The vCPUs have stopped: what the guest sees of time stands still from now.

        That is its TSCs, and the paravirtual clock; they are read at one instant, which is
        `now_ns` of time.monotonic_ns(), or as near to it as can be.
        """

    def start_time(self, now_ns: int, advance_ns: int = 0) -> None:
        """The vCPUs are about to run: the inverse of `stop_time`, and of a load or a reset.

        Time goes on `advance_ns` later than it was stopped or loaded.
        """

    # The processor that the guest was told that it has.

    def cpu_model(self) -> dict[str, Any]:
        """What it can do, as plain data that JSON can carry; for another VMM's `check_cpu_model`.

        {} where there is nothing that could be missing elsewhere.
        """
        return {}

    def adopt_cpu_model(self, model: dict[str, Any]) -> None:
        """Gives the vCPUs, before their state, what those of `model` have.

        Raises ConfigError as `check_cpu_model`.
        """
        self.check_cpu_model(model)

    def check_cpu_model(self, model: dict[str, Any]) -> None:
        """Raises ConfigError naming every feature of `model` that this host cannot give a guest.

        A host that has more is no problem: a guest keeps the model that it was started with.
        """

    # Interrupts by eventfd.  Eventfds are non-blocking ones and stay the caller's.

    def check_irqfds(self) -> None:
        """Raises KernelError where this accelerator has none of the following."""
        raise KernelError(
            f"-accel {self.name} has no interrupts by eventfd", errno.ENOTSUP, "use -accel kvm"
        )

    def add_irqfd(self, gsi: int, eventfd: int, resamplefd: int = -1) -> None:
        """Has a write to `eventfd` raise `gsi`; what was written before is one interrupt.

        With `resamplefd` it is level-triggered, and resamplefd is written when the guest has
        ended it.
        """
        raise NotImplementedError

    def remove_irqfd(self, gsi: int, eventfd: int) -> None:
        """The inverse of `add_irqfd`; from now on the eventfd counts."""
        raise NotImplementedError

    def add_messages(self, messages: list[tuple[int, int]]) -> list[int]:
        """Makes GSIs that stand for MSIs, each (address, data), in their order.

        `remove_message` is the inverse, one by one.
        """
        raise NotImplementedError

    def set_message(self, gsi: int, address: int, data: int) -> None:
        raise NotImplementedError

    def remove_message(self, gsi: int) -> None:
        raise NotImplementedError

    def signal_message(self, address: int, data: int) -> None:
        """Delivers one MSI now."""
        raise NotImplementedError

    has_irqfds = False
    """Whether it has the above."""
    ioeventfds = False
    """Whether it has the following."""

    def add_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        """Has a write of `size` bytes to guest-physical `address` write `eventfd`, and nothing
        else happen.
        """
        raise NotImplementedError

    def remove_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        """The inverse of `add_ioeventfd`."""
        raise NotImplementedError

    def add_vfio_file(self, fd: int) -> None:
        """Tells the VM of a VFIO group or device; `remove_vfio_file` is the inverse."""
        raise NotImplementedError

    def remove_vfio_file(self, fd: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Frees the VM; the vCPUs are closed before."""
        raise NotImplementedError
