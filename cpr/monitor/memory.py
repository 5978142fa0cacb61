"""Commands that look into the guest: x, xp, print, memsave, pmemsave, info registers, …"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from cpr.accel.x86 import EFER_LMA
from cpr.errors import CommandError
from cpr.monitor import registers
from cpr.monitor.schema import Session
from cpr.ram_backend import overwrites

SAVE_CHUNK = 64 * 1024
LINE_BYTES = 16
MAX_DUMP = 128 << 10  # bytes that x and xp show at most, for the output is made in one go
PHYSICAL_END = 1 << 52  # what a guest-physical address can have at most (Intel SDM vol. 3, 4.1.4)
UNSIGNED_DIGITS = {1: 3, 2: 5, 4: 10, 8: 20}
OCTAL_DIGITS = {1: 3, 2: 6, 4: 11, 8: 22}


def dump_virtual(vmm: Any, session: Session, fmt: dict, addr: int) -> str:
    """x: through the page tables of the monitor's vCPU."""
    index = session.cpu_index
    state = vmm.machine.vcpu_state(index)  # once: the vCPU is interrupted for it
    return _dump(
        session,
        fmt,
        addr,
        "016x",
        lambda at, size: vmm.machine.read_virtual(index, at, size, state),
    )


def dump_physical(vmm: Any, session: Session, fmt: dict, addr: int) -> str:
    return _dump(session, fmt, addr, "08x", vmm.machine.read_physical)


def _dump(
    session: Session, fmt: dict, addr: int, width: str, read: Callable[[int, int], bytes]
) -> str:
    letter, size = _remember_format(session, fmt)
    if letter == "i":
        raise CommandError("disassembly (format i) is not supported; use x or d")
    if fmt["count"] * size > MAX_DUMP:
        raise CommandError("dumps end at 128 KiB; use memsave or pmemsave")
    unit = 1 if letter == "c" else size
    per_line = 8 if size == 1 else LINE_BYTES
    left = fmt["count"] * size
    lines = []
    while left > 0:
        address = addr % (1 << 64)
        piece = min(left, per_line)
        try:
            data = read(address, piece)
        except CommandError:
            lines.append(f"{address:{width}}: Cannot access memory\n")
            break
        cells = (data[at : at + unit] for at in range(0, piece, unit))
        row = "".join(f" {_show(letter, unit, int.from_bytes(c, 'little'))}" for c in cells)
        lines.append(f"{address:{width}}:{row}\n")
        addr += piece
        left -= piece
    return "".join(lines)


def _remember_format(session: Session, fmt: dict) -> tuple[str, int]:
    """The format and size to use: those given, else those of the last dump."""
    last_letter, last_size = session.dump_format
    letter, size = fmt["format"] or last_letter, fmt["size"] or last_size
    session.dump_format = (letter, size if letter != "i" else last_size)
    return letter, size


def _show(letter: str, size: int, value: int) -> str:
    if letter == "x":
        return f"0x{value:0{2 * size}x}"
    if letter == "o":
        return f"0{value:{OCTAL_DIGITS[size]}o}"
    if letter == "c":
        return _character(value)
    return f"{value:{UNSIGNED_DIGITS[size]}d}"


def _character(value: int) -> str:
    special = {0x27: "\\'", 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r"}
    if value in special:
        return f"'{special[value]}'"
    return f"'{chr(value)}'" if 32 <= value <= 126 else f"'\\x{value:02x}'"


def print_value(vmm: Any, session: Session, fmt: dict, val: int) -> str:
    letter, _ = _remember_format(session, fmt)
    if letter == "o":
        return f"0{val:o}\n" if val else "0\n"
    if letter == "x":
        return f"{val:#x}\n" if val else "0\n"
    if letter == "u":
        return f"{val}\n"
    if letter == "c":
        return _character(val & 0xFF) + "\n"
    return f"{val - (1 << 64) if val >> 63 else val}\n"


def save_virtual(
    vmm: Any, session: Session, val: int, size: int, filename: str, cpu_index: int | None = None
) -> None:
    """memsave.  Raises CommandError naming what is not mapped; the file then ends there."""
    index = session.cpu_index if cpu_index is None else cpu_index
    if not 0 <= index < len(vmm.machine.vcpus):
        raise CommandError("Parameter 'cpu-index' expects a CPU number")
    state = vmm.machine.vcpu_state(index)
    if size > 1 << 32 and not state["env.efer"] & EFER_LMA:  # it would go round and round
        raise CommandError(f"Invalid addr 0x{val:016x}/size {size} specified")

    def chunks() -> Iterator[bytes | int]:
        for at, piece in _pieces(val, size):
            try:
                yield vmm.machine.read_virtual(index, at, piece, state)
            except CommandError:
                raise CommandError(f"Invalid addr 0x{val:016x}/size {size} specified") from None

    _save(vmm, filename, chunks())


def save_physical(vmm: Any, val: int, size: int, filename: str) -> None:
    """pmemsave: what is no RAM is written as zeros."""
    if val + size > PHYSICAL_END:
        raise CommandError(f"Invalid addr 0x{val:016x}/size {size} specified")

    def chunks() -> Iterator[bytes | int]:
        at = val
        for first, last in _memory(vmm):
            begin, end = max(at, first), min(val + size, last + 1)
            if begin < end:
                yield begin - at
                yield from (
                    vmm.machine.read_physical(*each) for each in _pieces(begin, end - begin)
                )
                at = end
        yield val + size - at

    _save(vmm, filename, chunks())


def _memory(vmm: Any) -> list[tuple[int, int]]:
    """The first and the last address of each piece of RAM or ROM, ascending."""
    regions = vmm.machine.regions()
    return sorted((first, last) for first, last, _, kind, _ in regions if kind in ("ram", "rom"))


def _pieces(address: int, size: int) -> Iterator[tuple[int, int]]:
    """[address, address+size) in pieces that do not cross a multiple of SAVE_CHUNK."""
    end = address + size
    while address < end:
        piece = min(end - address, SAVE_CHUNK - address % SAVE_CHUNK)
        yield address % (1 << 64), piece
        address += piece


def _save(vmm: Any, filename: str, chunks: Iterator[bytes | int]) -> None:
    """A number is that many zeros: a hole, where the file can have one."""
    if refusal := overwrites(vmm.machine.files(), filename):
        raise CommandError(refusal)
    try:
        with open(filename, "wb", opener=_open) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.truncate()
            for chunk in chunks:
                if isinstance(chunk, bytes):
                    file.write(chunk)
                elif file.seekable():
                    file.seek(chunk, os.SEEK_CUR)
                else:
                    for _, piece in _pieces(0, chunk):
                        file.write(bytes(piece))
            if file.seekable():
                file.truncate()
    except OSError as error:
        if error.filename is not None:
            raise CommandError(f"Could not open '{filename}': {error.strerror}") from None
        raise CommandError(f"writing memory to '{filename}' failed: {error.strerror}") from None
    except ValueError:
        raise CommandError(f"Could not open {filename!r}: no file has such a name") from None


def _open(path: str, flags: int) -> int:
    """A FIFO that nobody reads must not hold the monitor, nor must the guest's own RAM be cut."""
    return os.open(path, (flags & ~os.O_TRUNC) | os.O_NONBLOCK, 0o666)


def info_registers(
    vmm: Any, session: Session, cpustate_all: bool = False, vcpu: int | None = None
) -> str:
    count = len(vmm.machine.vcpus)
    index = session.cpu_index if vcpu is None else vcpu
    if not cpustate_all and not 0 <= index < count:
        return f"CPU#{index} not available\n"
    texts = []
    for number in range(count) if cpustate_all else [index]:
        texts.append(f"\nCPU#{number}\n{registers.dump(vmm.machine.vcpu_state(number))}\n")
    return "".join(texts)


def set_cpu(vmm: Any, session: Session, index: int) -> str:
    if not 0 <= index < len(vmm.machine.vcpus):
        return "invalid CPU index\n"
    session.cpu_index = index
    return ""


def info_ramblock(vmm: Any) -> str:
    """QEMU's columns, and where a block has prealloc=on, how much of it is populated by now."""
    some_prealloc = any(block.prealloc for block in vmm.machine.blocks)
    lines = [
        f"{'Block Name':>24} {'PSize':>8}  {'Offset':>18} {'Used':>18} {'Total':>18} "
        f"{'HVA':>18}  RO{'           Populated' if some_prealloc else ''}\n"
    ]
    for block in vmm.machine.blocks:
        lines.append(
            f"{block.idstr:>24} {size_text(block.page_size):>8}  0x{block.offset:016x} "
            f"0x{block.size:016x} 0x{block.max_length:016x} 0x{block.host:016x}  "
            f"{'ro' if block.readonly else 'rw'}"
        )
        lines.append(f"  0x{block.populated:016x}\n" if block.prealloc else "\n")
    return "".join(lines)


def query_ramblock(vmm: Any) -> dict:
    return {"human-readable-text": info_ramblock(vmm)}


def info_mtree(vmm: Any) -> str:
    """The guest-physical map and the port space, each sorted by address."""
    spaces = (("memory", "system", (1 << 64) - 1, False), ("I/O", "io", 0xFFFF, True))
    text = ""
    for space, root, last, ports in spaces:
        text += f"address-space: {space}\n  {0:016x}-{last:016x} (prio 0, container): {root}\n"
        for first, end, name, kind, priority in sorted(vmm.machine.regions()):
            if (kind == "port") == ports:
                shown = "i/o" if ports else kind
                text += f"    {first:016x}-{end:016x} (prio {priority}, {shown}): {name}\n"
        text += "\n"
    return text


def query_memory_size_summary(vmm: Any) -> dict:
    base = sum(b.size for b in vmm.machine.blocks if b.backend.startswith("memory-backend-"))
    return {"base-memory": base, "plugged-memory": 0}


def memory_size_summary_text(result: dict) -> str:
    return f"base memory: {result['base-memory']}\nplugged memory: {result['plugged-memory']}\n"


def query_memdev(vmm: Any) -> list[dict]:
    """x-cpr-populated, which QEMU has not: the bytes that prealloc=on has populated by now."""
    return [
        {
            "id": block.idstr,
            "size": block.size,
            "merge": True,
            "dump": True,
            "prealloc": block.prealloc,
            "share": block.shared,
            "reserve": True,
            "host-nodes": [],
            "policy": "default",
            **({"x-cpr-populated": block.populated} if block.prealloc else {}),
        }
        for block in vmm.machine.blocks
        if block.backend.startswith("memory-backend-")
    ]


def memdev_text(result: list[dict]) -> str:
    text = ""
    for backend in result:
        text += f"memory backend: {backend['id']}\n  size:  {backend['size']}\n"
        for name in ("merge", "dump", "prealloc", "share", "reserve"):
            text += f"  {name}: {str(backend[name]).lower()}\n"
        text += f"  policy: {backend['policy']}\n  host nodes: \n\n"
    return text


def size_text(size: int) -> str:
    """A size in the largest unit that leaves at least 1000/1024 of it, with three digits."""
    exponent = 0
    while exponent < 6 and size * 1024 >= 1000 << 10 * (exponent + 1):
        exponent += 1
    unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")[exponent]
    return f"{size / (1 << 10 * exponent):.3g} {unit}"
