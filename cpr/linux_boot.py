"""Linux's boot protocol (Documentation/arch/x86/boot.rst): a bzImage, entered in 64-bit mode.

0x00000  as for an ELF64 kernel: GDT, page tables of the first 4 GiB, stack
0x10000  the zero page (Documentation/arch/x86/zero-page.rst), whose address is in RSI
0x20000  the command line
0x98000  the ACPI tables
1 MiB    the kernel without its real-mode part; it is entered 0x200 behind that
top      the initrd, at the end of RAM below 4 GiB or of what the kernel can reach
"""

from __future__ import annotations

from cpr.accel import x86
from cpr.acpi.tables import RSDP_ADDRESS, TABLES_ADDRESS, TABLES_SIZE
from cpr.boot import BootImage, flat_mode, read_file
from cpr.constants import PAGE_SIZE
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.memory import GuestMemory

ZERO_PAGE = 0x10000
COMMAND_LINE = 0x20000
KERNEL_ADDRESS = 0x100000
ENTRY_64 = 0x200
SECTOR = 512
MAX_INITRD_SIZE = 2 << 30

# The setup header, by its offsets in the image, which are those in the zero page too.
SETUP_SECTS, BOOT_FLAG, JUMP_LENGTH, MAGIC, VERSION = 0x1F1, 0x1FE, 0x201, 0x202, 0x206
TYPE_OF_LOADER, RAMDISK_IMAGE, RAMDISK_SIZE, CMD_LINE_PTR = 0x210, 0x218, 0x21C, 0x228
INITRD_ADDR_MAX, XLOADFLAGS, CMDLINE_SIZE = 0x22C, 0x236, 0x238
PREF_ADDRESS, INIT_SIZE = 0x258, 0x260
HEADER_MAGIC = b"HdrS"
OLDEST_VERSION = 0x20C  # the first with xloadflags
XLF_KERNEL_64 = 1 << 0
LOADER_UNDEFINED = 0xFF
MOST_SETUP_SECTS_OMITTED = 4  # what 0 means

# The rest of the zero page.
ACPI_RSDP_ADDR, E820_ENTRIES, E820_TABLE = 0x70, 0x1E8, 0x2D0
E820_RAM, E820_RESERVED, E820_NVS = 1, 2, 4


def is_bzimage(data: bytes) -> bool:
    """Whether a -kernel file follows Linux's boot protocol, of whatever version."""
    return (
        data[MAGIC : MAGIC + 4] == HEADER_MAGIC and data[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa"
    )


class LinuxImage(BootImage):
    """A kernel with its command line and initrd; `acpi` makes the tables when they are loaded."""

    def __init__(
        self, path: str, data: bytes, append: str, initrd: bytes, acpi: Callable[[], bytes]
    ) -> None:
        """Raises ConfigError where the kernel cannot be booted like this."""
        self._path = path
        self._data = data
        self._initrd = initrd
        self._acpi = acpi
        version = self._field(VERSION, 2)
        if version < OLDEST_VERSION or not self._field(XLOADFLAGS, 2) & XLF_KERNEL_64:
            raise ConfigError(
                f"kernel '{path}' has no 64-bit entry (boot protocol {version >> 8}."
                f"{version & 0xFF:02}): give -kernel one for x86-64, of Linux 3.8 or later"
            )
        self._command_line = append.encode() + b"\0"
        longest = self._field(CMDLINE_SIZE, 4)
        if len(self._command_line) - 1 > longest:
            raise ConfigError(
                f"-append has {len(self._command_line) - 1} bytes, and kernel '{path}' takes "
                f"{longest}: make it shorter"
            )
        setup = ((data[SETUP_SECTS] or MOST_SETUP_SECTS_OMITTED) + 1) * SECTOR
        if len(data) <= setup + ENTRY_64:
            raise ConfigError(f"kernel '{path}' is cut short: give -kernel the whole bzImage")
        state, loads = flat_mode(KERNEL_ADDRESS + ENTRY_64, True)
        state["env.regs"][x86.RSI] = ZERO_PAGE
        loads += [(COMMAND_LINE, self._command_line), (KERNEL_ADDRESS, data[setup:])]
        super().__init__(loads, state)

    def _field(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def load(self, memory: GuestMemory) -> dict:
        ram = [(s.start, s.start + s.size) for s in memory.sections if not s.readonly]
        initrd = self._place_initrd(max(end for start, end in ram if start <= KERNEL_ADDRESS))
        loads = [
            *self.loads,
            *([(initrd, self._initrd)] if self._initrd else []),
            (TABLES_ADDRESS, self._acpi()),
            (ZERO_PAGE, self._zero_page(ram, initrd)),
        ]
        return BootImage(loads, self.registers).load(memory)

    def _place_initrd(self, end_of_ram: int) -> int:
        """Where the initrd goes.  Raises ConfigError where RAM is too small for all."""
        kernel_end = max(
            self._field(PREF_ADDRESS, 8) + self._field(INIT_SIZE, 4),
            KERNEL_ADDRESS + len(self._data),
        )
        needed = kernel_end + -(-len(self._initrd) // PAGE_SIZE) * PAGE_SIZE
        if needed > end_of_ram:
            what = f"kernel '{self._path}'" + (" with its initrd" if self._initrd else "")
            raise ConfigError(
                f"{what} needs {-(-needed >> 20)} MiB of RAM, and the guest has "
                f"{end_of_ram >> 20} MiB: give it more with -m"
            )
        highest = min(end_of_ram, self._field(INITRD_ADDR_MAX, 4) + 1)
        place = (highest - len(self._initrd)) // PAGE_SIZE * PAGE_SIZE
        if place < kernel_end:
            raise ConfigError(
                f"the initrd is too large for kernel '{self._path}', which reaches "
                f"{highest >> 20} MiB: make it smaller"
            )
        return place

    def _zero_page(self, ram: list[tuple[int, int]], initrd: int) -> bytes:
        page = bytearray(PAGE_SIZE)
        header_end = MAGIC + self._data[JUMP_LENGTH]
        page[SETUP_SECTS:header_end] = self._data[SETUP_SECTS:header_end]

        def put(offset: int, size: int, value: int) -> None:
            page[offset : offset + size] = value.to_bytes(size, "little")

        put(TYPE_OF_LOADER, 1, LOADER_UNDEFINED)
        put(CMD_LINE_PTR, 4, COMMAND_LINE)
        put(ACPI_RSDP_ADDR, 8, RSDP_ADDRESS)
        if self._initrd:
            put(RAMDISK_IMAGE, 4, initrd)
            put(RAMDISK_SIZE, 4, len(self._initrd))
        entries = _e820(ram)
        put(E820_ENTRIES, 1, len(entries))
        for number, (start, end, kind) in enumerate(entries):
            offset = E820_TABLE + 20 * number
            put(offset, 8, start)
            put(offset + 8, 8, end - start)
            put(offset + 16, 4, kind)
        return bytes(page)


def _e820(ram: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start, end, type) of RAM, with the ACPI tables cut out of it."""
    tables_end = TABLES_ADDRESS + TABLES_SIZE
    entries = []
    for start, end in sorted(ram):
        if start <= TABLES_ADDRESS < end:
            entries += [(start, TABLES_ADDRESS, E820_RAM), (TABLES_ADDRESS, tables_end, E820_NVS)]
            start = tables_end
        if start < end:
            entries.append((start, end, E820_RAM))
    return entries


def read_initrd(path: str) -> bytes:
    """Raises ConfigError."""
    return read_file("initrd", path, MAX_INITRD_SIZE)
