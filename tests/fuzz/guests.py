"""Guests that do what they like: random port and memory accesses, and random opcodes.

Each is updated while it runs.  It may go on, shut down, or stop the VM by an error of the
accelerator's; the VMM may not end by a signal or an exception, nor fail to answer.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from conftest import ROOT  # noqa: E402
from harness.qmp import QmpError  # noqa: E402
from harness.vm import Vm  # noqa: E402

SECTOR, FLOPPY = 512, 1474560
SIGNATURE = b"\x55\xaa"
SEED_OFFSET = SECTOR - 6  # in front of the signature; random-io.S reads it
RUNS = 0.15  # s, before and after the update
PREFIXES = (b"\x66", b"\x67", b"\x66\x67", b"\xf0", b"\xf3", b"\x0f")
ENTRIES = (  # how a guest of random opcodes begins: in real mode, or 32 bits
    b"",
    bytes.fromhex("fa0f0116107c0f20c0660d010000000f22c0ea0000"),
)


@cache
def built() -> bytes:
    """The sector of random-io.S."""
    with tempfile.TemporaryDirectory(prefix="cpr-fuzz-") as folder:
        code, image = f"{folder}/guest.o", Path(folder, "guest.bin")
        source = Path(__file__).with_name("random-io.S")
        flags = ["-m64", "-Wa,--fatal-warnings", "-Wa,-mx86-used-note=no"]
        include = ["-I", str(ROOT / "examples")]
        subprocess.run(["gcc", *flags, *include, "-c", "-o", code, source], check=True)
        link = ["ld", "-m", "elf_x86_64", "-n", "-z", "noexecstack", "-Ttext=0x7c00"]
        link += ["-e", "start16", "--oformat", "binary", "-o", str(image), code]
        subprocess.run(link, check=True)
        return image.read_bytes()


def random_io(chance: random.Random) -> bytes:
    """The guest random-io with a seed of its own."""
    image = bytearray(built().ljust(FLOPPY, b"\0"))
    image[SEED_OFFSET : SEED_OFFSET + 4] = chance.randbytes(4)
    return bytes(image)


def opcodes(chance: random.Random) -> bytes:
    """A boot sector of random bytes, some of them prefixes of what is rare."""
    code = bytearray(chance.choice(ENTRIES))
    while len(code) < SECTOR - 2:
        code += chance.choice((b"", b"", b"", *PREFIXES)) + chance.randbytes(chance.randrange(1, 5))
    return bytes(code[: SECTOR - 2] + SIGNATURE).ljust(FLOPPY, b"\0")


KINDS = {"random-io": random_io, "opcodes": opcodes}


@contextmanager
def running(accel: str, image: Path) -> Iterator[Vm]:
    with Vm(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M", "-smp", "2"),
        *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-chardev", "null,id=log", "-device", "isa-debugcon,iobase=0xe9,chardev=log"),
        *("-serial", "null", "-drive", f"file={image},format=raw,if=floppy"),
    ) as vm:
        yield vm


def try_guest(accel: str, kind: str, chance: random.Random, folder: Path) -> str:
    """What became of one guest.  Raises AssertionError for what must not be."""
    image = folder / "guest.img"
    image.write_bytes(KINDS[kind](chance))
    try:
        with running(accel, image) as vm:
            return watch(vm)
    except RuntimeError as error:  # the guest was faster than the monitor
        assert "VMM ended with 0:" in str(error), error
        return "ended"


def watch(vm: Vm) -> str:
    try:
        time.sleep(RUNS)
        try:
            vm.ask("cpr-exec")
            vm.reconnect()
        except QmpError:  # a guest that has stopped cannot be updated in every state
            pass
        time.sleep(RUNS)
        state: dict[str, Any] = vm.ask("query-status")
        vm.ask("quit")
        vm.process.wait(20)
    except (RuntimeError, ConnectionError):
        vm.process.wait(20)
        state = {"status": "ended"}
    assert vm.process.returncode == 0, (vm.process.returncode, vm.stderr)
    assert "Traceback" not in vm.stderr, vm.stderr
    return str(state["status"])


def keep(image: Path) -> Path:
    """The boot sector of a finding, in the corpus."""
    from fuzz.reading import keep as keep_input

    return keep_input("guests", image.read_bytes()[:SECTOR])


def fuzz(seconds: float, seed: int, folder: Path) -> bool:
    chance, end = random.Random(f"guests {seed}"), time.monotonic() + seconds
    outcomes: dict[str, int] = {}
    while time.monotonic() < end:
        accel, kind = chance.choice(("kvm", "tcg")), chance.choice(list(KINDS))
        try:
            outcome = try_guest(accel, kind, chance, folder)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"guests: {kind} on {accel}: {error}; kept in {keep(folder / 'guest.img')}")
            return False
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"guests: {sum(outcomes.values())} with an update each: {told}")
    return True
