"""cpr.linux_boot: what lies where in RAM, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cpr import boot, linux_boot
from cpr.accel import x86
from cpr.acpi.tables import RSDP_ADDRESS, TABLES_ADDRESS
from cpr.errors import ConfigError

MIB = 1 << 20
SETUP_SECTORS = 1
PREFERRED, INIT_SIZE = 16 * MIB, 8 * MIB


def image(version=0x20F, flags=1, protected=b"\x90" * 4096, command_line_size=64) -> bytes:
    """A bzImage whose kernel is `protected`."""
    data = bytearray((SETUP_SECTORS + 1) * 512)

    def put(offset: int, size: int, value: int) -> None:
        data[offset : offset + size] = value.to_bytes(size, "little")

    data[0x202:0x206] = b"HdrS"
    put(0x1F1, 1, SETUP_SECTORS)
    put(0x1FE, 2, 0xAA55)
    put(0x201, 1, 0x268 - 0x202)
    put(0x206, 2, version)
    put(0x22C, 4, 0x7FFFFFFF)
    put(0x236, 2, flags)
    put(0x238, 4, command_line_size)
    put(0x258, 8, PREFERRED)
    put(0x260, 4, INIT_SIZE)
    return bytes(data) + protected


class Memory:
    """RAM with the hole of a PC below 1 MiB; keeps what is written."""

    def __init__(self, size: int) -> None:
        parts = ((0, 0xA0000), (MIB, size - MIB))
        self.sections = [SimpleNamespace(start=s, size=n, readonly=False) for s, n in parts]
        self.written: dict[int, bytes] = {}

    def find(self, address: int) -> object:
        return next((s for s in self.sections if s.start <= address < s.start + s.size), None)

    def write(self, address: int, data: bytes) -> None:
        self.written[address] = data


@pytest.fixture
def make(tmp_path):
    """Makes the boot image of a kernel with these bytes."""

    def create(kernel: bytes, append=None, initrd: bytes | None = None):
        (tmp_path / "bzImage").write_bytes(kernel)
        if initrd is not None:
            (tmp_path / "initrd").write_bytes(initrd)
        config = SimpleNamespace(
            kernel=str(tmp_path / "bzImage"),
            append=append,
            initrd=None if initrd is None else str(tmp_path / "initrd"),
            drives=(),
        )
        return boot.create(config, lambda: b"tables")

    return create


def number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def test_what_lies_where(make) -> None:
    memory = Memory(64 * MIB)
    state = make(image(), "console=ttyS0", b"initrd" * 1000).load(memory)
    assert state["env.eip"] == MIB + 0x200
    assert state["env.regs"][x86.RSI] == linux_boot.ZERO_PAGE
    assert state["env.efer"] & x86.EFER_LMA
    assert memory.written[MIB] == b"\x90" * 4096
    assert memory.written[linux_boot.COMMAND_LINE] == b"console=ttyS0\0"
    assert memory.written[TABLES_ADDRESS] == b"tables"
    page = memory.written[linux_boot.ZERO_PAGE]
    assert page[0x202:0x206] == b"HdrS"
    assert number(page, 0x210, 1) == 0xFF
    assert number(page, 0x228, 4) == linux_boot.COMMAND_LINE
    assert number(page, 0x70, 8) == RSDP_ADDRESS
    place = number(page, 0x218, 4)
    assert memory.written[place] == b"initrd" * 1000
    assert number(page, 0x21C, 4) == 6000
    assert place % 4096 == 0
    assert place + 6000 <= 64 * MIB
    entries = [
        (number(page, at, 8), number(page, at + 8, 8), number(page, at + 16, 4))
        for at in range(0x2D0, 0x2D0 + 20 * page[0x1E8], 20)
    ]
    assert entries == [
        (0, 0x98000, 1),
        (0x98000, 0x8000, 4),
        (MIB, 63 * MIB, 1),
    ]


def test_a_reset_loads_the_same_again(make) -> None:
    made = make(image(), "", b"initrd")
    first, second = Memory(64 * MIB), Memory(64 * MIB)
    made.load(first)
    loads = list(made.loads)
    made.load(second)
    assert made.loads == loads
    assert second.written == first.written


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (image(version=0x20B), r"has no 64-bit entry \(boot protocol 2.11\): give -kernel one"),
        (image(flags=0), "has no 64-bit entry"),
        (image(protected=b""), "is cut short: give -kernel the whole bzImage"),
    ],
)
def test_kernels_that_are_refused(make, kernel, text) -> None:
    with pytest.raises(ConfigError, match=text):
        make(kernel)


def test_a_command_line_that_is_too_long(make) -> None:
    make(image(command_line_size=5), "12345")
    with pytest.raises(ConfigError, match=r"-append has 6 bytes, and kernel .* takes 5"):
        make(image(command_line_size=5), "123456")


def test_too_little_ram(make) -> None:
    with pytest.raises(ConfigError, match=r"needs 24 MiB of RAM, and the guest has 23 MiB: give"):
        make(image()).load(Memory(23 * MIB))
    make(image()).load(Memory(24 * MIB))
    with pytest.raises(ConfigError, match=r"with its initrd needs 25 MiB .* more with -m"):
        make(image(), initrd=b"x").load(Memory(24 * MIB))


def test_an_initrd_that_is_not_there(make, tmp_path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image())
    config = SimpleNamespace(kernel=str(kernel), append=None, initrd="/nowhere", drives=())
    with pytest.raises(ConfigError, match="could not open initrd file '/nowhere': No such file"):
        boot.create(config)


def test_an_initrd_for_another_kernel(make) -> None:
    with pytest.raises(ConfigError, match="-initrd goes with a bzImage of Linux"):
        make(b"\xf4", initrd=b"x")
