"""Builds cpr._native._cpr with cffi in API mode.

Kernel constants and structs come from the system's headers through `cdef.h`.  Each other header
holds declarations only: it is both what C includes and what cffi parses, so that the two cannot
differ.  A header *_abi.h holds what the system's headers may lack; cffi knows it through `cdef.h`
too.  `raw_syscall.h` has code, and is for C only.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ABI = sorted(path.name for path in HERE.glob("*_abi.h"))
C_ONLY = {"cdef.h", "raw_syscall.h", *ABI}
HEADERS = sorted(path.name for path in HERE.glob("*.h") if path.name not in C_ONLY)
SOURCES = sorted(path.name for path in HERE.glob("*.c") if path.name != "_cpr.c")

PRELUDE = """
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kcmp.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
"""


def declarations(name: str) -> str:
    """The text of a header without its preprocessor lines, which cffi does not parse."""
    lines = (HERE / name).read_text().splitlines()
    if name == "cdef.h":
        return "\n".join(lines)
    return "\n".join(line for line in lines if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef("\n".join(declarations(name) for name in ["cdef.h", *HEADERS]))
ffibuilder.set_source(
    "cpr._native._cpr",
    PRELUDE + "".join(f'#include "{name}"\n' for name in [*ABI, *HEADERS]),
    sources=[f"cpr/_native/{name}" for name in SOURCES],
    include_dirs=["cpr/_native"],
    depends=[f"cpr/_native/{name}" for name in [*C_ONLY, *HEADERS]],
    extra_compile_args=[
        "-O2",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fcf-protection=none",
    ],
    libraries=["dl", "pthread"],
)


if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent.parent))
