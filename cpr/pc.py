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

import errno
import sys

from cpr import boot
from cpr.devices.apic import Apic
from cpr.devices.debug import DEBUGCON_PORT, EXIT_PORT, EXIT_SIZE, DebugCon, DebugExit
from cpr.devices.i8254 import I8254
from cpr.devices.i8259 import I8259Pair
from cpr.devices.ioapic import IoApic
from cpr.devices.pckbd import I8042
from cpr.devices.piix4_pm import Piix4Pm
from cpr.devices.port92 import Port92
from cpr.devices.serial import Serial
from cpr.devices.system import KvmClock, Timers, VCpuState
from cpr.errors import ConfigError, CprError, KernelError
from cpr.machine import Machine
from cpr.ram import GuestMemory, create_aux_block, create_backend_block, create_default_block

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.accel.base import Accelerator
    from cpr.config import Config, DeviceConfig
    from cpr.events import EventBus
    from cpr.mainloop import MainLoop
    from cpr.state.fds import PreservedFds

GIB = 1 << 30
LOW_RAM_LIMIT = 0xE0000000  # RAM of this size or more leaves the PCI hole from 3 GiB on
LOW_RAM_SPLIT = 0xC0000000
BIOS_SIZE = 256 << 10
BIOS_ADDRESS = 4 * GIB - BIOS_SIZE
ISA_BIOS_SIZE = 128 << 10
ISA_BIOS_ADDRESS = 0xE0000
ROM_SIZE = 128 << 10
ROM_ADDRESS = 0xC0000
MAX_CPUS = 255
RESET_VECTOR = BIOS_SIZE - 16
JUMP_TO_BOOT = bytes((0xEA, 0x00, 0x7C, 0x00, 0x00))  # jmp far 0:7c00
HLT = 0xF4


def build(config: Config, fds: PreservedFds, loop: MainLoop, events: EventBus) -> Machine:
    """Makes a stopped machine in runstate prelaunch; the caller owns it.

    Descriptors that `fds` holds are taken over by the blocks of their names.  Raises ConfigError
    or KernelError; then everything that was made is freed again.
    """
    _check(config)
    accel = _create_accel(config.accels)
    memory = GuestMemory()
    machine = Machine(config, accel, memory, loop, events)
    try:
        _create_ram(config, memory, fds)
        for section in memory.sections:
            host = section.block.host + section.offset
            accel.map_ram(section.start, section.size, host, section.readonly)
        accel.create_irqchip()
        for index in range(config.smp):
            machine.vcpus.append(accel.create_vcpu(index))
        _create_devices(config, machine)
        machine.boot_image = lambda: boot.create(config)
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


def _create_accel(names: list[str]) -> Accelerator:
    """The first accelerator of `names` that can be had; says on stderr when it falls back."""
    problem: CprError | None = None
    for name in names:
        try:
            accel = _accelerator(name)
        except CprError as error:
            if problem is None:
                problem = error
            if name != names[-1]:
                print(f"cpr-vmm: -accel {name}: {error}", file=sys.stderr)
            continue
        if problem is not None:
            print(f"cpr-vmm: falling back to {name}", file=sys.stderr)
        return accel
    assert problem is not None
    if len(names) == 1:
        raise type(problem)(*_context(problem, names[0]))
    raise problem


def _create_ram(config: Config, memory: GuestMemory, fds: PreservedFds) -> None:
    backend_id = config.machine.get("memory-backend")
    if backend_id is None:
        ram = create_default_block("pc.ram", config.ram_size)
    else:
        ram = _create_backend(config, str(backend_id), fds)
    memory.add_block(ram)
    low = ram.size if ram.size < LOW_RAM_LIMIT else LOW_RAM_SPLIT
    share = bool(config.machine.get("aux-ram-share", False))
    bios = memory.add_block(create_aux_block("pc.bios", BIOS_SIZE, share, fds))
    rom = memory.add_block(create_aux_block("pc.rom", ROM_SIZE, share, fds))
    _write_bios(bios.buffer(0, BIOS_SIZE))
    conventional = min(low, ROM_ADDRESS)
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
