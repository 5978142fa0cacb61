"""The machine: what it is made of, and how that is saved; `pc.build` makes one from a Config.

The machine does not know whether it comes from an exec.
"""

from __future__ import annotations

from cpr import report, runstate
from cpr.bus import IOBus, Region
from cpr.constants import MIB, PAGE_SIZE
from cpr.errors import CommandError, ConfigError, CprError
from cpr.lifecycle import Lifecycle
from cpr.ram_backend import claim, give_up
from cpr.vcpus import VCpuThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from cpr.accel.base import Accelerator
    from cpr.chardev.base import Chardev
    from cpr.config import Config
    from cpr.devices.base import Device
    from cpr.events import EventBus
    from cpr.mainloop import MainLoop
    from cpr.memory import GuestMemory
    from cpr.ram import RAMBlock

    class Frontend(Protocol):
        """A device with a chardev, or None for a device that will have none."""

        def attach(self, chardev: Chardev | None) -> None: ...


class Machine(Lifecycle):
    """One VM: its RAM, accelerator, vCPUs and devices.  Owns all of them.

    `close` is for the main loop, and for a VM that does not run.
    """

    def __init__(
        self,
        config: Config,
        accel: Accelerator,
        memory: GuestMemory,
        loop: MainLoop,
        events: EventBus,
    ) -> None:
        super().__init__(config, accel, memory, loop, events)
        self.bus = IOBus(self.lock)
        self.frontends: list[tuple[Frontend, str | None]] = []
        self.irq_handlers: list[Callable[[int, bool], None]] = []
        self.message_handler: Callable[[int, int], None] = accel.signal_message

    @property
    def blocks(self) -> list[RAMBlock]:
        return self.memory.blocks

    # What devices see (devices.base.Platform).

    def register_io(
        self,
        base: int,
        length: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
        name: str,
        access_size: int = 1,
    ) -> None:
        self.bus.io.add(Region(base, length, read, write, name, access_size))

    def unregister_io(self, base: int, length: int) -> None:
        self.bus.io.remove(base, length)

    def register_mmio(
        self,
        base: int,
        length: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
        name: str,
        access_size: int = 4,
    ) -> None:
        self.bus.memory.add(Region(base, length, read, write, name, access_size))

    def unregister_mmio(self, base: int, length: int) -> None:
        self.bus.memory.remove(base, length)

    def set_irq(self, gsi: int, level: bool) -> None:
        for handler in self.irq_handlers:
            handler(gsi, level)

    def signal_message(self, address: int, data: int) -> None:
        self.message_handler(address, data)

    def current_vcpu(self) -> int:
        """The index of the vCPU whose thread is calling, or -1."""
        for thread in self.threads:
            if thread.is_current:
                return thread.vcpu.index
        return -1

    # What it is made of.

    def add_device(self, device: Device) -> None:
        """Realizes `device`; it stays until the machine is closed."""
        device.realize(self)
        self.devices.append(device)

    def create_threads(self) -> None:
        self.threads = [
            VCpuThread(
                vcpu,
                self.bus,
                lambda: self.request_reset(True, "guest-reset"),
                self.request_error,
            )
            for vcpu in self.vcpus
        ]

    def acpi_tables(self) -> bytes:
        """What the devices say of themselves, as it lies in the memory of a guest that asks."""
        from cpr.acpi.tables import Acpi

        acpi = Acpi()
        for device in self.devices:
            device.describe(acpi)
        return acpi.build()

    # Looking in from outside.

    def vcpu_state(self, index: int) -> dict:
        """The state of vCPU `index`; a running one is interrupted for a moment."""
        state: dict = self.threads[index].run_on(lambda vcpu: vcpu.get_state())
        return state

    def vcpu_thread_ids(self) -> list[int]:
        return [thread.thread_id for thread in self.threads]

    def read_physical(self, address: int, size: int) -> bytes:
        """Reads guest-physical memory.  Raises CommandError where there is no RAM."""
        end = address + size
        if self.memory.find(address) is None or self.memory.find(end - 1) is None:
            raise CommandError(f"Invalid addr 0x{address:016x}/size {size} specified")
        return self.memory.read(address, size)

    def read_virtual(self, index: int, address: int, size: int, state: dict | None = None) -> bytes:
        """Reads through the page tables of vCPU `index`, whose state may be known already.

        Raises CommandError naming the first address that is not mapped, or leads to no memory; in
        the first MiB, where a PC has its holes, that reads as ones.
        """
        from cpr.accel.paging import translate

        if state is None:
            state = self.vcpu_state(index)
        runs: list[tuple[int, int]] = []  # physical address, size
        done = 0
        while done < size:
            virtual = address + done
            physical = translate(state, self.memory.read, virtual)
            if physical is None or (physical >= MIB and self.memory.find(physical) is None):
                raise CommandError(f"Invalid addr 0x{virtual:016x}/size {size} specified")
            piece = min(size - done, PAGE_SIZE - virtual % PAGE_SIZE)
            if runs and sum(runs[-1]) == physical:
                runs[-1] = (runs[-1][0], runs[-1][1] + piece)
            else:
                runs.append((physical, piece))
            done += piece
        return b"".join(self.memory.read(*run) for run in runs)

    def regions(self) -> list[tuple[int, int, str, str, int]]:
        """(first, last, name, kind, priority) of the guest-physical map and the port space.

        Kind is "ram", "rom", "i/o" or "port".
        """
        rows = [
            (s.start, s.start + s.size - 1, s.name, "rom" if s.readonly else "ram", 0)
            for s in self.memory.sections
        ]
        rows += [(r.base, r.end - 1, r.name, "i/o", 0) for r in self.bus.memory.regions]
        rows += [(r.base, r.end - 1, r.name, "port", 0) for r in self.bus.io.regions]
        return rows

    def files(self) -> list[tuple[str, int]]:
        """What of the guest is in files: what each is called, and its descriptor."""
        found = [(f"RAM block '{block.idstr}'", block.fd) for block in self.blocks if block.fd >= 0]
        for device in self.devices:
            found += device.files()
        return found

    def sections(self) -> list[Device]:
        """The devices with state, in the order in which they are saved and restored."""
        devices = [device for device in self.devices if device.vmstate is not None]
        return sorted(devices, key=lambda device: device.saved_last)

    def cpr_prepare(self, mode: str) -> None:
        """Has the devices make themselves ready for being saved in `mode`, the guest stopped.

        Raises CprError where one refuses; `cpr_rollback` is the inverse in that case too.
        """
        with self.lock:
            for device in self.devices:
                device.cpr_prepare(mode)

    def cpr_rollback(self) -> CprError | None:
        """The inverse of `cpr_prepare`; why the guest must not run here, or None: another process
        has what a device had given up."""
        refusal: CprError | None = None
        with self.lock:
            for device in reversed(self.devices):
                try:
                    device.cpr_rollback()
                except ConfigError as error:
                    refusal = error
                except Exception as error:
                    report.exception_report(error)
        return refusal

    def claim(self, wait_ns: int = 0) -> None:
        """Takes what only the VMM that has the guest may have: the files of its RAM, for which it
        waits at most `wait_ns`, and its disks.

        Raises CprError where another one has them; then nothing is taken.
        """
        claim(self.blocks, wait_ns)
        for number, device in enumerate(self.devices):
            try:
                device.take_locks()
            except CprError:
                for claimed in self.devices[:number]:
                    claimed.give_locks()
                give_up(self.blocks)
                raise

    def leave_guest(self) -> None:
        """Another VMM may have the guest from now on; `cont` takes it again, where none has."""
        give_up(self.blocks)
        self.has_left = True
        self.runstate.set(runstate.POSTMIGRATE)

    def take_over(self) -> None:
        """The guest that was loaded is this VMM's for good; it runs on whatever a device says."""
        with self.lock:
            for device in self.devices:
                try:
                    device.take_over()
                except CprError as error:
                    report.error_report(error)

    def close(self) -> None:
        """Frees everything; the VM must not be running."""
        for thread in self.threads:
            thread.end()
        for device in reversed(self.devices):
            device.unrealize()
        for vcpu in self.vcpus:
            vcpu.close()
        self.accel.close()
        self.memory.close()
