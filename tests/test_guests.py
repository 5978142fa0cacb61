"""The bundled guests: what the build makes of them, their documented addresses, churn's checks."""

from __future__ import annotations

import configparser
import re
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLES = PROJECT / "examples"
SOURCES = sorted(EXAMPLES.glob("*.S"))
CONFIGURATIONS = sorted(set(EXAMPLES.glob("*.cfg")) - {EXAMPLES / "linux.cfg"})  # no boot sector
GUESTS = [source.stem for source in SOURCES]

SECTOR_SIZE = 512
FLOPPY_SIZE = 1474560
BOOT_ADDRESS = 0x7C00
WIDTHS = {"byte": 1, "word": 2, "dword": 4, "qword": 8}

RAM_SIZE = 64 << 20
ROUND_SHIFT = 32
PAGE_SHIFT = 12


@pytest.fixture(scope="session")
def build() -> Path:
    """The directory of the built guests."""
    subprocess.run(["make", "--silent", "-C", EXAMPLES], check=True)
    return EXAMPLES / "build"


def symbols(build: Path, guest: str) -> dict[str, int]:
    lines = (build / f"{guest}.sym").read_text().splitlines()
    return {name: int(address, 16) for address, name in map(str.split, lines)}


def source_map(guest: str) -> dict[str, tuple[int, str]]:
    """Name to (address, width) by the first comment of the guest's source."""
    comment = (EXAMPLES / f"{guest}.S").read_text().partition("*/")[0]
    rows = re.findall(r"^ \*   (0x\w+) +(\S+) +([A-Z]\w*) +\S", comment, re.MULTILINE)
    return {name: (int(address, 16), width) for address, width, name in rows}


def readme_map(guest: str) -> dict[str, tuple[int, str]]:
    """The same by the table in the README."""
    pattern = rf"^\| {re.escape(guest)} \| (0x\w+) \| (\S+) \| (\w+) \|"
    rows = re.findall(pattern, (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    return {name: (int(address, 16), width) for address, width, name in rows}


def size_of(width: str) -> int:
    unit, _, count = width.rstrip("]").partition("[")
    return WIDTHS[unit] * int(count or 1)


@pytest.mark.parametrize("guest", GUESTS)
def test_image_is_a_floppy_with_a_boot_sector(build: Path, guest: str) -> None:
    image = (build / f"{guest}.img").read_bytes()
    assert len(image) == FLOPPY_SIZE
    assert image[SECTOR_SIZE - 2 : SECTOR_SIZE] == b"\x55\xaa"
    assert image[:SECTOR_SIZE] == (build / f"{guest}.bin").read_bytes()
    assert any(image[: SECTOR_SIZE - 2])
    assert not any(image[SECTOR_SIZE:])


@pytest.mark.parametrize("guest", GUESTS)
def test_addresses_are_the_documented_ones(build: Path, guest: str) -> None:
    documented = source_map(guest)
    assert symbols(build, guest) == {name: address for name, (address, _) in documented.items()}
    assert readme_map(guest) == documented


@pytest.mark.parametrize("guest", GUESTS)
def test_memory_map_does_not_overlap(guest: str) -> None:
    fields = [(start, start + size_of(width)) for start, width in source_map(guest).values()]
    fields.append((BOOT_ADDRESS, BOOT_ADDRESS + SECTOR_SIZE))
    for (_, end), (start, _) in pairwise(sorted(fields)):
        assert end <= start


@pytest.mark.parametrize(("guest", "elf_class"), [("churn", 2), ("halt", 2), ("smp", 1)])
def test_elf_image_loads_the_same_sector(build: Path, guest: str, elf_class: int) -> None:
    elf = (build / f"{guest}.elf").read_bytes()
    assert elf[:5] == b"\x7fELF" + bytes([elf_class])
    if elf_class == 2:
        entry, table = struct.unpack_from("<QQ", elf, 24)
        kind, _, offset, _, address, size, _ = struct.unpack_from("<IIQQQQQ", elf, table)
    else:
        entry, table = struct.unpack_from("<II", elf, 24)
        kind, offset, _, address, size = struct.unpack_from("<IIIII", elf, table)
    assert (kind, address, size) == (1, BOOT_ADDRESS, SECTOR_SIZE)
    assert elf[offset : offset + size] == (build / f"{guest}.bin").read_bytes()
    assert BOOT_ADDRESS < entry < BOOT_ADDRESS + SECTOR_SIZE - 2


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configuration_boots_its_guest_in_shared_memory(build: Path, path: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read(path)
    values = {
        section: {key: value.strip('"') for key, value in parser[section].items()}
        for section in parser.sections()
    }
    assert PROJECT / values["drive"]["file"] == build / f"{path.stem}.img"
    backend = values[f'object "{values["machine"]["memory-backend"]}"']
    assert backend["qom-type"] == "memory-backend-memfd"
    assert backend["share"] == values["machine"]["aux-ram-share"] == "on"
    assert backend["size"] == values["memory"]["size"]
    monitor = values['mon "monitor"']
    assert f'chardev "{monitor["chardev"]}"' in values


def test_every_guest_that_runs_on_has_a_configuration() -> None:
    names = {path.stem for path in CONFIGURATIONS}
    assert names == {
        "churn",
        "console",
        "halt",
        "heartbeat",
        "lapic-timer",
        "smp",
        "sweep",
        "timer",
    }


class Churn:
    """churn under the unicorn library, on a range of a few pages, up to the start of a round."""

    START = 0x100000
    PAGES = 4

    def __init__(self, build: Path) -> None:
        unicorn = pytest.importorskip("unicorn")
        self.address = symbols(build, "churn")
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
        self.uc.mem_map(0, RAM_SIZE)
        self.uc.mem_write(BOOT_ADDRESS, (build / "churn.bin").read_bytes())
        self.write("START", self.START)
        self.write("END", self.START + (self.PAGES << PAGE_SHIFT))
        self.tampering: dict[int, tuple[int, int]] = {}  # round: (address, value) put there
        self.last_round = 0
        self.uc.hook_add(
            unicorn.UC_HOOK_MEM_WRITE,
            self._round_begins,
            begin=self.address["ROUND"],
            end=self.address["ROUND"],
        )

    def write(self, name: str, value: int) -> None:
        self.write_at(self.address[name], value)

    def read(self, name: str) -> int:
        return self.read_at(self.address[name])

    def write_at(self, address: int, value: int) -> None:
        self.uc.mem_write(address, struct.pack("<Q", value))

    def read_at(self, address: int) -> int:
        return struct.unpack("<Q", self.uc.mem_read(address, 8))[0]

    def page(self, index: int) -> int:
        return self.START + (index << PAGE_SHIFT)

    def run_rounds(self, rounds: int) -> None:
        self.last_round = rounds
        self.uc.emu_start(BOOT_ADDRESS, 0)

    def _round_begins(
        self, uc: object, access: int, address: int, size: int, value: int, data: object
    ) -> None:
        if value in self.tampering:
            self.write_at(*self.tampering[value])
        if value > self.last_round:
            self.uc.emu_stop()


@pytest.fixture
def churn(build: Path) -> Churn:
    return Churn(build)


@pytest.mark.tcg
def test_churn_leaves_round_and_page_frame_number_in_every_page(churn: Churn) -> None:
    churn.run_rounds(5)
    for index in range(churn.PAGES):
        page = churn.page(index)
        assert churn.read_at(page) == 5 << ROUND_SHIFT | page >> PAGE_SHIFT
    assert churn.read("PAGES") == 5 * churn.PAGES
    assert churn.read("HEARTBEAT") == 5 * churn.PAGES
    assert churn.read("MISMATCHES") == 0


@pytest.mark.tcg
@pytest.mark.parametrize(
    "found",
    [0, 1 << ROUND_SHIFT | 0x102, 2 << ROUND_SHIFT | 0x101],
    ids=["zeroed", "a round late", "of another page"],
)
def test_churn_counts_a_page_that_is_not_as_it_left_it(churn: Churn, found: int) -> None:
    page = churn.page(2)
    churn.tampering[3] = (page, found)
    churn.run_rounds(5)
    assert churn.read("MISMATCHES") == 1
    assert churn.read("MISMATCH_ADDRESS") == page
    assert churn.read("MISMATCH_FOUND") == found


@pytest.mark.tcg
def test_churn_ignores_what_was_there_before_the_first_round(churn: Churn) -> None:
    churn.write_at(churn.page(1), 0xDEADBEEF)
    churn.run_rounds(3)
    assert churn.read("MISMATCHES") == 0


@pytest.mark.tcg
def test_churn_takes_its_defaults_where_no_range_is_set(build: Path) -> None:
    churn = Churn(build)
    churn.write("START", 0)
    churn.write("END", 0)
    churn.write("DELAY", 7)
    churn.run_rounds(0)
    assert (churn.read("START"), churn.read("END")) == (16 << 20, 32 << 20)
    assert churn.read("DELAY") == 0
