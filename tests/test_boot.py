"""cpr.boot: what is loaded where, and the state in which vCPU 0 starts."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from cpr import boot
from cpr.accel import x86
from cpr.errors import ConfigError

SECTOR = bytes(510) + b"\x55\xaa"


def config(kernel=None, *drives, order="cad"):
    boots = {"kernel": kernel, "drives": drives, "boot_order": order, "initrd": None}
    return SimpleNamespace(**boots, devices=())


def drive(path, interface="floppy"):
    return SimpleNamespace(file=str(path), interface=interface, id="d0")


def test_boot_sector_starts_at_7c00_in_real_mode(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(SECTOR + b"second sector")
    made = boot.create(config(None, drive(image)))
    assert made.loads == [(0x7C00, SECTOR)]
    state = made.registers
    assert (state["env.eip"], state["env.segs"][x86.CS]["base"]) == (0x7C00, 0)
    assert state["env.regs"][x86.RDX] == 0


def test_the_boot_order_decides(tmp_path):
    disk, floppy = tmp_path / "disk", tmp_path / "floppy"
    disk.write_bytes(b"\1" * 510 + b"\x55\xaa")
    floppy.write_bytes(SECTOR)
    drives = (drive(floppy), drive(disk, "ide"))
    assert boot.create(config(None, *drives, order="ac")).registers["env.regs"][x86.RDX] == 0
    assert boot.create(config(None, *drives, order="a")).registers["env.regs"][x86.RDX] == 0
    for order in ("cad", "c", "ca"):
        made = boot.create(config(None, *drives, order=order))
        assert made.registers["env.regs"][x86.RDX] == 0x80


def test_flat_kernel(tmp_path):
    path = tmp_path / "flat"
    path.write_bytes(b"\xf4")
    made = boot.create(config(str(path)))
    assert made.loads == [(0x10000, b"\xf4")]
    assert made.registers["env.segs"][x86.CS]["selector"] == 0x1000


@pytest.mark.parametrize(("guest", "long_mode"), [("halt.elf", True), ("smp.elf", False)])
def test_elf_kernel(guests, guest, long_mode):
    made = boot.create(config(str(guests / guest)))
    state = made.registers
    assert bool(state["env.efer"] & x86.EFER_LMA) == long_mode
    assert bool(state["env.cr"][0] & x86.CR0_PG) == long_mode
    code = state["env.segs"][x86.CS]
    assert bool(code["flags"] & x86.FLAG_L) == long_mode
    entry = state["env.eip"]
    assert any(address <= entry < address + len(data) for address, data in made.loads)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "Could not open '{path}': No such file or directory"),
        (b"short", "'{path}' is not bootable: its first sector does not end in 55 aa"),
        (bytes(512), "'{path}' is not bootable: its first sector does not end in 55 aa"),
    ],
)
def test_bad_drives(tmp_path, content, text):
    path = tmp_path / "image"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        boot.create(config(None, drive(path)))
    assert str(refused.value) == text.format(path=path)


def test_a_named_pipe_is_refused_and_one_that_was_handed_over_is_read(tmp_path):
    """Whoever opens a named one waits: a reset would, with all monitors."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is a pipe: give a file"):
        boot.create(config(None, drive(path)))
    with pytest.raises(ConfigError, match="is a pipe: give a file"):
        boot.create(config(str(path)))
    reader, writer = os.pipe()
    os.write(writer, SECTOR)
    os.close(writer)
    boot.create(config(None, drive(f"/dev/fd/{reader}")))
    os.close(reader)


@pytest.mark.parametrize("length", [4, 20, 52, 63, 100])
def test_a_cut_elf_is_refused(tmp_path, guests, length):
    path = tmp_path / "cut.elf"
    path.write_bytes((guests / "halt.elf").read_bytes()[:length])
    with pytest.raises(ConfigError, match="is cut short"):
        boot.create(config(str(path)))


def test_an_elf_of_another_machine_is_refused(tmp_path, guests):
    data = bytearray((guests / "halt.elf").read_bytes())
    data[18] = 183  # AArch64
    path = tmp_path / "arm.elf"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not for x86"):
        boot.create(config(str(path)))


def test_nothing_to_boot():
    with pytest.raises(ConfigError, match="nothing to boot"):
        boot.create(config())
