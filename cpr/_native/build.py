"""Builds the C modules with cffi in API mode: cpr._native._cpr, and cpr._native._tcg of `tcg/`.

Kernel constants and structs come from the system's headers through `cdef.h`.  Each other header
holds declarations only: it is both what C includes and what cffi parses, so that the two cannot
differ.  A header *_abi.h holds what the system's headers may lack; cffi knows it through `cdef.h`
too.  The headers of C_ONLY are for C alone.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
FOLDER = "cpr/_native"
ABI = sorted(path.name for path in HERE.glob("*_abi.h"))
C_ONLY = {
    "cdef.h",
    "guard_death.h",
    "guard_proc.h",
    "raw_syscall.h",
    "sandbox_calls.h",
    "virtio_blk_io.h",
    "virtio_chain.h",
    *ABI,
}
HEADERS = sorted(path.name for path in HERE.glob("*.h") if path.name not in C_ONLY)
SOURCES = sorted(path.name for path in HERE.glob("[!_]*.c"))

# What Python uses of the TCG accelerator; the other headers there are C's own.
TCG_HEADERS = ["tcg/cpu.h", "tcg/unicorn_api.h", "tcg/vm.h"]
TCG_SOURCES = sorted(f"tcg/{path.name}" for path in HERE.glob("tcg/*.c"))

# No shadow stack: the guard jumps back into the stack of its caller.
FLAGS = ["-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fcf-protection=none"]

PRELUDE = """
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <asm/kvm_para.h>
#include <linux/kcmp.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <linux/vhost.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_net.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
"""


def declarations(name: str) -> str:
    """The text of a header without its preprocessor lines, which cffi does not parse."""
    lines = (HERE / name).read_text().splitlines()
    if name == "cdef.h":
        return "\n".join(lines)
    return "\n".join(line for line in lines if not line.startswith("#"))


def module(
    name: str, declared: list[str], included: list[str], sources: list[str], prelude: str = ""
) -> FFI:
    """The module cpr._native.NAME, in which cffi knows the headers `declared`."""
    builder = FFI()
    builder.cdef("\n".join(declarations(header) for header in declared))
    builder.set_source(
        f"cpr._native.{name}",
        prelude + "".join(f'#include "{header}"\n' for header in included),
        sources=[f"{FOLDER}/{source}" for source in sources],
        include_dirs=[FOLDER],
        depends=[str(path.relative_to(HERE.parent.parent)) for path in sorted(HERE.rglob("*.h"))],
        extra_compile_args=FLAGS,
        libraries=["dl", "pthread"],
        py_limited_api=True,  # one file for every Python, whoever builds it
    )
    return builder


cpr = module("_cpr", ["cdef.h", *HEADERS], [*ABI, *HEADERS], SOURCES, PRELUDE)
tcg = module("_tcg", TCG_HEADERS, TCG_HEADERS, TCG_SOURCES)


if __name__ == "__main__":
    for builder in (cpr, tcg):
        built = Path(builder.compile(tmpdir=str(HERE.parent.parent)))
        for stale in HERE.glob(f"{built.name.split('.')[0]}.*.so"):
            if stale.name != built.name:  # of a Python's own suffix, which would go before it
                stale.unlink()
