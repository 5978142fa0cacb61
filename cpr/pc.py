"""The `pc` machine: `build` makes its RAM, accelerator, vCPUs and devices from a Config.

0x00000000  RAM: all of it where it is below 3.5 GiB, else the first 3 GiB
0x000c0000  pc.rom, 128 KiB
0x000e0000  the last 128 KiB of pc.bios again
0xfec00000  I/O APIC
0xfee00000  local APICs
0xfffc0000  pc.bios, 256 KiB
4 GiB       the rest of RAM
"""

from __future__ import annotations

from cpr import boot, report
from cpr.config.device_table import DEVICES
from cpr.config.drive_options import NONE, VIRTIO
from cpr.constants import GIB, MAX_CPUS
from cpr.devices import isa_serial
from cpr.devices.apic import ApicBus, LocalApic
from cpr.devices.i8254 import I8254, PcSpeaker
from cpr.devices.i8259 import I8259Pair
from cpr.devices.ioapic import IOApic
from cpr.devices.mc146818rtc import Mc146818Rtc
from cpr.devices.pckbd import I8042
from cpr.devices.piix4_pm import Piix4Pm
from cpr.devices.port92 import Port92
from cpr.devices.system import GuestClock, NativeState, ParavirtualClock, Timers, VCpuState
from cpr.errors import ConfigError, CprError
from cpr.machine import Machine
from cpr.memory import GuestMemory
from cpr.phases import mark
from cpr.ram import populate
from cpr.ram_backend import create_aux_block, create_backend_block, create_default_block

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.accel.base import Accelerator
    from cpr.config import Config, DriveConfig, NetdevConfig
    from cpr.devices.iommufd import IommufdBackend
    from cpr.devices.pci import PciHost
    from cpr.devices.vfio import Type1
    from cpr.events import EventBus
    from cpr.mainloop import MainLoop
    from cpr.ram import RAMBlock
    from cpr.state.fds import PreservedFds

LOW_RAM_LIMIT = 0xE0000000  # RAM of this size or more leaves the PCI hole from 3 GiB on
LOW_RAM_SPLIT = 0xC0000000
BIOS_SIZE = 256 << 10
BIOS_ADDRESS = 4 * GIB - BIOS_SIZE
ISA_BIOS_SIZE = 128 << 10
ISA_BIOS_ADDRESS = 0xE0000
ROM_SIZE = 128 << 10
ROM_ADDRESS = 0xC0000
VGA_ADDRESS = 0xA0000
RESET_VECTOR = BIOS_SIZE - 16
JUMP_TO_BOOT = bytes((0xEA, 0x00, 0x7C, 0x00, 0x00))  # jmp far 0:7c00
HLT = 0xF4


def build(
    config: Config,
    fds: PreservedFds,
    loop: MainLoop,
    events: EventBus,
) -> Machine:
    """Makes a stopped machine in runstate prelaunch; the caller owns it.

    Descriptors that `fds` holds are taken over by the blocks of their names.  Raises ConfigError
    or KernelError; then everything that was made is freed again.
    """
    _check(config)
    mark("map")
    accel = _create_accel(config.accels)
    memory = GuestMemory()
    machine = Machine(config, accel, memory, loop, events)
    try:
        _create_ram(config, memory, fds)
        for section in memory.sections:
            host = section.block.host + section.offset
            accel.map_ram(section.start, section.size, host, section.readonly)
        mark("vcpu")
        accel.create_irqchip()
        for index in range(config.smp):
            machine.vcpus.append(accel.create_vcpu(index))
        _create_devices(Board(config, machine, fds))
        machine.boot_image = lambda: boot.create(config, machine.acpi_tables)
        machine.create_threads()
    except CprError:
        machine.close()
        raise
    return machine


def _check(config: Config) -> None:
    if config.smp > MAX_CPUS:
        raise ConfigError(
            f"Invalid SMP CPUs {config.smp}. The max CPUs supported by machine "
            f"'{config.machine_type}' is {MAX_CPUS}"
        )


def _create_accel(names: Sequence[str]) -> Accelerator:
    """The first accelerator of `names` that this host has; says on stderr when it falls back."""
    problems: list[str] = []
    for name in names:
        try:
            accel = _accelerator(name)
        except CprError as error:
            problems.append(f"-accel {name}: {error}")
            continue
        for problem in problems:
            report.error_report(problem)
        if problems:
            report.error_report(f"falling back to {name}")
        return accel
    raise ConfigError("\ncpr-vmm: ".join(problems))


def _create_ram(config: Config, memory: GuestMemory, fds: PreservedFds) -> None:
    backend_id = config.machine.get("memory-backend")
    if backend_id is None:
        ram = create_default_block("pc.ram", config.ram_size, fds)
    else:
        ram = _create_backend(config, str(backend_id), fds)
    memory.add_block(ram)
    if ram.prealloc and not fds.incoming:  # after an exec the guest runs first
        populate(ram)
    low = ram.size if ram.size < LOW_RAM_LIMIT else LOW_RAM_SPLIT
    share = bool(config.machine.get("aux-ram-share", False))
    bios = memory.add_block(create_aux_block("pc.bios", BIOS_SIZE, share, fds))
    rom = memory.add_block(create_aux_block("pc.rom", ROM_SIZE, share, fds))
    bios.readonly = rom.readonly = True
    if not bios.kept:  # its guest may be running
        bios.write(0, _bios())
    conventional = min(low, VGA_ADDRESS)
    memory.add_section(0, conventional, ram, 0, False, "ram-below-4g")
    memory.add_section(ROM_ADDRESS, ROM_SIZE, rom, 0, True, "pc.rom")
    isa_offset = BIOS_SIZE - ISA_BIOS_SIZE
    memory.add_section(ISA_BIOS_ADDRESS, ISA_BIOS_SIZE, bios, isa_offset, True, "isa-bios")
    extended = 1 << 20
    if low > extended:
        memory.add_section(extended, low - extended, ram, extended, False, "ram-below-4g")
    memory.add_section(BIOS_ADDRESS, BIOS_SIZE, bios, 0, True, "pc.bios")
    if ram.size > low:
        memory.add_section(4 * GIB, ram.size - low, ram, low, False, "ram-above-4g")


def _accelerator(name: str) -> Accelerator:
    if name == "kvm":
        from cpr.accel.kvm import KvmAccelerator

        return KvmAccelerator()
    if name == "tcg":
        from cpr.accel.tcg import TcgAccelerator

        return TcgAccelerator()
    raise ConfigError(f"invalid accelerator {name}")


def _create_backend(config: Config, backend_id: str, fds: PreservedFds) -> RAMBlock:
    backend = next((o for o in config.objects if o.id == backend_id), None)
    if backend is None:
        raise ConfigError(f"Memory backend '{backend_id}' not found")
    block = create_backend_block(backend, fds)
    if block.size != config.ram_size:
        block.close()
        raise ConfigError("Machine memory size does not match the size of the memory backend")
    return block


def _bios() -> bytes:
    """A BIOS whose reset vector jumps to the boot sector; every other byte halts."""
    rom = bytearray([HLT]) * BIOS_SIZE
    rom[RESET_VECTOR : RESET_VECTOR + len(JUMP_TO_BOOT)] = JUMP_TO_BOOT
    return bytes(rom)


class Board:
    """What a device is made with: the machine, and what several devices share, made on demand."""

    def __init__(self, config: Config, machine: Machine, fds: PreservedFds) -> None:
        self.config = config
        self.machine = machine
        self.fds = fds
        self.is_incoming = bool(config.incoming)
        self.ram_size = config.ram_size
        self._drives_taken: set[str] = set()
        self._netdevs_taken: list[str] = []
        self._pci_host: PciHost | None = None
        self._type1: Type1 | None = None
        self._iommufds: dict[str, IommufdBackend] = {}

    def take_drive(self, name: str, owner: str) -> DriveConfig:
        """The -drive of this id, for one device; errors name `owner`.  Raises ConfigError."""
        drive = next((each for each in self.config.drives if each.id == name), None)
        if drive is None:
            raise ConfigError(f"Property '{owner}.drive' can't find value '{name}'")
        if drive.interface not in (NONE, VIRTIO) or name in self._drives_taken:
            raise ConfigError(f"Property '{owner}.drive' can't take value '{name}', it's in use")
        self._drives_taken.add(name)
        return drive

    def take_netdev(self, name: str, owner: str) -> tuple[NetdevConfig, int]:
        """The -netdev of this id, for one card, and how many were taken before it.

        Errors name `owner`.  Raises ConfigError.
        """
        netdev = next((each for each in self.config.netdevs if each.id == name), None)
        if netdev is None:
            raise ConfigError(f"Property '{owner}.netdev' can't find value '{name}'")
        if name in self._netdevs_taken:
            raise ConfigError(f"Property '{owner}.netdev' can't take value '{name}', it's in use")
        self._netdevs_taken.append(name)
        return netdev, len(self._netdevs_taken) - 1

    def pci_host(self) -> PciHost:
        """The PCI bus; a machine has one as soon as it has a PCI device."""
        if self._pci_host is None:
            from cpr.devices.pci import PciHost

            self._pci_host = PciHost()
            self.machine.add_device(self._pci_host)
        return self._pci_host

    def type1(self) -> Type1:
        if self._type1 is None:
            from cpr.devices.vfio import Type1

            self._type1 = Type1(self.fds, self.machine.add_device)
        return self._type1

    def iommufd(self, identifier: str) -> IommufdBackend:
        """The backend of -object iommufd,id=`identifier`, opened.  Raises CprError."""
        from cpr.devices.iommufd import IommufdBackend, passed_fd

        if identifier not in self._iommufds:
            objects = {o.id: o for o in self.config.objects if o.qom_type == "iommufd"}
            if identifier not in objects:
                raise ConfigError(f"Device '{identifier}' not found")
            passed = passed_fd(objects[identifier].properties.get("fd"))
            number = len(self._iommufds)
            backend = IommufdBackend(identifier, passed, self.fds, number)
            self.machine.add_device(backend)
            self._iommufds[identifier] = backend
        return self._iommufds[identifier]


def _create_devices(board: Board) -> None:
    config, machine = board.config, board.machine
    machine.add_device(Timers())
    if machine.accel.kernel_irqchip:
        for part in range(len(machine.vcpus) + 1):
            machine.add_device(NativeState(part))
    machine.add_device(GuestClock())
    for vcpu in machine.vcpus:
        machine.add_device(VCpuState(vcpu))
    _create_interrupts(machine)
    rtc = Mc146818Rtc(config.rtc.get("base", "utc"), config.rtc.get("clock", "host"))
    for device in (Port92(), I8042(), Piix4Pm(), rtc):
        machine.add_device(device)
    for index, chardev in enumerate(config.serials):
        if chardev is not None:
            isa_serial.add(machine, index, chardev)
    for device_config in config.devices:
        model = DEVICES.get(device_config.driver)
        if model is None:
            raise ConfigError(
                f"{device_config.location}: '{device_config.driver}' is not a valid device model "
                "name"
            )
        try:
            __import__(model.module, fromlist=["create"]).create(board, device_config)
        except (CprError, ValueError) as error:
            raise ConfigError(f"{device_config.location}: {error}") from None


def _create_interrupts(machine: Machine) -> None:
    """The interrupt controllers and the timer: in the kernel, or emulated here."""
    accel = machine.accel
    pic = I8259Pair()
    bus = ApicBus(pic)
    apics = [LocalApic(vcpu.index, bus) for vcpu in machine.vcpus]
    ioapic, pit = IOApic(bus), I8254()
    for device in (*apics, pic.master, pic.slave, ioapic, pit, PcSpeaker(pit)):
        machine.add_device(device)
    if accel.kernel_irqchip:
        machine.add_device(ParavirtualClock())
        machine.irq_handlers.append(accel.set_irq)
        return
    machine.irq_handlers += [pic.set_irq, ioapic.set_irq]
    machine.message_handler = bus.signal_message
    for vcpu, apic in zip(machine.vcpus, apics, strict=True):
        vcpu.interrupt_source = apic
