"""`info registers`: a vCPU's state in QEMU's layout, and the registers that $name means.

The state has the fields of x86.VMSTATE_CPU; the x87 and SSE registers are read from its XSAVE
area, whose first 512 bytes are laid out as by FXSAVE (Intel SDM vol. 1, table 10-2).
"""

from __future__ import annotations

from cpr.accel import x86

NAMES = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")  # in the order of env.regs
SHOWN = ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP")
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")

# Offsets in it.
FCW, FSW, FTW, MXCSR, ST0, XMM0 = 0, 2, 4, 24, 32, 160

FLAG_LETTERS = ((11, "O"), (10, "D"), (7, "S"), (6, "Z"), (4, "A"), (2, "P"), (0, "C"))
# System segment types (Intel SDM vol. 3, table 3-2), outside and in long mode.
SYSTEM_TYPES_32 = {
    1: "TSS16-avl",
    2: "LDT",
    3: "TSS16-busy",
    4: "CallGate16",
    5: "TaskGate",
    6: "IntGate16",
    7: "TrapGate16",
    9: "TSS32-avl",
    11: "TSS32-busy",
    12: "CallGate32",
    14: "IntGate32",
    15: "TrapGate32",
}
SYSTEM_TYPES_64 = {
    0: "<hiword>",
    2: "LDT",
    9: "TSS64-avl",
    11: "TSS64-busy",
    12: "CallGate64",
    14: "IntGate64",
    15: "TrapGate64",
}


def dump(state: dict) -> str:
    """The lines that `info registers` shows for one vCPU."""
    cr = state["env.cr"]
    long_mode = bool(state["env.efer"] & x86.EFER_LMA)
    protected = bool(cr[0] & x86.CR0_PE)
    code = state["env.segs"][x86.CS]
    wide = long_mode and bool(code["flags"] & x86.FLAG_L)
    lines = _general(state, wide) + [_flags_line(state, wide, protected)]
    named = list(zip(SEGMENTS, state["env.segs"], strict=True))
    named += [("LDT", state["env.ldt"]), ("TR", state["env.tr"])]
    for name, segment in named:
        lines.append(_segment(name, segment, wide, protected, long_mode))
    digits = 16 if wide else 8
    for name in ("GDT", "IDT"):
        table = state[f"env.{name.lower()}"]
        lines.append(f"{name}=     {_hex(table['base'], digits)} {table['limit']:08x}")
    lines.append(
        f"CR0={cr[0] & 0xFFFFFFFF:08x} CR2={_hex(cr[2], digits)} CR3={_hex(cr[3], digits)} "
        f"CR4={cr[4] & 0xFFFFFFFF:08x}"
    )
    dr = state["env.dr"]
    lines.append("".join(f"DR{i}={dr[i]:016x} " for i in range(4)))
    lines.append(f"DR6={dr[6]:016x} DR7={dr[7]:016x}")
    lines.append(f"EFER={state['env.efer']:016x}")
    lines += _fpu(state["env.xsave_buf"], 16 if wide else 8)
    return "\n".join(lines)


def _hex(value: int, digits: int) -> str:
    return f"{value & (1 << 4 * digits) - 1:0{digits}x}"


def _general(state: dict, wide: bool) -> list[str]:
    values = dict(zip(NAMES, state["env.regs"][:8], strict=True))
    prefix, digits = ("R", 16) if wide else ("E", 8)
    cells = [f"{prefix}{name}={_hex(values[name], digits)}" for name in SHOWN]
    if wide:
        cells += [f"R{i:<2}={_hex(state['env.regs'][i], 16)}" for i in range(8, 16)]
    return [" ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]


def _flags_line(state: dict, wide: bool, protected: bool) -> str:
    eflags = state["env.eflags"]
    letters = "".join(letter if eflags >> bit & 1 else "-" for bit, letter in FLAG_LETTERS)
    cpl = state["env.segs"][x86.SS]["flags"] >> x86.FLAG_DPL_SHIFT & 3 if protected else 0
    shadow = int(state["env.interrupt_shadow"] != 0)
    halted = int(state["env.mp_state"] == x86.MP_HALTED)
    name, digits = ("R", 16) if wide else ("E", 8)
    return (
        f"{name}IP={_hex(state['env.eip'], digits)} {name}FL={eflags & 0xFFFFFFFF:08x} [{letters}] "
        f"CPL={cpl} II={shadow} A20={int(state['env.a20_mask'] != 0)} SMM=0 HLT={halted}"
    )


def _segment(name: str, segment: dict, wide: bool, protected: bool, long_mode: bool) -> str:
    flags = segment["flags"]
    text = (
        f"{name:<3}={segment['selector']:04x} {_hex(segment['base'], 16 if wide else 8)} "
        f"{segment['limit']:08x} {flags:08x}"
    )
    if not protected or not flags & x86.FLAG_P:
        return text
    text += f" DPL={flags >> x86.FLAG_DPL_SHIFT & 3} "
    kind = flags >> x86.FLAG_TYPE_SHIFT & 15
    if not flags & x86.FLAG_S:
        return text + (SYSTEM_TYPES_64 if long_mode else SYSTEM_TYPES_32).get(kind, "Reserved")
    big = bool(flags & x86.FLAG_DB)
    if kind & 8:
        size = "CS64" if flags & x86.FLAG_L else "CS32" if big else "CS16"
        letters = "C" if kind & 4 else "-", "R" if kind & 2 else "-"
    else:
        size = "DS  " if big or long_mode else "DS16"
        letters = "E" if kind & 4 else "-", "W" if kind & 2 else "-"
    return f"{text}{size} [{letters[0]}{letters[1]}{'A' if kind & 1 else '-'}]"


def _fpu(area: bytes, xmm_count: int) -> list[str]:
    def field(offset: int, size: int) -> int:
        return int.from_bytes(area[offset : offset + size], "little")

    fsw = field(FSW, 2)
    top = fsw >> 11 & 7
    lines = [
        f"FCW={field(FCW, 2):04x} FSW={fsw:04x} [ST={top}] FTW={field(FTW, 1):02x} "
        f"MXCSR={field(MXCSR, 4):08x}"
    ]
    cells = []
    for physical in range(8):
        at = ST0 + 16 * ((physical - top) % 8)
        cells.append(f"FPR{physical}={field(at, 8):016x} {field(at + 8, 2):04x}")
    for index in range(xmm_count):
        at = XMM0 + 16 * index
        cells.append(f"XMM{index:02}={field(at + 8, 8):016x} {field(at, 8):016x}")
    return lines + [" ".join(cells[i : i + 2]) for i in range(0, len(cells), 2)]


def value(state: dict, name: str) -> int | None:
    """What `$name` is in an expression; None where there is no such register."""
    general = {f"r{short.lower()}": index for index, short in enumerate(NAMES)}
    general |= {f"r{index}": index for index in range(8, 16)}
    if name in general:
        return int(state["env.regs"][general[name]])
    if name in ("rip", "pc"):
        return int(state["env.eip"])
    if name == "eflags":
        return int(state["env.eflags"])
    if name.upper() in SEGMENTS and name.islower():
        return int(state["env.segs"][SEGMENTS.index(name.upper())]["selector"])
    if name in ("fs_base", "gs_base"):
        return int(state["env.segs"][SEGMENTS.index(name[:2].upper())]["base"])
    if name in ("cr0", "cr2", "cr3", "cr4"):
        return int(state["env.cr"][int(name[2])])
    if name == "cr8":
        return int(state["env.cr8"])
    if name == "efer":
        return int(state["env.efer"])
    return None
