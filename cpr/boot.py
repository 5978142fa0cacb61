"""What a machine starts with: the first sector of a drive, or the -kernel image.

A bzImage of Linux is the matter of `linux_boot`.

A boot sector starts at 0:7c00 in real mode, as a BIOS leaves it.  A flat -kernel image is loaded
at 0x10000 and entered there in real mode (segment 0x1000, offset 0).  An ELF image is loaded by
its program headers and entered at e_entry: ELF32 in flat protected mode without paging, ELF64 in
long mode with the first 4 GiB identity-mapped.  GDT and page tables are at 0xf00 to 0x7000, the
stack is below.
"""

from __future__ import annotations

import errno
import os
import stat

from cpr.accel import x86
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from cpr.config import Config, DriveConfig
    from cpr.memory import GuestMemory

HANDED = ("/dev/fd/", "/proc/self/fd/")  # a pipe there is open already, a shell's <(…)
SECTOR = 512
BOOT_ADDRESS = 0x7C00
BOOT_SIGNATURE = b"\x55\xaa"
BIOS_DRIVE_NUMBERS = {"floppy": 0x00, "ide": 0x80, "none": 0x80}

FLAT_ADDRESS = 0x10000
FLAT_SEGMENT = 0x1000
FLAT_STACK = 0xFFFE

GDT_ADDRESS = 0xF00
PAGE_TABLES = 0x1000  # PML4, PDPT, then four page directories of 2 MiB pages
ELF_STACK = GDT_ADDRESS
CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR = 0x10, 0x18, 0x20

MAX_FILE_SIZE = 256 << 20
"""Bytes of a -kernel file, and of all its segments together as far as they are in it."""

MAX_LOADED_SIZE = 4 << 30
"""Bytes of all segments of an ELF image together in memory."""

ZEROS = bytes(1 << 20)
PAGE_PRESENT_WRITABLE = 0x3
PAGE_HUGE = 0x80


class BootImage:
    """Bytes to load, by guest-physical address, and the state in which vCPU 0 starts.

    `cleared` are the address and the size of what must be zero.
    """

    __slots__ = ("cleared", "loads", "registers")

    def __init__(
        self,
        loads: list[tuple[int, bytes]],
        registers: dict,
        cleared: list[tuple[int, int]] | None = None,
    ) -> None:
        self.loads = loads
        self.cleared = cleared or []
        self.registers = registers

    def load(self, memory: GuestMemory) -> dict:
        """Writes the image into guest RAM; returns the state for vCPU 0.

        Raises ConfigError where an address has no RAM.
        """
        sizes = [(address, len(data)) for address, data in self.loads]
        for address, size in (*sizes, *self.cleared):
            end = memory.find(address + max(size, 1) - 1)
            if memory.find(address) is None or end is None:
                raise ConfigError(
                    f"the boot image needs RAM at {address:#x} to {address + size:#x}: "
                    "give the guest more with -m"
                )
        for address, data in self.loads:
            memory.write(address, data)
        for address, size in self.cleared:
            for offset in range(0, size, len(ZEROS)):
                memory.write(address + offset, ZEROS[: size - offset])
        return self.registers


def create(config: Config, acpi: Callable[[], bytes] = bytes) -> BootImage:
    """Reads the boot image that the configuration names; `acpi` makes the tables for a Linux.

    Raises ConfigError where it cannot be read or cannot boot.
    """
    if config.kernel:
        return _kernel(config, config.kernel, acpi)
    taken = {device.properties.get("drive") for device in config.devices}
    for drive in sorted(config.drives, key=lambda drive: _rank(config.boot_order, drive)):
        if drive.file and drive.id not in taken:
            return _boot_sector(drive)
    if taken - {None}:
        raise ConfigError(
            "nothing to boot: no firmware would boot from a disk on virtio; give its kernel with "
            "-kernel FILE"
        )
    raise ConfigError(
        "nothing to boot: give -drive file=IMAGE,format=raw,if=floppy or -kernel FILE"
    )


def _rank(order: str, drive: DriveConfig) -> int:
    """The drive's place in -boot order=: a and b are floppies, c is a disk."""
    letters = "ab" if drive.interface == "floppy" else "c"
    return min(order.find(letter) % (len(order) + 1) for letter in letters)


def _open(path: str) -> BinaryIO:
    """A file that is read again at each reset.  Raises OSError, also for a named pipe: whoever
    opens one waits, and here all of the VMM.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and not path.startswith(HANDED):
        os.close(fd)
        raise OSError(errno.ESPIPE, "it is a pipe: give a file")
    os.set_blocking(fd, True)
    return open(fd, "rb")


def _boot_sector(drive: DriveConfig) -> BootImage:
    assert drive.file is not None
    try:
        with _open(drive.file) as file:
            sector = file.read(SECTOR)
    except OSError as error:
        raise ConfigError(f"Could not open '{drive.file}': {error.strerror}") from None
    if len(sector) < SECTOR or sector[510:512] != BOOT_SIGNATURE:
        raise ConfigError(f"'{drive.file}' is not bootable: its first sector does not end in 55 aa")
    state = x86.reset_state(0)
    _enter_real_mode(state, 0, BOOT_ADDRESS, 0, BOOT_ADDRESS)
    state["env.regs"][x86.RDX] = BIOS_DRIVE_NUMBERS.get(drive.interface, 0x80)
    return BootImage([(BOOT_ADDRESS, sector)], state)


def _kernel(config: Config, path: str, acpi: Callable[[], bytes]) -> BootImage:
    from cpr.linux_boot import LinuxImage, is_bzimage, read_initrd

    data = read_file("kernel", path, MAX_FILE_SIZE)
    if is_bzimage(data):
        initrd = read_initrd(config.initrd) if config.initrd is not None else b""
        return LinuxImage(path, data, config.append or "", initrd, acpi)
    if config.initrd is not None:
        raise ConfigError(
            f"-initrd goes with a bzImage of Linux, and '{path}' is none: leave out -initrd"
        )
    if data[:4] == b"\x7fELF":
        return _elf(path, data)
    state = x86.reset_state(0)
    _enter_real_mode(state, FLAT_SEGMENT, 0, FLAT_SEGMENT, FLAT_STACK)
    return BootImage([(FLAT_ADDRESS, data)], state)


def read_file(option: str, path: str, largest: int) -> bytes:
    """What -kernel or -initrd names.  Raises ConfigError, also for more than `largest` bytes."""
    try:
        with _open(path) as file:
            pieces, left = [], largest + 1
            while left > 0 and (piece := file.read(min(left, len(ZEROS)))):
                pieces.append(piece)
                left -= len(piece)
    except OSError as error:
        raise ConfigError(f"could not open {option} file '{path}': {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"could not open {option} file {path!r}: it has a NUL in it") from None
    data = b"".join(pieces)
    if len(data) > largest:
        raise ConfigError(f"{option} file '{path}' is larger than {largest >> 20} MiB")
    if not data:
        raise ConfigError(f"{option} file '{path}' is empty")
    return data


def _enter_real_mode(state: dict, code: int, ip: int, data: int, stack: int) -> None:
    state["env.segs"] = [x86.real_mode_segment(data) for _ in range(6)]
    state["env.segs"][x86.CS] = x86.real_mode_segment(code)
    state["env.segs"][x86.CS]["flags"] |= 8 << x86.FLAG_TYPE_SHIFT  # code
    state["env.eip"] = ip
    state["env.regs"][x86.RSP] = stack
    state["env.idt"] = x86.segment(limit=0x3FF)


def waking_registers(vector: int) -> dict:
    """vCPU 0 after a sleep, at physical `vector` below 1 MiB, in real mode (ACPI 6.5, 5.2.10)."""
    state = x86.reset_state(0)
    _enter_real_mode(state, vector >> 4, vector & 0xF, 0, BOOT_ADDRESS)
    return state


class _Elf:
    """The header and the loadable segments of an x86 ELF image (System V ABI, chapter 4 and 5)."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._data = data
        self.is_64 = self._number(4, 1) == 2
        machine = self._number(18, 2)
        if self._number(5, 1) != 1 or machine != (62 if self.is_64 else 3):
            raise ConfigError(
                f"kernel '{path}' is an ELF image, but not for x86 (machine {machine})"
            )
        self.entry = self._number(24, 8 if self.is_64 else 4)
        self.loads: list[tuple[int, bytes]] = []
        self.cleared: list[tuple[int, int]] = []
        self._take_segments()
        if not self.loads and not self.cleared:
            raise ConfigError(f"kernel '{path}' has no loadable segment")

    def _number(self, offset: int, size: int) -> int:
        if offset + size > len(self._data):
            raise ConfigError(f"kernel '{self._path}' is cut short: no ELF header at {offset:#x}")
        return int.from_bytes(self._data[offset : offset + size], "little")

    def _take_segments(self) -> None:
        if self.is_64:
            table, entry_size, count = self._number(32, 8), self._number(54, 2), self._number(56, 2)
            offset_at, address_at, file_size_at, size_at, width = 8, 24, 32, 40, 8
        else:
            table, entry_size, count = self._number(28, 4), self._number(42, 2), self._number(44, 2)
            offset_at, address_at, file_size_at, size_at, width = 4, 12, 16, 20, 4
        in_file = in_memory = 0
        for header in range(table, table + entry_size * count, entry_size or 1):
            if self._number(header, 4) != 1:  # PT_LOAD
                continue
            offset = self._number(header + offset_at, width)
            address = self._number(header + address_at, width)
            file_size = self._number(header + file_size_at, width)
            size = self._number(header + size_at, width)
            if offset + file_size > len(self._data) or size < file_size or size > 1 << 32:
                raise ConfigError(f"kernel '{self._path}' is cut short: a segment is not all there")
            in_file, in_memory = in_file + file_size, in_memory + size
            if in_file > MAX_FILE_SIZE or in_memory > MAX_LOADED_SIZE:
                raise ConfigError(f"kernel '{self._path}': its segments are too large together")
            if file_size:
                self.loads.append((address, self._data[offset : offset + file_size]))
            if size > file_size:
                self.cleared.append((address + file_size, size - file_size))


def _elf(path: str, data: bytes) -> BootImage:
    elf = _Elf(path, data)
    state, loads = flat_mode(elf.entry, elf.is_64)
    return BootImage([*loads, *elf.loads], state, elf.cleared)


def flat_mode(entry: int, is_64: bool) -> tuple[dict, list[tuple[int, bytes]]]:
    """vCPU 0 at `entry` with flat segments, in long mode or without paging; the tables for it."""
    state = x86.reset_state(0)
    state["env.regs"] = [0] * 16
    state["env.eip"] = entry
    state["env.gdt"] = x86.segment(base=GDT_ADDRESS, limit=0x2F)
    state["env.regs"][x86.RSP] = ELF_STACK
    data_flags = x86.FLAG_P | x86.FLAG_S | 3 << x86.FLAG_TYPE_SHIFT | x86.FLAG_DB | x86.FLAG_G
    code_flags = x86.FLAG_P | x86.FLAG_S | 0xB << x86.FLAG_TYPE_SHIFT | x86.FLAG_G
    code_flags |= x86.FLAG_L if is_64 else x86.FLAG_DB
    segments = [x86.segment(DATA_SELECTOR, 0, 0xFFFFFFFF, data_flags) for _ in range(6)]
    segments[x86.CS] = x86.segment(CODE_SELECTOR, 0, 0xFFFFFFFF, code_flags)
    state["env.segs"] = segments
    tss_flags = x86.FLAG_P | 0xB << x86.FLAG_TYPE_SHIFT
    state["env.tr"] = x86.segment(TSS_SELECTOR, 0, 0x67, tss_flags)
    loads = [(GDT_ADDRESS, _gdt([code_flags, data_flags], tss_flags))]
    cr0 = x86.CR0_PE | x86.CR0_ET
    if is_64:
        loads.append((PAGE_TABLES, _identity_map()))
        state["env.cr"] = [cr0 | x86.CR0_PG, 0, 0, PAGE_TABLES, x86.CR4_PAE]
        state["env.efer"] = x86.EFER_LME | x86.EFER_LMA
    else:
        state["env.cr"] = [cr0, 0, 0, 0, 0]
    return state, loads


def _gdt(flat: list[int], tss: int) -> bytes:
    """Two null descriptors, the flat segments at 0x10 and 0x18, and a 16-byte TSS at 0x20."""
    table = bytes(16)
    for flags in flat:
        table += (flags << 32 | 0xF << 48 | 0xFFFF).to_bytes(8, "little")
    return table + (tss << 32 | 0x67).to_bytes(16, "little")


def _identity_map() -> bytes:
    """Page tables that map the first 4 GiB onto themselves with 2 MiB pages."""
    pdpt = PAGE_TABLES + 0x1000
    directories = PAGE_TABLES + 0x2000
    pml4_page = (pdpt | PAGE_PRESENT_WRITABLE).to_bytes(8, "little").ljust(0x1000, b"\0")
    entries = [directories + 0x1000 * i | PAGE_PRESENT_WRITABLE for i in range(4)]
    pdpt_page = b"".join(entry.to_bytes(8, "little") for entry in entries).ljust(0x1000, b"\0")
    pages = [i << 21 | PAGE_HUGE | PAGE_PRESENT_WRITABLE for i in range(4 * 512)]
    return pml4_page + pdpt_page + b"".join(page.to_bytes(8, "little") for page in pages)
